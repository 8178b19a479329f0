"""A run that reads its weights draws none before, and every number of them is read, at any layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.parity import GPT, LLAMA, Layout, make_spec
from tests.distributed.ranks import RankPool
from trimaran.models import adapter as adapter_module
from trimaran.models.parallel import parameter as parameter_module
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.sections.finetune import AdapterSettings, FinetuneSection
from trimaran.runtime.train.init_from import draws_weights, start_from
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.train.state import TrainState, load_state, resume_path, save_state
from trimaran.runtime.train.train_context import build_train_context

SIZES = {"hidden_size": 18, "num_heads": 9, "num_kv_heads": 3, "head_dim": 4}
UNEVEN = LLAMA | SIZES  # of the heads, and of the vocabulary of 263 tokens, a rank of two has padding
LAYOUTS = [
    Layout("tp2-padded", {"tp": 2, "uneven_heads": True}, UNEVEN),
    Layout("tp2-dp2-zero3", {"tp": 2, "dp": 2}, zero_stage=3),
    Layout("pp2-tied", {"pp": 2}, GPT),
]
WAYS: dict[str, dict[str, Any]] = {
    "weights": {},
    "score head": {"method": "reward"},
    "adapters": {"adapter": AdapterSettings(rank=2, targets=["mlp"])},
}


def spec_of(layout: Layout, folder: Path, name: str, way: dict[str, Any] | None) -> RunSpec:
    spec = make_spec(layout)
    head = "only" if way is not None and way.get("method") == "reward" else "none"
    return spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"score_head": head}),
            "finetune": FinetuneSection(**way) if way else None,
            "data": spec.data.model_copy(update={"source": ["examples.jsonl"]}) if way else spec.data,
            "train": spec.train.model_copy(update={"output_dir": str(folder / name)}),
            "checkpoint": spec.checkpoint.model_copy(
                update={"init_from": None if way is None else str(folder / "base"), "resume": True}
            ),
        }
    )


def mesh_of(spec: RunSpec) -> Mesh:
    sizes = {axis: getattr(spec.parallel, axis) for axis in ("pp", "dp", "cp", "tp", "ep")}
    placement = placement_of(spec)
    return build_mesh(**sizes, timeout_s=100, placement=placement, tied_embedding=spec.transformer.ties_head)


def save_drawn(layout: Layout, folder: Path) -> None:
    """Save a checkpoint of drawn weights, by one process."""
    spec = spec_of(layout, folder, "base", None)
    mesh = mesh_of(spec)
    save_state(build_train_context(spec, mesh, torch.device("cpu")), TrainState())
    mesh.close()


def begin(spec: RunSpec, mesh: Mesh, *, draws: bool) -> dict[str, torch.Tensor]:
    """Begin, or resume, a run, whose tensors are NaN until they get numbers; return what its stages and optimizer hold.

    Saves a checkpoint where there is none.
    """
    torch.use_deterministic_algorithms(True)  # with which torch fills new memory by NaN
    try:
        path = resume_path(spec)
        assert not draws_weights(spec, path)
        context = build_train_context(spec, mesh, torch.device("cpu"), draws_weights=draws)
        state = TrainState() if path is None else load_state(context, path)
        context, _ = start_from(context, None, path)
    finally:
        torch.use_deterministic_algorithms(False)
    held = {f"{p.name} {p.key}": p.data.clone() for p in context.optimizer.pieces()}
    for stage in context.stages.values():
        held |= {name: p.detach().clone() for name, p in stage.named_parameters() if p.untyped_storage().nbytes()}
    if path is None:
        save_state(context, state)
    return held


def held_on_rank(layout: Layout, folder: Path, way: dict[str, Any]) -> dict[str, Any]:
    """What a rank holds that draws all weights first, one that draws none, and one that resumes; and names drawn."""
    drawn: list[str] = []
    draw = parameter_module.draw

    def noted(name: str, parameter: torch.nn.Parameter, *, seed: int) -> None:
        drawn.append(name)
        draw(name, parameter, seed=seed)

    spec, other = (spec_of(layout, folder, name, way) for name in ("run", "other"))
    mesh = mesh_of(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_module, "draw", noted)
        patch.setattr(parameter_module, "draw", noted)
        patch.setattr("trimaran.runtime.train.train_context.draw", noted)
        before = begin(other, mesh, draws=True)
        all_drawn = set(drawn)
        drawn.clear()
        found = [begin(spec, mesh, draws=False) for _ in range(2)]
    mesh.close()
    return {"before": before, "found": found, "drawn": drawn, "all drawn": all_drawn}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_weight_is_read_that_is_not_drawn(layout: Layout, way: str, ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(save_drawn, 1, replace(layout, parallel={}, zero_stage=1), tmp_path)
    for each in ranks.run(held_on_rank, layout.world_size, layout, tmp_path, WAYS[way]):
        expected = each["before"]
        assert any(name.startswith("layers.") for name in each["all drawn"])
        assert all(".adapter." in name for name in each["drawn"])
        assert bool(each["drawn"]) == (way == "adapters")
        for found in each["found"]:
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                assert bool(tensor.isfinite().all()), name
                assert torch.equal(tensor, expected[name]), name
