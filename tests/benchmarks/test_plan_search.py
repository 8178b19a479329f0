"""benchmarks/plan_search.py prints its table; its seconds depend on the machine and are not tested"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_prints_a_row_for_each_number_of_gpus() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "plan_search.py")], capture_output=True, text=True, check=True
    )
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["96", "384", "1,536"]
    assert max(int(row[1].replace(",", "")) for row in rows) > 10_000
    assert all("tp" in row[4] for row in rows)
