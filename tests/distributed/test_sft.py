"""Answers are learned alike at every layout, micro batch and packing, and with the loss that transformers computes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.parity import GPT, LLAMA, Layout, make_spec, proof_steps
from tests.distributed.ranks import RankPool
from trimaran.runtime.finetune.data.examples import Document, Example
from trimaran.runtime.finetune.data.loader import ExampleLoader
from trimaran.runtime.finetune.data.packing import one_a_row, pack
from trimaran.runtime.finetune.data.records import Origin
from trimaran.runtime.finetune.data.store import ExampleSet, write_split
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.train.train_context import build_train_context, evaluate_losses, train_step

STEPS, EXAMPLES, SEQ, VOCAB = proof_steps(5), 8, 16, 263
# Eight examples in four full rows, otherwise in each step.
LENGTHS = [
    [16, 10, 6, 9, 7, 5, 4, 7],
    [12, 4, 12, 4, 12, 4, 12, 4],
    [16, 16, 3, 2, 5, 6, 8, 8],
    [15, 1, 14, 2, 13, 3, 9, 7],
]


@dataclass(frozen=True)
class Way:
    """A layout with the packing and the micro batch that it trains with, and who optimizes."""

    layout: Layout
    packed: bool
    micro: int = 1
    backend: str = "native"


WAYS = [
    Way(Layout("dp2-zero2", {"dp": 2}, zero_stage=2), packed=True, micro=2),
    Way(Layout("tp2-sp", {"tp": 2, "sequence_parallel": True}), packed=True, micro=4),
    Way(Layout("tp2-pp2-dp2-zero3", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, zero_stage=3), packed=True),
    Way(Layout("pp2-dp2-recompute", {"pp": 2, "dp": 2}, recompute="full"), packed=False, micro=2),
    Way(Layout("tp2-pp2-interleaved", {"tp": 2, "pp": 2, "virtual_stages": 2, "schedule": "zbv"}), packed=True),
    Way(Layout("pp2-zero-bubble-tied", {"pp": 2, "schedule": "zb_h1"}, GPT), packed=True, micro=2),
    Way(Layout("dp2-tied", {"dp": 2}, GPT, zero_stage=0), packed=False),
]


def store(folder: Path, number: int) -> None:
    """Write the examples of a step; which tokens are learned differs between steps, and in number."""
    draw = np.random.default_rng(number)
    examples = []
    for index, length in enumerate(LENGTHS[number % len(LENGTHS)]):
        tokens, learned = draw.integers(VOCAB, size=length), draw.random(length) < 0.2 + 0.15 * number
        examples.append(Example((Document.of(tokens, learned),), Origin("a", index)))
    record = write_split(folder, f"step{number}", "uint16", examples, {"a": 0})
    torch.save(record, folder / f"step{number}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("examples")
    for number in range(STEPS + 1):
        store(found, number)
    return found


def loader_of(folder: Path, number: int, way: Way, dp: tuple[int, int]) -> ExampleLoader:
    record = torch.load(folder / f"step{number}.pt", weights_only=True)
    examples = ExampleSet(folder, f"step{number}", record, "uint16", ["a"])
    rows = pack(examples.example_lengths, SEQ) if way.packed else one_a_row(EXAMPLES)
    assert len(rows) == (EXAMPLES // 2 if way.packed else EXAMPLES)
    sizes = {"seq_len": SEQ, "global_batch_size": len(rows), "micro_batch_size": way.micro}
    sizes["row_multiple"] = SEQ if way.layout.world_size == 1 else 4  # one process pads rows to their end
    return ExampleLoader(examples, rows, dp_rank=dp[0], dp_size=dp[1], seed=5, padding_id=0, **sizes)


def train_on_rank(way: Way, folder: Path) -> dict[str, Any]:
    """Losses and norms of the steps, and the loss of held-out examples after them."""
    spec = make_spec(replace(way.layout, global_batch_size=EXAMPLES // 2 if way.packed else EXAMPLES))
    changed = {
        "train": spec.train.model_copy(update={"micro_batch_size": way.micro}),
        "zero": spec.zero.model_copy(update={"backend": way.backend}),
    }
    spec = spec.model_copy(update=changed)
    parallel = spec.parallel
    sizes = {axis: getattr(parallel, axis) for axis in ("pp", "dp", "cp", "tp", "ep")}
    mesh = build_mesh(**sizes, timeout_s=100, placement=placement_of(spec))
    context = build_train_context(spec, mesh, torch.device("cpu"))
    steps, counts = [], []
    for number in range(STEPS):
        loader = loader_of(folder, number, way, (mesh.dp.rank, mesh.dp.size))
        counts.append(loader.num_losses(0))
        result = train_step(context, loader.microbatches(0), 3e-3, num_losses=counts[-1])
        steps.append([result.loss, result.grad_norm])
    held_out = loader_of(folder, STEPS, way, (mesh.dp.rank, mesh.dp.size))
    loss, _ = evaluate_losses(context, [held_out.microbatches(0)], held_out.num_losses(0))
    mesh.close()
    return {"steps": steps, "counts": counts, "held_out": loss}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.layout.name}-{'packed' if way.packed else 'apart'}")
def test_every_layout_micro_batch_and_packing_learns_like_one_process(way: Way, ranks: RankPool, folder: Path) -> None:
    expected = ranks.alone(train_on_rank, Way(Layout("alone", {}, way.layout.model), packed=False, micro=8), folder)
    assert len(set(expected["counts"])) > 3
    assert len({loss for loss, _ in expected["steps"]}) == STEPS
    for found in ranks.run(train_on_rank, way.layout.world_size, way, folder):
        assert found["counts"] == expected["counts"]
        torch.testing.assert_close(found["steps"], expected["steps"], rtol=0, atol=1e-9)
        torch.testing.assert_close(found["held_out"], expected["held_out"], rtol=0, atol=1e-9)


def losses_here_and_there(folder: Path, packed: bool) -> tuple[float, float, int]:
    """Our loss of a step's examples, that of transformers of the same examples padded, and the answers' tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimaran.models.huggingface.registry import FAMILIES
    from trimaran.models.huggingface.weights import resolve

    way = Way(Layout("alone", {}, LLAMA, global_batch_size=4 if packed else 8), packed)
    spec = make_spec(way.layout)
    mesh = build_mesh(pp=1, dp=1, cp=1, tp=1, timeout_s=100)
    context = build_train_context(spec, mesh, torch.device("cpu"))
    loader = loader_of(folder, 1, way, (0, 1))
    loss, _ = evaluate_losses(context, [loader.microbatches(0)], loader.num_losses(0))
    (stage,) = context.stages.values()
    family = next(each for each in FAMILIES if each.name == "llama")
    ours = dict(stage.named_parameters())
    theirs = {
        name: tensor.detach()
        for unit in resolve(family, spec.transformer)
        for name, tensor in zip(
            unit.theirs, unit.to_theirs([ours[name] for name in unit.ours], spec.transformer), strict=True
        )
    }
    config = {**family.from_config(spec.transformer), "attn_implementation": "eager"}
    peer = LlamaForCausalLM(LlamaConfig(**config)).double()
    peer.load_state_dict(theirs, strict=True)
    mesh.close()
    return loss, *loss_of(peer, loader)


def loss_of(peer: Any, loader: ExampleLoader) -> tuple[float, int]:
    """Loss of transformers' model on right-padded examples, one a row, and the number of its labels."""
    documents = [each.documents[0] for each in loader.examples]
    tokens, labels, mask = (np.full((len(documents), SEQ), value) for value in (0, -100, 0))
    for row, document in enumerate(documents):
        size = len(document.tokens)
        tokens[row, :size], mask[row, :size] = document.tokens, 1
        labels[row, :size] = np.where(document.learned, document.tokens, -100)
    with torch.no_grad():
        out = peer(
            input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), labels=torch.from_numpy(labels)
        )
    return float(out.loss), int((labels != -100).sum())


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_that_of_transformers(packed: bool, ranks: RankPool, folder: Path) -> None:
    ((ours, theirs, count),) = ranks.run(losses_here_and_there, 1, folder, packed)
    assert count > 10
    assert ours == pytest.approx(theirs, rel=1e-6)  # theirs computes the loss in float32
