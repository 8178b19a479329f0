"""torch.distributed.pipelining on the same stages and microbatches gives the gradients of our executor."""

import tempfile
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from tests.distributed.ranks import RankPool
from trimaran.models.batch import Microbatch
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.transformer import Stage, build_stages
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.pipeline.action import actions_of
from trimaran.runtime.pipeline.csv_text import write_csv
from trimaran.runtime.pipeline.executor import Executor
from trimaran.runtime.pipeline.passes import add_communication, validate
from trimaran.runtime.pipeline.schedule import forward_only, round_robin, stages_of_rank
from trimaran.runtime.pipeline.schedules import SCHEDULES, build_schedule
from trimaran.runtime.pipeline.transport import P2PTransport

PP, SEQ, VOCAB, HIDDEN, LAYERS = 2, 6, 29, 8, 4
CPU = torch.device("cpu")
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "num_kv_heads": 1},
    "gpt": {"position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True},
}


@dataclass(frozen=True)
class Case:
    """One schedule on one model."""

    schedule: str
    virtual_stages: int
    num_microbatches: int
    model: str
    micro_batch: int = 2


CASES = [
    Case("gpipe", 1, 4, "llama"),
    Case("1f1b", 1, 4, "llama"),
    Case("1f1b", 1, 5, "gpt", micro_batch=1),
    Case("interleaved_1f1b", 2, 4, "llama"),
    Case("interleaved_1f1b", 2, 6, "gpt"),
    Case("zb_h1", 1, 5, "llama"),
    Case("zb_h2", 1, 4, "gpt"),
    Case("zbv", 2, 4, "llama"),
    Case("dualpipev", 2, 5, "gpt"),
]


class TorchStage(nn.Module):
    """A stage in the form that torch's pipeline takes: one tensor in, one tensor out; the last one gives logits."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [batch, seq] on the first stage, hidden [batch, seq, hidden] on the others."""
        hidden = self.stage.run_layers(None, x) if self.stage.is_first else self.stage.run_layers(x, x[..., 0])
        return self.stage.logits(hidden) if self.stage.is_last else hidden


def sum_of_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """torch's cross entropy, for our own must not be the judge of itself."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)


def make_batch(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (case.num_microbatches * case.micro_batch, SEQ)
    tokens, labels = (torch.randint(VOCAB, shape, generator=generator) for _ in range(2))
    labels[:, 2] = -100
    return tokens, labels


def make_stages(case: Case, mesh: Any, pp: int = PP) -> dict[int, Stage]:
    """This rank's stages without an optimizer: their gradients go to `.grad`."""
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_heads=2,
        ffn_hidden_size=12,
        vocab_size=VOCAB,
        max_seq_len=SEQ,
        init_std=0.3,
        **CONFIGS[case.model],
    )
    num_stages = pp * case.virtual_stages
    per_stage = LAYERS // num_stages
    layers = [range(i * per_stage, (i + 1) * per_stage) for i in range(num_stages)]
    mine = stages_of_rank(SCHEDULES[case.schedule].placement(pp, case.virtual_stages), mesh.pp.rank)
    context = LayerContext(mesh.tp, False, torch.float64, CPU)
    return dict(zip(mine, build_stages(config, layers, mine, context, seed=9), strict=True))


def gradients(stages: dict[int, Stage]) -> dict[str, Tensor]:
    found = {f"{index}:{name}": p.grad for index, stage in stages.items() for name, p in stage.named_parameters()}
    assert all(grad is not None for grad in found.values()), "every parameter has a gradient"
    return {name: grad for name, grad in found.items() if grad is not None}


def run_torch(case: Case, mesh: Any) -> tuple[dict[str, Tensor], float]:
    """(gradients, sum of the losses) of this rank by torch's schedule of the same name."""
    stages = make_stages(case, mesh)
    tokens, labels = make_batch(case)
    pipeline = [
        PipelineStage(TorchStage(stage), index, PP * case.virtual_stages, CPU, group=mesh.pp.process_group)
        for index, stage in stages.items()
    ]
    options = {"n_microbatches": case.num_microbatches, "loss_fn": sum_of_losses, "scale_grads": False}
    schedule: Any
    if case.schedule == "interleaved_1f1b":
        schedule = ScheduleInterleaved1F1B(pipeline, **options)  # type: ignore[arg-type]
    elif SCHEDULES[case.schedule].splits_backward:
        schedule = schedule_of_list(case, pipeline, options)
    else:
        made = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[case.schedule]
        schedule = made(pipeline[0], **options)  # type: ignore[arg-type]
    losses: list[Tensor] = []
    inputs = (tokens,) if 0 in stages else ()
    target = labels if PP * case.virtual_stages - 1 in stages else None
    schedule.step(*inputs, target=target, losses=losses if target is not None else None)
    return gradients(stages), float(sum(loss.item() for loss in losses))


