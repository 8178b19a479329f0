"""Rollouts on live weights, and GRPO and PPO over them: the same tokens and losses at every layout, exact on resume."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.parity import proof_steps
from tests.distributed.ranks import RankFailed, RankPool
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.finetune.data.records import Origin, Prompt, Turn
from trimaran.runtime.finetune.rl.loop import Inputs, train_on_rewards
from trimaran.runtime.finetune.rl.prompts import PromptSet
from trimaran.runtime.finetune.rl.rollout import Sampler
from trimaran.runtime.infer import sample_group
from trimaran.runtime.infer.sampling import log_probs
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.metrics import read_metrics
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.train.signals import StopRequest
from trimaran.runtime.train.state import TrainState

VOCAB = 263
PROMPTS, GROUP, NEW_TOKENS = 4, 4, 6
SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "vocab_size": VOCAB,
    "max_seq_len": 32,
    "init_std": 0.3,
}
TEXTS = ["one", "two three", "five", "six seven eight", "nine and ten"]


@dataclass(frozen=True)
class Case:
    """A run of the tests."""

    parallel: dict[str, Any] = field(default_factory=dict)
    rl: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    zero_stage: int = 1
    micro_batch_size: int = 2
    num_steps: int = proof_steps(3)
    dtype: str = "float64"
    interval: int = 0

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return spec_of(self, Path("run")).world_size


KL = {"kl": 0.1, "top_p": 0.9, "temperature": 0.8}
TWICE = {"epochs": 2, "minibatches": 2, "loss": "dapo", "clip_high": 0.001, "clip_low": 0.001, **KL}
PPO = {"algorithm": "ppo", "minibatches": 2, "gamma": 0.9, "value_coef": 0.5, "clip_high": 0.01, **KL}
VALUED = {"score_head": "beside"}


def spec_of(case: Case, folder: Path) -> RunSpec:
    minibatches = case.rl.get("minibatches", 1)
    return parse_spec(
        {
            "model": SHAPE | case.model,
            "parallel": case.parallel,
            "zero": {"stage": case.zero_stage},
            "data": {"source": ["prompts.jsonl"], "tokenizer": "tokenizer.json", "tokenizer_vocab_size": 257},
            "optimizer": {"lr": 3e-3},
            "precision": {"dtype": case.dtype},
            "train": {
                "num_steps": case.num_steps,
                "global_batch_size": PROMPTS * GROUP // minibatches,
                "micro_batch_size": case.micro_batch_size,
                "seq_len": 24,
                "output_dir": str(folder),
            },
            "checkpoint": {"interval": case.interval},
            "logging": {"tensorboard": False},
            "finetune": {
                "method": "rl",
                "rl": {
                    "rewards": ["length:2", "length:4*0.5"],
                    "group_size": GROUP,
                    "prompts_per_step": PROMPTS,
                    "max_new_tokens": NEW_TOKENS,
                    **case.rl,
                },
            },
        }
    )


def inputs_of() -> Inputs:
    tokenizer = Tokenizer.train([], 257)
    records = [Prompt((Turn("user", text),), Origin("prompts.jsonl", line)) for line, text in enumerate(TEXTS, 1)]
    tokens = [tokenizer.encode(text) for text in TEXTS]
    return Inputs(PromptSet(records, tokens), tokenizer, tuple(range(20)), "prompts")


def train_on_rank(case: Case, folder: Path) -> TrainState:
    spec = spec_of(case, folder)
    sizes = {axis: getattr(spec.parallel, axis) for axis in ("pp", "dp", "cp", "tp")}
    mesh = build_mesh(**sizes, timeout_s=100, placement=placement_of(spec))
    with StopRequest() as stop:
        state = train_on_rewards(spec, mesh, torch.device("cpu"), inputs_of(), stop)
    mesh.close()
    return state


def told_of(folder: Path) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """The numbers of each step that neither clock nor memory changes, and the lines of rollouts.jsonl."""
    timed = ("tokens_per_second", "step_time_ms", "mfu")
    rows = [
        {
            name: value
            for name, value in row.items()
            if name not in timed and not name.startswith("peak_") and value is not None
        }
        for row in read_metrics(folder / "metrics.jsonl")
        if "loss" in row
    ]
    return rows, [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


Told = tuple[list[dict[str, float]], list[dict[str, Any]]]
Run = Callable[[Case], Told]


@pytest.fixture(scope="module")
def run(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains a case in a folder of its own, once."""
    known: dict[str, Told] = {}

    def train(case: Case) -> Told:
        if repr(case) not in known:
            folder = tmp_path_factory.mktemp("run")
            states = ranks.run(train_on_rank, case.world_size, case, folder)
            assert {state.step for state in states} == {case.num_steps}
            known[repr(case)] = told_of(folder)
        return known[repr(case)]

    return train


