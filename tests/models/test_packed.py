"""Packed weights give the products of plain ones, and are left aside once the weight has changed."""

from typing import Any

import pytest
import torch

from trimaran.models.cache.rows import RowCache
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.group import single
from trimaran.models.parallel.packed import pack, packed_product, unpack
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.transformer import Stage, build_stages, in_eval_mode

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 67, "max_seq_len": 16}


@pytest.mark.parametrize("shape", [(7, 5), (2, 9, 5)], ids=str)
@pytest.mark.parametrize("rows", [(3,), (2, 4), (1, 300)], ids=str)
def test_a_product_is_that_of_the_plain_weight(shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = (torch.randn(each, generator=generator) for each in (shape, (*rows, 5)))
    bias = torch.randn(shape[:-1], generator=generator)
    assert packed_product(x, weight, None) is None
    assert pack(weight)
    expected = x @ weight.flatten(0, -2).t()
    torch.testing.assert_close(packed_product(x, weight, None), expected)
    torch.testing.assert_close(packed_product(x, weight, bias), expected + bias.flatten())
    kept = dict(vars(weight))
    assert pack(weight)
    assert vars(weight) == kept  # what is packed already stays so
    weight += 1
    assert packed_product(x, weight, None) is None
    assert pack(weight)
    unpack(weight)
    assert packed_product(x, weight, None) is None


def test_nothing_is_packed_in_another_precision() -> None:
    assert not pack(torch.zeros(3, 4, dtype=torch.float64))
    assert not pack(torch.zeros(3, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "model", [{}, {"tie_embeddings": False, "bias": True, "activation": "gelu", "norm": "layernorm"}], ids=str
)
def test_a_stage_says_the_same_with_packed_weights_until_they_change(model: dict[str, Any]) -> None:
    config = TransformerConfig.model_validate(SHAPE | {"tie_embeddings": True} | model)
    context = LayerContext(single("tp"), False, torch.float32, torch.device("cpu"))
    (stage,) = build_stages(config, [range(2)], [0], context, seed=1)
    plain = logits_of(stage)
    assert stage.pack_weights()
    assert packed_weights(stage) == 5 * 2 + 1  # queries, keys with values, output, and two of the mlp; the head
    found = logits_of(stage)
    torch.testing.assert_close(found, plain)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.mul_(2)
    assert packed_weights(stage) == 0
    assert not torch.allclose(logits_of(stage), plain, rtol=1e-3)


def packed_weights(stage: Stage) -> int:
    """How many weights have a copy that is used."""
    weights = [each for each in stage.parameters() if each.ndim > 1]
    return sum(packed_product(torch.zeros(2, each.shape[-1]), each, None) is not None for each in weights)


def logits_of(stage: Stage) -> torch.Tensor:
    cache = RowCache(4, 16, stage.config, stage.context)
    tokens = torch.arange(20).view(4, 5)
    with torch.inference_mode(), in_eval_mode([stage]):
        stage.extend(None, tokens[:, :4], cache.view(0, [4] * 4))
        found: torch.Tensor = stage.logits(stage.extend(None, tokens[:, 4:], cache.view(0, [5] * 4)))
    return found
