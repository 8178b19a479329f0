"""DeepSpeed in the place of our optimizer: the same training as native, and checkpoints that both read."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.parity import (
    DROPOUT,
    FULL_STEPS,
    GPT,
    LLAMA,
    SHORT_STEPS,
    Layout,
    assert_same_shards,
    make_batches,
    make_spec,
)
from tests.distributed.ranks import RankFailed, RankPool
from trimaran.models.parallel.shard import ShardSpec
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.state import TrainState, load_state, save_state
from trimaran.runtime.train.train_context import TrainContext, build_train_context, evaluate, train_step
from trimaran.runtime.zero import deepspeed_setup
from trimaran.runtime.zero.costs import Held, bytes_of_state

LR = 3e-3
# A key's bias changes no attention: its gradient is a rounding error, which AdamW makes a step of.
TIED: dict[str, Any] = GPT | DROPOUT | {"bias": False}
MIXTRAL: dict[str, Any] = LLAMA | {"num_experts": 4, "router_aux_loss": 0.1}
MUP: dict[str, Any] = LLAMA | {"init": "mup", "mup_base_width": 8}
Weights = dict[str, list[tuple[ShardSpec, tuple[int, ...], int, torch.Tensor]]]
"""Name -> (shard, local shape, start, values) of the pieces."""


def by_deepspeed(stage: int, offload: str = "none") -> dict[str, Any]:
    """The zero section of a spec."""
    return {"backend": "deepspeed", "stage": stage, "offload": offload}


@dataclass(frozen=True)
class Case:
    """A run: the layout and the zero section, which is native by default."""

    parallel: dict[str, Any]
    zero: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=lambda: LLAMA)
    dtype: str = "float32"
    recompute: str = "none"
    num_steps: int = FULL_STEPS

    def spec(self, folder: str = "unused") -> RunSpec:
        how = {"recompute": self.recompute, "dtype": self.dtype, "num_steps": self.num_steps}
        layout = Layout("", self.parallel, self.model, **how)
        raw = make_spec(layout).model_dump(mode="json")
        return parse_spec(raw | {"zero": raw["zero"] | self.zero, "train": raw["train"] | {"output_dir": folder}})


def start(spec: RunSpec) -> TrainContext:
    """Return the job of a rank, as a launcher would have made it; nothing is compiled."""
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    deepspeed_setup.which = lambda program: None
    sizes = {axis: getattr(spec.parallel, axis) for axis in ("pp", "dp", "cp", "tp")}
    mesh = build_mesh(**sizes, timeout_s=100)
    return build_train_context(spec, mesh, torch.device("cpu"))


def take_steps(train_context: TrainContext, steps: range) -> dict[str, Any]:
    spec, dp = train_context.spec, train_context.mesh.dp
    results = [train_step(train_context, make_batches(spec, step, dp.rank, dp.size), LR) for step in steps]
    return {"losses": [each.loss for each in results], "norms": [each.grad_norm for each in results]}


def weights_of(train_context: TrainContext, key: str = "weight") -> Weights:
    found: Weights = {}
    for piece in train_context.optimizer.pieces():
        if piece.key == key:
            found.setdefault(piece.name, []).append((piece.spec, piece.local_shape, piece.start, piece.data.clone()))
    return found


# ---------------------------------------------------------------- parity


def train_on_rank(cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        spec = case.spec()
        train_context = start(spec)
        mesh = train_context.mesh
        result = take_steps(train_context, range(case.num_steps))
        result["held_out"] = evaluate(train_context, [make_batches(spec, 1000, mesh.dp.rank, mesh.dp.size)])
        result["weights"] = weights_of(train_context)
        named = [item for stage in train_context.stages.values() for item in stage.named_parameters()]
        ends = [parameter for name, parameter in named if name == "embedding.weight" and parameter.numel()]
        result["ends"] = [(mesh.tp.rank, end.detach().clone()) for end in ends]
        result["bytes"] = train_context.optimizer.state_bytes()
        result["description"] = train_context.optimizer.description
        mesh.close()
        results.append(result)
    assert "mlflow" not in sys.modules, "which DeepSpeed's autotuner would import"
    return results


def assert_same_training(results: Sequence[dict[str, Any]], reference: dict[str, Any]) -> None:
    """Compare with one process of ours, to 1e-5."""
    for result in results:
        for what in ("losses", "norms", "held_out"):
            assert result[what] == pytest.approx(reference[what], rel=1e-5), what
    assert joined(results).keys() == reference["weights"].keys()
    for name, shards in joined(results).items():
        ((whole_shard, _, _, whole),) = reference["weights"][name]
        for shard, local in shards:
            assert_same_shards(name, whole.view(whole_shard.global_shape), local, shard, 1e-5)
    first_end: dict[int, torch.Tensor] = {}
    for result in results:
        for tp_rank, end in result["ends"]:
            assert end.equal(first_end.setdefault(tp_rank, end)), "the copies of an embedding stay equal"


def joined(results: Sequence[dict[str, Any]]) -> dict[str, list[tuple[ShardSpec, torch.Tensor]]]:
    """Name -> the local tensors, of which each element comes from exactly one rank."""
    parts: dict[str, dict[ShardSpec, list[tuple[int, torch.Tensor, tuple[int, ...]]]]] = {}
    for result in results:
        for name, pieces in result["weights"].items():
            for shard, local_shape, begin, values in pieces:
                parts.setdefault(name, {}).setdefault(shard, []).append((begin, values, local_shape))
    found: dict[str, list[tuple[ShardSpec, torch.Tensor]]] = {}
    for name, shards in parts.items():
        for shard, pieces in shards.items():
            pieces.sort(key=lambda piece: piece[0])
            values = torch.cat([piece[1] for piece in pieces])
            assert [piece[0] for piece in pieces] == [0, *torch.tensor([len(p[1]) for p in pieces]).cumsum(0)[:-1]]
            found.setdefault(name, []).append((shard, values.view(pieces[0][2])))
    return found


def short(parallel: dict[str, Any], zero: dict[str, Any], model: dict[str, Any] = LLAMA) -> Case:
    """A case of few steps: those of full length have every stage of ZeRO among them."""
    return Case(parallel, zero, model, num_steps=SHORT_STEPS)


TWO_RANKS = [
    short({"dp": 2}, by_deepspeed(1), MIXTRAL),
    short({"dp": 2}, by_deepspeed(2, "cpu"), TIED),
    Case({"dp": 2}, by_deepspeed(3), MUP, recompute="full"),
    short({"tp": 2, "sequence_parallel": True}, by_deepspeed(3), TIED),
    Case({"pp": 2}, by_deepspeed(1), TIED, recompute="selective"),
    short({"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"}, by_deepspeed(2), MUP),
]
EIGHT_RANKS = [
    short({"tp": 2, "pp": 2, "dp": 2}, by_deepspeed(1)),
    Case({"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, by_deepspeed(2), TIED),
]


@pytest.mark.parametrize("cases", [TWO_RANKS, EIGHT_RANKS], ids=["2-ranks", "8-ranks"])
def test_steps_equal_our_own(cases: list[Case], ranks: RankPool) -> None:
    references = [Case({}, {}, case.model, num_steps=case.num_steps) for case in cases]
    by_rank = ranks.run(train_on_rank, cases[0].spec().world_size, cases)
    for case, reference, results in zip(cases, references, zip(*by_rank, strict=True), strict=True):
        try:
            assert_same_training(results, ranks.alone(train_on_rank, [reference])[0])
        except AssertionError as error:
            error.add_note(f"in {case}")
            raise
        assert_bytes_and_description(case, results)


def assert_bytes_and_description(case: Case, results: Sequence[dict[str, Any]]) -> None:
    """Compare with the formula that `trimaran check` prints."""
    dp, stage = case.parallel.get("dp", 1), case.zero["stage"]
    for result in results:
        found = result["bytes"]
        count = found["gradients"] // 4
        formula = bytes_of_state(stage, case.dtype, [Held(count, dp, 1)], "deepspeed")
        # DeepSpeed pads each group, or with stage 3 each tensor, to a multiple of the ranks.
        assert {name: found[name] for name in formula} == pytest.approx(formula, abs=1000)
        assert (found["transit"] > 0) == (stage == 3)
        assert f"ZeRO stage {stage}" in result["description"]
        assert ("its state on the CPU" in result["description"]) == (case.zero["offload"] == "cpu")


# ---------------------------------------------------------------- checkpoints


def train_part(case: Case, folder: str, load: str | None, stop: int) -> tuple[list[float], str]:
    """Train from the start or a checkpoint to `stop`; return the losses and the checkpoint."""
    spec = case.spec(folder)
    train_context = start(spec)
    state = TrainState() if load is None else load_state(train_context, Path(load))
    losses = take_steps(train_context, range(state.step, stop))["losses"]
    assert train_context.optimizer.num_steps == stop
    for _ in range(state.step, stop):
        state = state.after_step(spec)
    saved = save_state(train_context, state)
    train_context.mesh.close()
    return losses, str(saved)


def hand_on(cases: list[Case], folder: str, load: str | None, begin: int) -> tuple[list[float], str]:
    """Train two steps in each case, each from the checkpoint of the one before."""
    losses: list[float] = []
    for index, case in enumerate(cases):
        more, load = train_part(case, f"{folder}/{begin + index}", load, 2 * (begin + index + 1))
        losses += more
    assert load is not None
    return losses, load


def test_checkpoints_go_from_native_to_deepspeed_and_back_at_other_layouts(tmp_path: Path, ranks: RankPool) -> None:
    four = [
        Case({"tp": 2, "pp": 2}, {"stage": 2}, TIED),
        Case({"dp": 2, "pp": 2}, by_deepspeed(1), TIED),
        Case({"pp": 4}, by_deepspeed(2), TIED),  # the inner stages have no embedding
        Case({"dp": 4}, by_deepspeed(3), TIED),
        Case({"tp": 2, "dp": 2, "sequence_parallel": True}, by_deepspeed(2), TIED),
    ]
    losses, saved = ranks.run(hand_on, 4, four, str(tmp_path), None, 0)[0]
    last, _ = ranks.run(hand_on, 1, [Case({}, {}, TIED)], str(tmp_path), saved, 5)[0]
    ((unbroken, _),) = ranks.run(train_part, 1, Case({}, {}, TIED), str(tmp_path / "unbroken"), None, 12)
    assert losses + last == pytest.approx(unbroken, rel=1e-5)


def resume_on_rank(cases: list[Case], folder: str) -> list[tuple[bool, bool]]:
    """For each case, whether six steps and three steps resumed for three have equal losses and equal states."""
    found = []
    for index, case in enumerate(cases):
        spec = case.spec(f"{folder}/{index}")
        train_context = start(spec)
        whole = take_steps(train_context, range(6))["losses"]
        expected = {key: weights_of(train_context, key) for key in ("weight", "exp_avg", "exp_avg_sq")}
        train_context.mesh.close()
        first, saved = train_part(case, f"{folder}/{index}", None, 3)
        train_context = start(spec)
        load_state(train_context, Path(saved))
        second = take_steps(train_context, range(3, 6))["losses"]
        train_context.mesh.close()
        alike = [
            values.equal(others)
            for key, weights in expected.items()
            for name, pieces in weights_of(train_context, key).items()
            for (*_, values), (*_, others) in zip(pieces, weights[name], strict=True)
        ]
        found.append((first + second == whole, len(alike) > 20 and all(alike)))
    return found


def test_resume_is_exact_to_the_bit(tmp_path: Path, ranks: RankPool) -> None:
    cases = [
        Case({"dp": 2}, by_deepspeed(1), TIED, "bfloat16"),
        Case({"dp": 2}, by_deepspeed(2), TIED, "bfloat16"),
        Case({"dp": 2}, by_deepspeed(3), TIED, "bfloat16"),
        Case({"dp": 2}, by_deepspeed(1, "cpu"), TIED),
    ]
    for results in ranks.run(resume_on_rank, 2, cases, str(tmp_path)):
        assert results == [(True, True)] * len(cases)


def bfloat16_on_rank(cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        train_context = start(case.spec())
        results.append(take_steps(train_context, range(4)))
        train_context.mesh.close()
    return results


def test_bfloat16_is_near_our_own(ranks: RankPool) -> None:
    cases = [Case({"dp": 2}, zero, LLAMA, "bfloat16") for zero in ({}, *(by_deepspeed(stage) for stage in (1, 2, 3)))]
    native, *others = ranks.run(bfloat16_on_rank, 2, cases)[0]
    for result in others:
        assert result["losses"] == pytest.approx(native["losses"], rel=2e-3)
        assert result["norms"][0] == pytest.approx(native["norms"][0], rel=1e-2)


# ---------------------------------------------------------------- what goes wrong


def forget_a_cut() -> None:
    """Train a step as if no parameter were cut: DeepSpeed's norm is then wrong."""
    train_context = start(Case({"tp": 2}, by_deepspeed(2)).spec())
    for stage in train_context.stages.values():
        for parameter in stage.parameters():
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    take_steps(train_context, range(1))


