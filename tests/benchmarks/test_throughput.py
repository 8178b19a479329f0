"""benchmarks/throughput.py runs and prints its table; its figures are not looked at."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "throughput.py"


@pytest.mark.slow
def test_throughput_table_has_a_row_for_each_layout() -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", "--steps", "1", "single", "tp2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    for layout in ("single", "tp2"):
        assert all(float(figure) > 0 for figure in rows[layout][1:])


def test_unknown_layout_is_named() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "tp3"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 2
    assert "unknown layouts ['tp3']" in done.stderr