LAYOUTS: dict[str, dict[str, Any]] = {
    "micro4": {"micro_batch_size": 4},
    "dp2-zero2": {"parallel": {"dp": 2}, "zero_stage": 2},
    "dp2-zero3": {"parallel": {"dp": 2}, "zero_stage": 3},
    "tp2-sequence-parallel": {"parallel": {"tp": 2, "sequence_parallel": True}},
    "pp2": {"parallel": {"pp": 2}},
    "tp2-pp2-dp2": {"parallel": {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, "micro_batch_size": 1},
}
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"rl": KL},
    "dr_grpo": {"rl": {"loss": "dr_grpo"}},
    "dapo-twice": {"rl": TWICE, "num_steps": proof_steps(8)},
    "ppo": {"rl": PPO, "model": VALUED, "num_steps": proof_steps(6)},
}
BY_LAYOUT = {
    "micro4": ("grpo", "dr_grpo"),
    "dp2-zero2": ("dapo-twice", "ppo"),
    "dp2-zero3": ("grpo",),
    "tp2-sequence-parallel": ("dr_grpo", "ppo"),
    "pp2": ("grpo", "dapo-twice"),
    "tp2-pp2-dp2": ("dapo-twice", "ppo"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_samples_the_same_tokens_and_has_the_same_losses(layout: str, run: Run) -> None:
    for method in BY_LAYOUT[layout]:
        expected, rollouts = run(Case(**METHODS[method]))
        found, same = run(Case(**METHODS[method] | LAYOUTS[layout]))
        for line, other in zip(rollouts, same, strict=True):
            assert line == {**other, "advantage": pytest.approx(other["advantage"], abs=1e-9)}
        for row, other in zip(expected, found, strict=True):
            assert row == pytest.approx(other, abs=1e-9), method


@pytest.mark.parametrize("method", METHODS)
def test_these_runs_reach_what_they_compare(method: str, run: Run) -> None:
    rows, rollouts = run(Case(**METHODS[method]))
    assert len({(row["loss"], row["grad_norm"]) for row in rows}) == len(rows)
    assert len({line["answer"] for line in rollouts}) > len(rollouts) // 2
    assert {line["finish"] for line in rollouts} == {"length", "stop_token"}
    assert len({line["prompt"] for line in rollouts}) == len(TEXTS)
    assert all(0 < row["entropy"] < math.log(VOCAB) for row in rows)
    assert all(math.isfinite(row["reward"]) and row["grad_norm"] > 0 for row in rows)
    settings = METHODS[method]["rl"]
    assert all(("kl" in row) == ("kl" in settings) for row in rows)
    if method == "dapo-twice":
        assert max(row["clip_share"] for row in rows) > 0.1
    if method == "ppo":
        assert len({row["value_loss"] for row in rows}) == len(rows)
    else:
        assert all("value_loss" not in row for row in rows)


def train_until(case: Case, folder: Path, rollout: int) -> None:
    """Train, and fail while the answers of a rollout are sampled and some are there."""
    found: Callable[..., Any] = Sampler._answers

    def answers(self: Sampler, prompts: Any, numbers: Any) -> Any:
        completions = found(self, prompts, numbers)
        if numbers[0] // PROMPTS == rollout:
            raise RuntimeError("killed in the middle of a rollout")
        return completions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "_answers", answers)
        train_on_rank(case, folder)


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_run_that_fails_within_a_rollout_resumes_bit_for_bit(
    method: str, run: Run, ranks: RankPool, tmp_path: Path
) -> None:
    settings = METHODS[method] | {"parallel": {"dp": 2}, "interval": 1, "dtype": "float32"}
    case = Case(**settings)
    expected = run(case)
    with pytest.raises(RankFailed, match="in the middle of a rollout"):
        ranks.run(train_until, case.world_size, case, tmp_path, 2)
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert 0 < len(steps) < case.num_steps
    with (tmp_path / "rollouts.jsonl").open("a") as file:  # what a kill in the middle of a write leaves
        file.write('{"rollout": 2, "reward": 1.0}\n{"rollo')
    ranks.run(train_on_rank, case.world_size, case, tmp_path)
    assert told_of(tmp_path) == expected


def train_with_wrong_sampler(case: Case, folder: Path) -> None:
    """Train where the sampler has another temperature than the engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_group, "log_probs", lambda logits, tokens, temperature: log_probs(logits, tokens, 0.9))
        train_on_rank(case, folder)


def test_a_ratio_that_is_not_1_before_the_first_update_stops_the_run(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"before the first update the ratio .* is .* away from 1, over 1e-05"):
        ranks.run(train_with_wrong_sampler, 1, Case(dtype="float32"), tmp_path)
    assert not (tmp_path / "rollouts.jsonl").exists()
    assert not [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
