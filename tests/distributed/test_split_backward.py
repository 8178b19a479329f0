"""A backward in two parts, or of recomputed activations, gives the gradients of a plain one to the bit."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.distributed.parity import GPT, LLAMA, Layout, make_batches, make_spec
from tests.distributed.ranks import RankPool
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.pipeline.action import Action, ActionKind, Entry
from trimaran.runtime.pipeline.executor import Executor
from trimaran.runtime.pipeline.passes import add_communication, validate
from trimaran.runtime.pipeline.schedule import Schedule, one_f_one_b
from trimaran.runtime.train.train_context import build_train_context

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "tied, biases, dropout": GPT | DROPOUT,
    "experts": LLAMA | {"num_experts": 4},
}


def at_once(entries: Sequence[Entry]) -> list[Entry]:
    """Every W right after its I."""
    return [part for entry in entries for part in (halves(entry) if is_whole_backward(entry) else [entry])]


def at_the_end(entries: Sequence[Entry]) -> list[Entry]:
    """All Ws after everything else."""
    parts = at_once(entries)
    weights = [entry for entry in parts if isinstance(entry, Action) and entry.kind is ActionKind.W]
    return [*(entry for entry in parts if entry not in weights), *weights]


def is_whole_backward(entry: Entry) -> bool:
    return isinstance(entry, Action) and entry.kind is ActionKind.B


def halves(entry: Entry) -> list[Entry]:
    (action,) = entry.parts
    return [Action(kind, action.stage, action.microbatch) for kind in (ActionKind.I, ActionKind.W)]


WAYS: dict[str, Callable[[Sequence[Entry]], list[Entry]]] = {"at once": at_once, "at the end": at_the_end}


def gradients_on_rank(model: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """The summed gradients of this rank's weights, by way of running the backwards."""
    mesh = build_mesh(pp=2, dp=1, cp=1, tp=2, timeout_s=100)
    found = gradients_by_way(mesh, model, "none")
    for recompute in ("full", "selective"):
        for name, gradients in gradients_by_way(mesh, model, recompute).items():
            found[f"{name}, {recompute}"] = gradients
    mesh.close()
    return found


def gradients_by_way(mesh: Mesh, model: dict[str, Any], recompute: str) -> dict[str, list[torch.Tensor]]:
    spec = make_spec(Layout("pp2-tp2", {"pp": 2, "tp": 2, "sequence_parallel": True}, model, recompute=recompute))
    context = build_train_context(spec, mesh, torch.device("cpu"))
    whole = one_f_one_b(2, spec.num_microbatches)
    found = {}
    for name, way in {"whole": list[Entry], **WAYS}.items():
        schedule = add_communication(Schedule(whole.placement, tuple(tuple(way(each)) for each in whole.actions)))
        validate(schedule, num_stages=2, num_microbatches=spec.num_microbatches)
        executor = Executor(
            context.stages,
            schedule.actions[mesh.pp.rank],
            context.executor.transport,
            loss_weight=1.0 / spec.target_tokens_per_step,
        )
        with context.optimizer.accumulating():
            executor.run(make_batches(spec, 0, 0, 1))
        assert not executor._flights, "nothing is held after the list"
        context.optimizer.finish_gradients()
        balance = sum(float(stage.take_load_balancing_loss()) for stage in context.stages.values())
        found[name] = [torch.tensor(balance), *(p.data.clone() for p in context.optimizer.gradient_pieces())]
    return found


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_equal_to_the_bit(model: str, ranks: RankPool) -> None:
    for found in ranks.run(gradients_on_rank, 4, MODELS[model]):
        whole = found.pop("whole")
        assert len(whole) > 5
        for name, gradients in found.items():
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, whole, strict=True)), name
