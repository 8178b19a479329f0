"""benchmarks/plan_search.py prints its table; its seconds depend on the machine and are not tested"""

from pathlib import Path

from tests.launchers.runs import run_script

ROOT = Path(__file__).parents[2]


def test_it_prints_a_row_for_each_number_of_gpus(tmp_path: Path) -> None:
    done = run_script(tmp_path, ROOT / "benchmarks" / "plan_search.py")
    assert done.code == 0, done.err
    rows = [line.split("|")[1:-1] for line in done.out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["96", "384", "1,536"]
    assert max(int(row[1].replace(",", "")) for row in rows) > 10_000
    assert all("tp" in row[4] for row in rows)
