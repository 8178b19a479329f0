"""A loss of single tokens' log-probabilities, and rows of packed documents, train like one process at every layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.distributed.parity import GPT, LLAMA, Layout, make_spec, proof_steps
from tests.distributed.ranks import RankPool
from trimaran.kernels.attention import Documents
from trimaran.models.batch import Microbatch
from trimaran.models.criterion import Head
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.train.train_context import TrainContext, build_train_context, evaluate_losses, train_step

STEPS, ROWS, SEQ, VOCAB = proof_steps(5), 4, 16, 263
SPLIT = (6, 5, 5)  # a prompt with two answers, chosen and rejected, and padding
GEMMA = LLAMA | {"logits_softcap": 5.0, "head_bias": True, "num_experts": 4, "router_aux_loss": 0.1}

LAYOUTS = [
    Layout("dp2-zero2", {"dp": 2}, zero_stage=2),
    Layout("tp2-sp", {"tp": 2, "sequence_parallel": True}),
    Layout("tp2-pp2-dp2-zero3", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, zero_stage=3),
    Layout("pp2-zero-bubble-tied", {"pp": 2, "schedule": "zb_h1"}, GPT),
    Layout(
        "pp2-interleaved-experts-softcap", {"pp": 2, "dp": 2, "ep": 2, "virtual_stages": 2, "schedule": "zbv"}, GEMMA
    ),
    Layout("tp2-pp2-recompute", {"tp": 2, "pp": 2}, GEMMA, recompute="full"),
]


@dataclass
class Preference:
    """The second document of a row should be likelier than the third, as in DPO without a reference."""

    names: Sequence[str] = ("accuracy",)
    correct: float = 0.0

    def __call__(self, head: Head, hidden: Tensor, batch: Microbatch) -> Tensor:
        found = head.token_log_probs(hidden, batch, temperature=0.7)
        _, chosen, rejected = found.split(SPLIT, dim=1)
        margin = chosen.sum(1) - rejected.sum(1)
        self.correct += float((margin > 0).sum())
        return -F.logsigmoid(0.3 * margin).sum()

    def take_sums(self) -> Tensor:
        correct, self.correct = self.correct, 0.0
        return torch.tensor([correct], dtype=torch.float64)


def batches_of(step: int, dp_rank: int, dp_size: int, micro: int = 1) -> list[Microbatch]:
    """The dp rank's microbatches: rows of three documents; the first has no labels."""
    generator = torch.Generator().manual_seed(step)
    tokens, labels = (torch.randint(VOCAB, (ROWS, SEQ), generator=generator) for _ in range(2))
    labels[:, : SPLIT[0]] = -100
    positions = torch.cat([torch.arange(length) for length in SPLIT]).expand(ROWS, SEQ)
    mine = range(dp_rank * ROWS // dp_size, (dp_rank + 1) * ROWS // dp_size, micro)
    starts = torch.tensor([0, *SPLIT * micro], dtype=torch.int32).cumsum(0).to(torch.int32)
    return [
        Microbatch(
            tokens[i : i + micro],
            labels[i : i + micro],
            step * ROWS + i,
            documents=Documents(starts, max(SPLIT)),
            positions=positions[i : i + micro],
        )
        for i in mine
    ]


def train_on_rank(layout: Layout, micro: int) -> dict[str, Any]:
    """Losses, norms and statistics of the steps, and of held-out rows after them."""
    spec = make_spec(layout)
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"micro_batch_size": micro})})
    parallel = spec.parallel
    sizes = {axis: getattr(parallel, axis) for axis in ("pp", "dp", "cp", "tp", "ep")}
    mesh = build_mesh(**sizes, timeout_s=100, placement=placement_of(spec))
    context = build_train_context(spec, mesh, torch.device("cpu"), criterion=Preference())
    found = [step_result(context, batches_of(step, mesh.dp.rank, mesh.dp.size, micro)) for step in range(STEPS)]
    held_out, statistics = evaluate_losses(context, [batches_of(99, mesh.dp.rank, mesh.dp.size, micro)], ROWS)
    mesh.close()
    return {"steps": found, "held_out": [held_out, statistics["accuracy"]]}


def step_result(context: TrainContext, batches: Sequence[Microbatch]) -> list[float]:
    result = train_step(context, batches, 3e-3, num_losses=ROWS)
    return [result.loss, result.grad_norm, result.statistics["accuracy"]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_learns_preferences_like_one_process(layout: Layout, ranks: RankPool) -> None:
    expected = ranks.alone(train_on_rank, Layout("alone", {}, layout.model), 2)
    assert len({loss for loss, *_ in expected["steps"]}) == STEPS
    for found in ranks.run(train_on_rank, layout.world_size, layout, 1):
        torch.testing.assert_close(found["steps"], expected["steps"], rtol=0, atol=1e-9)
        torch.testing.assert_close(found["held_out"], expected["held_out"], rtol=0, atol=1e-9)


def gradients_of(model: dict[str, Any], batches: Sequence[Microbatch], num_losses: int) -> list[Tensor]:
    """The loss and all gradients of one process."""
    mesh = build_mesh(pp=1, dp=1, cp=1, tp=1, timeout_s=100)
    context = build_train_context(make_spec(Layout("alone", {}, model)), mesh, torch.device("cpu"))
    (stage,) = context.stages.values()
    loss = sum((stage(None, batch) for batch in batches), torch.zeros((), dtype=torch.float64)) / num_losses
    parameters = list(stage.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    mesh.close()
    return [loss.detach(), *(torch.zeros(1) if each is None else each for each in gradients)]


WINDOW_ALIBI = LLAMA | {"position": "alibi", "attention_window": 3}


def packed_and_apart(model: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    packed = batches_of(0, 0, 1, ROWS)
    apart = [
        Microbatch(tokens, labels, 0)
        for batch in packed
        for tokens, labels in zip(batch.tokens.split(SPLIT, 1), batch.labels.split(SPLIT, 1), strict=True)
    ]
    # All gradients are in .grad here: no optimizer has given the parameters a buffer.
    return gradients_of(model, packed, 7), gradients_of(model, apart, 7)


@pytest.mark.parametrize(
    "model", [LLAMA, GPT, WINDOW_ALIBI, GEMMA | {"attention_softcap": 2.0, "router_aux_loss": 0.0}]
)
def test_packed_documents_have_the_loss_and_gradients_of_documents_apart(
    model: dict[str, Any], ranks: RankPool
) -> None:
    ((packed, apart),) = ranks.run(packed_and_apart, 1, model)
    assert len(packed) > 10
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-12)
