"""Low-rank adapters train like one process at every layout, and the frozen weights take no part in the optimizer."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.parity import GPT, LLAMA, Layout, make_spec, proof_steps
from tests.distributed.ranks import RankPool
from trimaran.models.adapter import AdapterPlan, quantized_weights
from trimaran.models.batch import Microbatch
from trimaran.models.parallel.parameter import info_of
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.sections.finetune import AdapterSettings, FinetuneSection
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.train.train_context import (
    adapter_plan,
    build_stages_of_rank,
    build_train_context,
    evaluate,
    train_step,
)

USUAL_STEPS, ROWS, SEQ, VOCAB = 5, 4, 16, 263
STEPS = proof_steps(USUAL_STEPS)
# Rounding grows with the steps while the weights move: 1.3e-8 of a norm after 20, where losses still agree to 1e-9.
NORMS_RTOL = 1e-9 if STEPS == USUAL_STEPS else 1e-7
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
    expected = ranks.alone(train_on_rank, Layout("alone", {}, layout.model), {})
    losses, norms = zip(*expected["steps"], strict=True)
    assert len(set(losses)) == STEPS
    assert min(norms) > 0
    found = ranks.run(train_on_rank, layout.world_size, layout, {})
    for each in found:
        mine = tuple(zip(*each["steps"], strict=True))
        torch.testing.assert_close(mine[0], losses, rtol=0, atol=1e-9)
        torch.testing.assert_close(mine[1], norms, rtol=NORMS_RTOL, atol=0)  # norms grow too, to some 18 at 20
        torch.testing.assert_close(each["held_out"], expected["held_out"], rtol=0, atol=1e-9)
    stored = set().union(*(each["stored"] for each in found))
    assert stored == expected["stored"]
    assert all(name.rsplit(".", 1)[0].endswith(".adapter") for name, _ in stored)


def stages_of(spec: RunSpec, mesh: Mesh, plan: AdapterPlan | None) -> Any:
    (stage,) = build_stages_of_rank(spec, mesh, torch.device("cpu"), adapters=plan).values()
    return stage


def merged_and_apart(model: dict[str, Any], base: str) -> dict[str, Any]:
    """Loss and gradients of adapters beside frozen weights, and of the whole weights that they make together."""
    spec = adapted(Layout("alone", {}, model), dropout=0.0)
    mesh = mesh_of(spec)
    plan = adapter_plan(spec)
    assert plan is not None
    stage = stages_of(spec, mesh, replace(plan, is_quantized=base == "nf4"))
    adapters = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapters.items():
            if name.endswith(".b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    whole = stages_of(spec, mesh, None)
    scale = plan.options.scale
    held = dict(quantized_weights(stage))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            layer = name.removesuffix(".weight")
            if name in held:
                parameter.copy_(held[name].dense())
            if f"{layer}.adapter.a" in adapters:
                parameter.add_(scale * adapters[f"{layer}.adapter.b"] @ adapters[f"{layer}.adapter.a"])
    (batch, *_) = batches_of(0, mesh)
    losses = [each(None, batch) for each in (stage, whole)]
    for loss in losses:
        loss.backward()
    expected: dict[str, Tensor] = {}
    for name, parameter in whole.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.adapter.a" in adapters:
            a, b = (adapters[f"{layer}.adapter.{each}"].detach() for each in ("a", "b"))
            expected[f"{layer}.adapter.a"] = scale * b.transpose(-1, -2) @ parameter.grad
            expected[f"{layer}.adapter.b"] = scale * parameter.grad @ a.transpose(-1, -2)
    frozen = [name for name, parameter in stage.named_parameters() if parameter.grad is not None]
    mesh.close()
    return {
        "losses": [loss.item() for loss in losses],
        "found": {name: parameter.grad for name, parameter in adapters.items()},
        "expected": expected,
        "with gradients": frozen,
        "in 4 bits": len(held),
    }


@pytest.mark.parametrize(
    ("model", "base", "in_4_bits"),
    [(LLAMA, "full", 0), (SIDE_BY_SIDE, "full", 0), (LLAMA, "nf4", 20), (EXPERTS, "full", 0)],
    ids=["llama", "parallel-block", "nf4", "experts"],
)
def test_loss_and_gradients_are_those_of_the_merged_weights(
    model: dict[str, Any], base: str, in_4_bits: int, ranks: RankPool
) -> None:
    (found,) = ranks.run(merged_and_apart, 1, model, base)
    assert found["in 4 bits"] == in_4_bits
    apart, merged = found["losses"]
    assert apart == pytest.approx(merged, abs=1e-9)
    assert found["found"].keys() == found["expected"].keys()
    assert found["with gradients"] == list(found["found"])
    torch.testing.assert_close(found["found"], found["expected"], rtol=1e-9, atol=1e-9)


def quantized_on_rank(parallel: dict[str, Any]) -> dict[str, Any]:
    """The codes and scales of this rank's weights in 4 bits with their places, and the losses of float32 steps."""
    spec = adapted(Layout("nf4", parallel, WIDE, dtype="float32"), base="nf4")
    mesh = mesh_of(spec)
    context = build_train_context(spec, mesh, torch.device("cpu"))
    held = [item for stage in context.stages.values() for item in quantized_weights(stage)]
    found = {name: (weight.dense(), weight.info.shard.box(weight.shape), weight.num_bytes) for name, weight in held}
    losses = [train_step(context, batches_of(step, mesh), 2e-2).loss for step in range(3)]
    mesh.close()
    return {"weights": found, "losses": losses}


