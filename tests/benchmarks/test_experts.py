"""benchmarks/experts.py runs, its layers agree and it prints its table; the figures are not tested."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "experts.py"


def test_experts_table_has_two_rows_a_shape() -> None:
    command = [sys.executable, str(SCRIPT), "--rounds", "1", "16,24,4,2,32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["16,24,4,2,32", "training"], ["16,24,4,2,32", "forward"]]
    assert all(float(figure) > 0 for row in rows for figure in row[2:])
