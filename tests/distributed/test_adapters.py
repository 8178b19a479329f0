"""Low-rank adapters train like one process at every layout, and the frozen weights take no part in the optimizer."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.parity import GPT, LLAMA, Layout, make_spec
from tests.distributed.ranks import RankPool
from trimaran.models.batch import Microbatch
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.sections.finetune import AdapterSettings, FinetuneSection
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.train.train_context import (
    build_train_context,
    evaluate,
    train_step,
)

STEPS, ROWS, SEQ, VOCAB = 5, 4, 16, 263
ADAPTER: dict[str, Any] = {"rank": 3, "alpha": 9.0, "dropout": 0.2, "scaling": "rslora"}
EXPERTS = LLAMA | {"num_experts": 4, "router_aux_loss": 0.1}
UNEVEN = LLAMA | {"num_heads": 9, "num_kv_heads": 3, "head_dim": 4, "qkv_bias": True}
WIDE = LLAMA | {"hidden_size": 128, "ffn_hidden_size": 256, "num_layers": 2}
SIDE_BY_SIDE = GPT | {"block": "parallel_one_norm", "tie_embeddings": False}

LAYOUTS = [
    Layout("dp2-zero2", {"dp": 2}, zero_stage=2),
    Layout("tp2-sp", {"tp": 2, "sequence_parallel": True}),
    Layout("tp4-whole-kv-heads", {"tp": 4}),
    Layout("tp2-9-heads-over-3", {"tp": 2, "uneven_heads": True}, UNEVEN),
    Layout("tp2-parallel-block", {"tp": 2, "sequence_parallel": True}, SIDE_BY_SIDE),
    Layout("tp2-pp2-dp2-zero3", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, zero_stage=3),
    Layout("pp2-zero-bubble-tied", {"pp": 2, "schedule": "zb_h1"}, GPT),
    Layout("tp2-pp2-recompute", {"tp": 2, "pp": 2}, recompute="full"),
    Layout("pp2-experts", {"pp": 2, "dp": 2, "ep": 2, "virtual_stages": 2, "schedule": "zbv"}, EXPERTS, zero_stage=2),
]


def adapted(layout: Layout, **settings: Any) -> RunSpec:
    """The layout's spec with adapters; those of a model with experts are beside its attention alone."""
    spec = make_spec(layout)
    targets = {"targets": ["attention"]} if "num_experts" in layout.model else {}
    section = FinetuneSection(adapter=AdapterSettings(**(ADAPTER | targets | settings)))
    return spec.model_copy(update={"finetune": section})


def mesh_of(spec: RunSpec) -> Mesh:
    sizes = {axis: getattr(spec.parallel, axis) for axis in ("pp", "dp", "cp", "tp", "ep")}
    return build_mesh(
        **sizes, timeout_s=100, placement=placement_of(spec), tied_embedding=spec.transformer.tie_embeddings
    )


def batches_of(step: int, mesh: Mesh) -> list[Microbatch]:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(VOCAB, (ROWS, SEQ + 1), generator=generator)
    mine = range(mesh.dp.rank * ROWS // mesh.dp.size, (mesh.dp.rank + 1) * ROWS // mesh.dp.size)
    return [Microbatch(rows[i : i + 1, :-1], rows[i : i + 1, 1:], step * ROWS + i) for i in mine]


def train_on_rank(layout: Layout, settings: dict[str, Any]) -> dict[str, Any]:
    """Loss and norm of the steps, the held-out loss after them, and what the optimizer stores."""
    spec = adapted(layout, **settings)
    mesh = mesh_of(spec)
    context = build_train_context(spec, mesh, torch.device("cpu"))
    steps = []
    for step in range(STEPS):
        result = train_step(context, batches_of(step, mesh), 2e-2)
        steps.append([result.loss, result.grad_norm])
    held_out = evaluate(context, [batches_of(99, mesh)])
    stored = {(piece.name, piece.key) for piece in context.optimizer.pieces()}
    state_bytes = context.optimizer.state_bytes()
    mesh.close()
    return {"steps": steps, "held_out": held_out, "stored": stored, "bytes": sum(state_bytes.values())}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_adapters_learn_like_one_process_at_every_layout(layout: Layout, ranks: RankPool) -> None:
    alone = replace(layout, parallel={}, zero_stage=1, recompute="none")
    (expected,) = ranks.run(train_on_rank, 1, alone, {})
    losses, norms = zip(*expected["steps"], strict=True)
    assert len(set(losses)) == STEPS
    assert min(norms) > 0
    found = ranks.run(train_on_rank, layout.world_size, layout, {})
    for each in found:
        torch.testing.assert_close(each["steps"], expected["steps"], rtol=0, atol=1e-9)
        torch.testing.assert_close(each["held_out"], expected["held_out"], rtol=0, atol=1e-9)
    stored = set().union(*(each["stored"] for each in found))
    assert stored == expected["stored"]
    assert all(name.rsplit(".", 1)[0].endswith(".adapter") for name, _ in stored)
