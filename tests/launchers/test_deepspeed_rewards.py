"""A run that learns from rewards under DeepSpeed: it samples with the sharded weights, and learns as our own."""

from pathlib import Path

import pytest

from tests.launchers.runs import make_workplace
from tests.launchers.test_reward_run import rewarded, train


def test_sampled_answers_are_rewarded_and_learned_as_by_our_own(tmp_path: Path) -> None:
    steps = {"num_steps": 2, "eval_interval": 0, "seq_len": 96}
    base = make_workplace(tmp_path / "base", parallel={"tp": 1}, train=steps)
    outcome = base.train()
    assert outcome.code == 0, outcome.err
    rows = {}
    for backend in ("native", "deepspeed"):
        zero = {"backend": backend, "stage": 3}
        run = rewarded(base.run, tmp_path / backend, {}, zero=zero)
        outcome = train(run, "--allow-code")
        assert outcome.code == 0, outcome.err
        assert ("the optimizer is DeepSpeed" in outcome.out) == (backend == "deepspeed")
        rows[backend] = [(row["reward"], row["grad_norm"]) for row in run.rows()]
    assert len({norm for _, norm in rows["native"]}) == 6
    for (reward, norm), (expected, expected_norm) in zip(rows["deepspeed"], rows["native"], strict=True):
        assert reward == pytest.approx(expected, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