def schedule_of_list(case: Case, pipeline: list[PipelineStage], options: dict[str, Any]) -> Any:
    """torch's runtime with our list, read from the text that we write."""
    ours = build_schedule(case.schedule, PP, case.num_microbatches, case.virtual_stages)
    for stage in pipeline:
        stage.stage_index_to_group_rank = dict(enumerate(ours.placement))
    schedule = _PipelineScheduleRuntime(pipeline, **options)  # type: ignore[arg-type]
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write(write_csv(ours))
        file.flush()
        schedule._load_csv(file.name)
    return schedule


def run_ours(case: Case, mesh: Any) -> tuple[dict[str, Tensor], float]:
    """(gradients, sum of the losses) of this rank by our executor, and nothing left behind in it."""
    stages = make_stages(case, mesh)
    schedule = add_communication(build_schedule(case.schedule, PP, case.num_microbatches, case.virtual_stages))
    validate(schedule, num_stages=PP * case.virtual_stages, num_microbatches=case.num_microbatches)
    transport = P2PTransport(mesh, schedule.placement, HIDDEN, 1, torch.float64, CPU)
    executor = Executor(stages, schedule.actions[mesh.pp.rank], transport, loss_weight=1.0)
    parts = zip(*(t.split(case.micro_batch) for t in make_batch(case)), strict=True)
    executor.run([Microbatch(tokens, labels, i * case.micro_batch) for i, (tokens, labels) in enumerate(parts)])
    kept = (executor._arriving, executor._flights)
    assert not any(kept), "activations and gradients are let go of by the end of the list"
    computed = [action for action in actions_of(executor.actions) if action.is_compute]
    assert [span[0] for span in executor.spans] == computed
    return gradients(stages), float(executor.loss)


def compare_on_rank(case: Case) -> tuple[float, float, int]:
    """Return the largest difference of a gradient, that of the loss, and the number of gradients."""
    mesh = build_mesh(pp=PP, dp=1, cp=1, tp=1, timeout_s=100)
    expected, expected_loss = run_torch(case, mesh)
    got, loss = run_ours(case, mesh)
    dist.barrier()
    assert got.keys() == expected.keys()
    assert all(expected[name].abs().max() > 1e-6 for name in got), "gradients of zero would agree by themselves"
    worst = max(float((got[name] - expected[name]).abs().max()) for name in got)
    mesh.close()
    return worst, abs(loss - expected_loss), len(got)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.schedule}-{case.num_microbatches}-{case.model}")
def test_gradients_equal_those_of_torch_pipelining(case: Case, ranks: RankPool) -> None:
    results = ranks.run(compare_on_rank, PP, case)
    for worst, loss_difference, _ in results:
        assert worst < 1e-11
        assert loss_difference < 1e-10
    # A layer has 7 weights, and in GPT as many biases; llama adds embedding, final norm and head, GPT positions and a
    # bias more.
    assert sum(result[2] for result in results) == {"llama": LAYERS * 7 + 3, "gpt": LAYERS * 14 + 5}[case.model]


def evaluate_on_rank(virtual_stages: int) -> tuple[float, float, int]:
    """(loss of a forward-only list, of a training list, tensors that the forward-only executor still holds)."""
    pp = dist.get_world_size()
    mesh = build_mesh(pp=pp, dp=1, cp=1, tp=1, timeout_s=100)
    case = Case("interleaved_1f1b", virtual_stages, 4, "llama")
    stages = make_stages(case, mesh, pp)
    parts = zip(*(t.split(case.micro_batch) for t in make_batch(case)), strict=True)
    batches = [Microbatch(tokens, labels, i * case.micro_batch) for i, (tokens, labels) in enumerate(parts)]
    placement = round_robin(pp, virtual_stages)
    transport = P2PTransport(mesh, placement, HIDDEN, 1, torch.float64, CPU)
    losses = []
    held = 0
    for schedule in (forward_only(placement, 4), build_schedule("interleaved_1f1b", pp, 4, virtual_stages)):
        with torch.set_grad_enabled(bool(losses)):
            actions = add_communication(schedule).actions[mesh.pp.rank]
            executor = Executor(stages, actions, transport, loss_weight=1.0)
            executor.run(batches)
        losses.append(float(executor.loss))
        if len(losses) == 1:
            held = len(executor._flights) + len(executor._arriving)
    mesh.close()
    return losses[0], losses[1], held


@pytest.mark.parametrize(("pp", "virtual_stages"), [(1, 2), (2, 1), (2, 2)])
def test_evaluation_gives_the_training_loss_and_keeps_no_activation(
    pp: int, virtual_stages: int, ranks: RankPool
) -> None:
    results = ranks.run(evaluate_on_rank, pp, virtual_stages)
    for evaluated, trained, held in results:
        # Not to the bit: where no gradient is kept, a norm is torch's own operator, and rounds otherwise.
        assert evaluated == pytest.approx(trained, rel=1e-14)
        assert held == 0
    assert results[-1][0] > 1.0
