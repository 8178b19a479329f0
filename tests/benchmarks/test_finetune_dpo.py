"""benchmarks/finetune_dpo.py runs and prints its table; its figures depend on the machine and are not tested."""

from pathlib import Path

from tests.launchers.runs import run_script

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "finetune_dpo.py"


def test_the_table_has_a_row_for_each_way(tmp_path: Path) -> None:
    sizes = ("--layers", "2", "--hidden", "32", "--vocab", "300", "--rows", "2", "--seq-len", "256", "--rounds", "1")
    done = run_script(tmp_path, SCRIPT, *sizes)
    assert done.code == 0, done.err
    first, *table, last = done.out.splitlines()
    assert " tokens a step in " in first
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [row[0] for row in rows] == ["sft", "dpo"]
    assert rows[0][3:] == ["1.00", "1.00"]
    assert all(float(figure) > 0 for figure in rows[1][1:])
    assert last.startswith("the reference's log-probabilities, once")
