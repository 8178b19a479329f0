"""benchmarks/generate.py runs, both sides give the same tokens and it prints its table; the figures are not tested."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "generate.py"


def test_generate_table_has_a_row_for_each_model_and_batch() -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[3:]]
    assert [row[:2] for row in rows] == [
        [model, batch] for model in ("llama-smoke", "gpt2-smoke") for batch in ("1", "16", "16 ragged")
    ]
    assert all(float(figure) > 0 for row in rows for figure in row[2:5])
