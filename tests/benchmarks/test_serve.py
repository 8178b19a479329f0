"""benchmarks/serve.py runs, all ways give the same tokens and it prints its table; the figures are not tested."""

from pathlib import Path

from tests.launchers.forked import HUGGING_FACE
from tests.launchers.runs import run_script

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "serve.py"


def test_the_table_of_the_engine_has_a_row_for_each_model_and_number_of_streams(tmp_path: Path) -> None:
    done = run_script(tmp_path, SCRIPT, "batch", "--smoke", "--threads", "1", preload=HUGGING_FACE)
    assert done.code == 0, done.err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.out.splitlines()[3:]]
    assert [row[:2] for row in rows] == [
        [model, streams] for model in ("llama-smoke", "gpt2-smoke") for streams in "18"
    ]
    assert all(float(figure) > 0 for row in rows for figure in row[2:])
