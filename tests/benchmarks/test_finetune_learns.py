"""benchmarks/finetune_learns.py lets a run learn from records, and prints what it knew before and after."""

import json
import re
from pathlib import Path

import pytest

from tests.launchers.runs import make_workplace, run_script

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "finetune_learns.py"


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_figure_before_and_after_is_printed(method: str, tmp_path: Path) -> None:
    steps = {"num_steps": 2, "eval_interval": 0, "seq_len": 256}
    base = make_workplace(tmp_path / "base", parallel={"tp": 1}, train=steps)
    assert base.train().code == 0
    answers = {"output": "good", "chosen": "good", "rejected": "very bad"}
    records = [{"instruction": f"say it {number} times", "input": "", **answers} for number in range(80)]
    records.append({**records[0], "rejected": "good"})  # a pair of equal answers is left out
    (tmp_path / "records.json").write_text(json.dumps(records))
    done = run_script(tmp_path, SCRIPT, method, "--data", str(tmp_path / "records.json"), "--base", str(base.run))
    assert done.code == 0, done.err
    assert f"{81 if method == 'sft' else 80} records, some of them held out" in done.out
    figure = {"sft": "held_out_loss", "dpo": "held_out_accuracy"}[method]
    found = re.search(rf"  {figure}: ([\d.]+) -> ([\d.]+)\n", done.out)
    assert found is not None
    before, after = map(float, found.groups())
    last = done.out.splitlines()[-1]
    if method == "sft":
        assert 0 < after < before
        assert last == f"{figure}: {1 - after / before:.1%} lower"
    else:
        assert before == 0.0  # of equal margins none is right
        assert last == f"{figure}: {100 * (after - 0.5):+.1f} points from a half, which is chance"