def test_a_norm_that_is_not_our_own_ends_the_first_step(ranks: RankPool) -> None:
    with pytest.raises(RankFailed, match=r"DeepSpeed's gradient norm of the first step is 1\.\d+ and that of our own"):
        ranks.run(forget_a_cut, 2)


def fail_alone() -> str:
    """Raise between the backward passes on rank 0 alone."""
    train_context = start(Case({"dp": 2}, by_deepspeed(2)).spec())
    take_steps(train_context, range(1))
    if train_context.mesh.rank == 0:
        try:
            with train_context.optimizer.accumulating():
                train_context.executor.run(make_batches(train_context.spec, 1, 0, 2))
                raise ValueError("alone")
        except ValueError as error:
            return str(error)
    return "alone"


def test_an_error_on_one_rank_does_not_wait_for_the_others(ranks: RankPool) -> None:
    assert ranks.run(fail_alone, 2) == ["alone", "alone"]


def test_a_missing_or_old_package_is_an_error_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        RuntimeError, match=r"needs the package deepspeed: .* pip install -c constraints.txt deepspeed;"
    ):
        deepspeed_setup.import_deepspeed()
    old = ModuleType("deepspeed")
    old.__spec__ = ModuleSpec("deepspeed", None)
    old.__version__, old.DeepSpeedEngine = "0.17.0", SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", old)
    with pytest.raises(RuntimeError, match=r"deepspeed 0.17.0 has no coalesce_grad_reduction.*--upgrade deepspeed"):
        deepspeed_setup.import_deepspeed()