def test_a_cut_base_in_4_bits_has_the_bits_of_one_process(ranks: RankPool) -> None:
    (whole,) = ranks.run(quantized_on_rank, 1, {})
    assert len(whole["weights"]) == 5 * 2
    parts = ranks.run(quantized_on_rank, 2, {"tp": 2, "sequence_parallel": True})
    cut = 0
    for part in parts:
        for name, (weight, box, num_bytes) in part["weights"].items():
            expected, _, all_bytes = whole["weights"][name]
            expected = expected[tuple(slice(low, high) for low, high in box)]
            assert torch.equal(weight, expected)
            assert num_bytes * weight.element_size() < 0.6 * weight.nbytes
            cut += num_bytes < all_bytes
        assert part["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert cut == 2 * 5 * 2
    assert len(set(whole["losses"])) == 3


def frozen_on_rank(zero_stage: int) -> dict[str, Any]:
    """What a rank of two holds, and whether a step changed a frozen weight."""
    spec = adapted(Layout("frozen", {"dp": 2}, WIDE, zero_stage=zero_stage))
    mesh = mesh_of(spec)
    context = build_train_context(spec, mesh, torch.device("cpu"))
    (stage,) = context.stages.values()
    frozen = {name: p.detach().clone() for name, p in stage.named_parameters() if not p.requires_grad}
    train_step(context, batches_of(0, mesh), 2e-2)
    changed = [name for name, p in stage.named_parameters() if name in frozen and not torch.equal(p, frozen[name])]
    buffers = [name for name, p in stage.named_parameters() if name in frozen and info_of(p).main_grad is not None]
    state = context.optimizer.state_bytes()
    mesh.close()
    return {"changed": changed, "buffers": buffers, "frozen": len(frozen), "state": state}


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_frozen_weights_have_no_gradient_buffer_and_no_place_in_zero(zero_stage: int, ranks: RankPool) -> None:
    for found in ranks.run(frozen_on_rank, 2, zero_stage):
        assert found["frozen"] == 2 * 7 + 3
        assert found["changed"] == []
        assert found["buffers"] == []
        # A: rank x in, B: out x rank; q, k, v, out, gate, up and down of two layers, in float64.
        kv = 64
        elements = 2 * 3 * (128 + 128 + 2 * (128 + kv) + 128 + 128 + 3 * (128 + 256))
        share = 1 if zero_stage == 0 else 2
        assert found["state"]["optimizer"] == pytest.approx(2 * 8 * elements / share, abs=64)
