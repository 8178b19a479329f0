"""benchmarks/experts.py runs, its layers agree and it prints its table; the figures are not tested."""

from pathlib import Path

from tests.launchers.runs import run_script

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "experts.py"


def test_experts_table_has_two_rows_a_shape(tmp_path: Path) -> None:
    done = run_script(tmp_path, SCRIPT, "--rounds", "1", "16,24,4,2,32")
    assert done.code == 0, done.err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["16,24,4,2,32", "training"], ["16,24,4,2,32", "forward"]]
    assert all(float(figure) > 0 for row in rows for figure in row[2:])
