"""benchmarks/finetune_learns.py lets a run learn from records, and prints what it knew before and after."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.scripts import load_script
from tests.launchers.drawn_run import drawn_run, tokenizer_of_words
from tests.launchers.runs import run_forked

FEW_STEPS = {"optimizer": {"lr": 1e-2}, "train": {"num_steps": 3, "global_batch_size": 8, "micro_batch_size": 8}}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_figure_before_and_after_is_printed(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load_script("finetune_learns")
    monkeypatch.setattr(benchmark, "LARGE", {method: FEW_STEPS})
    monkeypatch.setattr(subprocess, "run", run_forked)
    base = drawn_run(tmp_path / "base", tokenizer_of_words(), 256)
    answers = {"output": "good", "chosen": "good", "rejected": "very bad"}
    records = [{"instruction": f"say it {number} times", "input": "", **answers} for number in range(80)]
    records.append({**records[0], "rejected": "good"})  # a pair of equal answers is left out
    (tmp_path / "records.json").write_text(json.dumps(records))
    assert benchmark.main([method, "--data", str(tmp_path / "records.json"), "--base", str(base)]) == 0
    out = capsys.readouterr().out
    assert f"{81 if method == 'sft' else 80} records, some of them held out" in out
    figure = {"sft": "held_out_loss", "dpo": "held_out_accuracy"}[method]
    found = re.search(rf"  {figure}: ([\d.]+) -> ([\d.]+)\n", out)
    assert found is not None
    before, after = map(float, found.groups())
    last = out.splitlines()[-1]
    if method == "sft":
        assert 0 < after < before
        assert last == f"{figure}: {1 - after / before:.1%} lower"
    else:
        assert before == 0.0  # of equal margins none is right
        assert last == f"{figure}: {100 * (after - 0.5):+.1f} points from a half, which is chance"
