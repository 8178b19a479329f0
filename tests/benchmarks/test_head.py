"""benchmarks/head.py runs and prints its table; of its figures only the memory is tested, which never varies."""

from pathlib import Path

from tests.launchers.runs import run_script

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "head.py"


def test_head_table_has_a_row_a_shape_and_ours_holds_less(tmp_path: Path) -> None:
    done = run_script(tmp_path, SCRIPT, "--rounds", "1", "--threads", "1", "1024,32,4096", "64,16,300")
    assert done.code == 0, done.err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1024,32,4096", "64,16,300"]
    assert all(float(figure) > 0 for row in rows for figure in row[1:4])
    assert 0 < float(rows[0][5]) < float(rows[0][4]) / 2
