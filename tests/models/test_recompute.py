"""Recomputed activations, of whole blocks or selected ones, give the same gradients to the bit, and are not kept."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.parity import DROPOUT, GPT, LLAMA, Layout, make_batches, make_spec
from tests.distributed.test_parity import BLOOM, FALCON, GEMMA, OLMO, POST_NORM, UNEVEN
from tests.distributed.test_parity_encoders import BERT, XLNET
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.recompute import Droppable
from trimaran.models.transformer import build_stages, model_dtype

MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt, dropout": GPT | DROPOUT,
    "bloom": BLOOM,
    "falcon": FALCON,
    "gemma": GEMMA,
    "olmo": OLMO,
    "post-norm": POST_NORM,
    "norms of heads": UNEVEN,
    "experts": LLAMA | {"num_experts": 4},
    "bert": BERT,
    "xlnet": XLNET | DROPOUT,
}


def gradients(model: dict[str, Any], dtype: str, recompute: int, *, selective: bool) -> tuple[list[Tensor], list[int]]:
    """(every parameter's gradient, elements of each tensor that was dropped) of a microbatch."""
    spec = make_spec(Layout("one", {}, model, dtype=dtype))
    config, droppable, dropped = spec.transformer, Droppable(is_on=selective), {}
    context = LayerContext(
        single("tp"),
        False,
        model_dtype(dtype),
        torch.device("cpu"),
        recompute=recompute,
        droppable=droppable,
    )
    (stage,) = build_stages(config, [range(config.num_layers)], [0], context, seed=1)
    pack = droppable._pack

    def watched(x: Tensor) -> Any:
        packed = pack(x)
        if not isinstance(packed, Tensor):
            dropped[packed.compute] = x.untyped_storage().nbytes() // x.element_size()
        return packed

    droppable._pack = watched  # type: ignore[method-assign]
    stage(None, make_batches(spec, 0, 0, 1)[0], 1.0).backward()
    return [each.grad for each in stage.parameters() if each.grad is not None], list(dropped.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_equal_to_the_bit(model: str, dtype: str) -> None:
    kept, nothing = gradients(MODELS[model], dtype, 0, selective=False)
    assert len(kept) > 10
    assert nothing == []
    for recompute, selective in ((1, False), (2, True), (0, True)):
        found, dropped = gradients(MODELS[model], dtype, recompute, selective=selective)
        assert len(found) == len(kept)
        assert all(ours.equal(theirs) for ours, theirs in zip(found, kept, strict=True)), (recompute, selective)
        assert bool(dropped) == selective


def test_what_is_dropped() -> None:
    """Two norms and the activation of every layer; with norms of heads, the rotated heads too."""
    rows, layers = 16, LLAMA["num_layers"]
    _, dropped = gradients(LLAMA, "float32", 0, selective=True)
    hidden, inner = rows * LLAMA["hidden_size"], rows * LLAMA["ffn_hidden_size"]
    assert sorted(dropped) == sorted([hidden, hidden, inner] * layers)
    _, dropped = gradients(UNEVEN, "float32", 0, selective=True)
    assert len(dropped) == 5 * UNEVEN["num_layers"]
