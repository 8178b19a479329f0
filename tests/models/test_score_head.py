"""The score head: what a model has with it, and its numbers."""

import pytest
import torch

from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.transformer import Stage, build_stages, parameter_shapes

SMALL = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "vocab_size": 11, "max_seq_len": 6, "head_bias": True}


def build(**changes: object) -> Stage:
    config = TransformerConfig.model_validate(SMALL | changes)
    context = LayerContext(single("tp"), sequence_parallel=False, dtype=torch.float64, device=torch.device("cpu"))
    (stage,) = build_stages(config, [range(2)], [0], context, seed=3)
    return stage


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "has_score", "has_head"), [("none", 0, 1), ("only", 1, 0), ("beside", 1, 1)])
def test_a_score_head_stands_in_place_of_the_projection_or_beside_it(
    kind: str, has_score: int, has_head: int, tied: bool
) -> None:
    config = TransformerConfig.model_validate(SMALL | {"score_head": kind, "tie_embeddings": tied})
    shapes = parameter_shapes(config)
    assert ("score.weight" in shapes, "head_bias" in shapes) == (bool(has_score), bool(has_head))
    assert ("head.weight" in shapes) == (has_head and not tied)
    assert config.num_parameters() == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert config.head_forward_flops() == 2.0 * 8 * (11 * has_head + has_score)


def test_scores_are_products_of_the_last_states() -> None:
    stage = build(score_head="beside", logits_scale=3.0, logits_softcap=1.0)
    hidden = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert stage.score is not None
    found = stage.scores(hidden, torch.tensor([11, 0, 5]))
    rows = torch.stack([hidden[1, 5], hidden[0, 0], hidden[0, 5]])
    torch.testing.assert_close(found, rows @ stage.score.weight[0], rtol=0, atol=1e-14)
    assert 0.1 < stage.score.weight.std() * 3 < 2.5  # drawn, with a deviation of 1 / 3


def test_the_weights_beside_a_score_head_are_those_without_it() -> None:
    scored, plain = dict(build(score_head="only").named_parameters()), dict(build().named_parameters())
    assert scored.keys() - plain.keys() == {"score.weight"}
    assert plain.keys() - scored.keys() == {"head.weight", "head_bias"}
    assert all(torch.equal(scored[name], plain[name]) for name in scored.keys() & plain.keys())


def test_encoders_have_no_score_head() -> None:
    with pytest.raises(ValueError, match="a score head reads a text from its end"):
        TransformerConfig.model_validate(SMALL | {"score_head": "only", "objective": "masked_lm"})
