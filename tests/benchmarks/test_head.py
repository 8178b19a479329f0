"""benchmarks/head.py runs and prints its table; of its figures only the memory is tested, which never varies."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "head.py"


def test_head_table_has_a_row_a_shape_and_ours_holds_less() -> None:
    command = [sys.executable, str(SCRIPT), "--rounds", "1", "--threads", "1", "1024,32,4096", "64,16,300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1024,32,4096", "64,16,300"]
    assert all(float(figure) > 0 for row in rows for figure in row[1:4])
    assert 0 < float(rows[0][5]) < float(rows[0][4]) / 2
