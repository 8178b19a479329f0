"""Weight maps: forms and their inverses, units that cover the model once, and files that lack or have too much."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface import FAMILIES, Family, family_of, locate, resolve
from trimaran.models.huggingface.forms import (
    FUSED_QKV,
    FUSED_QKV_BY_GROUP,
    FUSED_QKV_TRANSPOSED,
    GATED_EXPERTS,
    PLUS_ONE,
    SAME,
    STACKED,
    TRANSPOSED,
    TWO_ROWS_FEWER,
    Form,
)
from trimaran.models.transformer import parameter_shapes

DECODERS = [family for family in FAMILIES if family.to_config({}).get("objective", "causal_lm") == "causal_lm"]
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 6, 2, 4, 20
CONFIG = TransformerConfig(
    num_layers=1,
    hidden_size=HIDDEN,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    vocab_size=7,
    max_seq_len=8,
)
QUERIES, KEYS = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
FUSED = QUERIES + 2 * KEYS


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


FORMS: list[tuple[Form, list[tuple[int, ...]], list[tuple[int, ...]]]] = [
    (SAME, [(5, 3)], [(5, 3)]),
    (TRANSPOSED, [(5, 3)], [(3, 5)]),
    (TRANSPOSED, [(5,)], [(5,)]),
    (STACKED, [(5, 3), (5, 3)], [(2, 5, 3)]),
    (STACKED, [(5, 3)] * 4, [(4, 5, 3)]),
    (FUSED_QKV, [(FUSED, HIDDEN)], [(QUERIES, HIDDEN), (2, KEYS, HIDDEN)]),
    (FUSED_QKV_TRANSPOSED, [(HIDDEN, FUSED)], [(QUERIES, HIDDEN), (2, KEYS, HIDDEN)]),
    (FUSED_QKV_TRANSPOSED, [(FUSED,)], [(QUERIES,), (2, KEYS)]),
    (FUSED_QKV_BY_GROUP, [(FUSED, HIDDEN)], [(QUERIES, HIDDEN), (2, KEYS, HIDDEN)]),
    (FUSED_QKV_BY_GROUP, [(FUSED,)], [(QUERIES,), (2, KEYS)]),
    (PLUS_ONE, [(5,)], [(5,)]),
    (TWO_ROWS_FEWER, [(10, HIDDEN)], [(8, HIDDEN)]),
    (GATED_EXPERTS, [(5, 3)] * 6, [(3, 2, 5, 3)]),
]


@pytest.mark.parametrize(
    ("form", "theirs", "ours"), FORMS, ids=[f"{form.name}-{len(theirs[0])}d-{len(theirs)}" for form, theirs, _ in FORMS]
)
def test_a_form_and_its_inverse(form: Form, theirs: list[tuple[int, ...]], ours: list[tuple[int, ...]]) -> None:
    tensors = [numbered(*shape) + 1000 * number for number, shape in enumerate(theirs)]
    if form is TWO_ROWS_FEWER:
        tensors[0][:2] = 0.0
    made = form.to_ours(tensors, CONFIG)
    assert [tuple(tensor.shape) for tensor in made] == ours
    again = form.to_theirs(made, CONFIG)
    assert all(torch.equal(first, second) for first, second in zip(again, tensors, strict=True))
    if form is not PLUS_ONE:  # nothing is made up or lost on the way
        kept = torch.cat([tensor.flatten() for tensor in tensors])[2 * HIDDEN if form is TWO_ROWS_FEWER else 0 :]
        assert torch.equal(torch.cat([tensor.flatten() for tensor in made]).sort().values, kept.sort().values)


def test_grouped_rows_are_each_groups_queries_then_its_key_then_its_value() -> None:
    (q, kv) = FUSED_QKV_BY_GROUP.to_ours([numbered(FUSED)], CONFIG)
    rows = numbered(FUSED).view(KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM)
    for head in range(HEADS):
        assert torch.equal(q.view(HEADS, HEAD_DIM)[head], rows[head // 3, head % 3])
    for group in range(KV_HEADS):
        assert torch.equal(kv.view(2, KV_HEADS, HEAD_DIM)[:, group], rows[group, 3:])


def test_plus_one_is_taken_in_float32_whatever_is_stored() -> None:
    weight = torch.tensor([0.00390625, 1e-3, -0.75], dtype=torch.bfloat16)
    (ours,) = PLUS_ONE.to_ours([weight], CONFIG)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, 1 + weight.float())
    (theirs,) = PLUS_ONE.to_theirs([ours], CONFIG)
    assert torch.equal(theirs.bfloat16(), weight)


def small(of: Family) -> TransformerConfig:
    """A model of the family of three layers and odd sizes; what a family fixes stays."""
    values = of.to_config({})
    changes: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 24,
        "num_heads": 4,
        "vocab_size": 61,
        "ffn_hidden_size": 44,
        "max_seq_len": 32,
    }
    changes |= {"num_kv_heads": min(4, values["num_kv_heads"])} if "num_kv_heads" in values else {}
    dropped = ("head_dim", "rotary_dim", "attention_pattern", "attention_window")
    return TransformerConfig.model_validate(
        {name: value for name, value in {**values, **changes}.items() if name not in dropped}
    )


@pytest.mark.parametrize("of", DECODERS, ids=lambda of: of.name)
def test_every_parameter_is_in_one_unit_and_every_tensor_in_one(of: Family) -> None:
    config = small(of)
    units, shapes = resolve(of, config), parameter_shapes(config)
    assert sorted(name for unit in units for name in unit.ours) == sorted(shapes)
    theirs = [name for unit in units for name in unit.theirs]
    assert len(set(theirs)) == len(theirs)
    for unit in units:
        assert unit.our_shapes == tuple(shapes[name] for name in unit.ours)
        sizes = [
            sum(torch.Size(shape).numel() for shape in side) for side in (unit.their_shapes(config), unit.our_shapes)
        ]
        assert sizes[0] == sizes[1] + (2 * config.hidden_size if unit.form is TWO_ROWS_FEWER else 0)
    places = {name: context for context, name in enumerate(shapes)}
    firsts = [places[unit.ours[0]] for unit in units]
    assert firsts == sorted(firsts), "units come in the order of the network"


def test_falcon_40b_streams_in_units_of_one_matrix() -> None:
    falcon = family_of({"model_type": "falcon"})
    hf = {
        "hidden_size": 8192,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
    }
    config = TransformerConfig.model_validate(falcon.to_config(hf))
    units = resolve(falcon, config)
    assert len(units) == 60 * 8 + 3
    largest = max(sum(torch.Size(shape).numel() for shape in unit.our_shapes) for unit in units)
    assert largest == 65024 * 8192
    assert sum(torch.Size(shape).numel() for unit in units for shape in unit.our_shapes) == config.num_parameters()


def names_of(name: str, **hf: Any) -> tuple[Family, list[Any], list[str]]:
    of = family_of({"model_type": name})
    config = TransformerConfig.model_validate(of.to_config({"num_hidden_layers": 2, **hf}))
    units = resolve(of, config)
    return of, units, [theirs for unit in units for theirs in unit.theirs]


def test_names_without_the_networks_prefix_and_buffers_that_are_no_weights() -> None:
    """As OpenAI's and BigScience's files are: the network without its head, and the causal mask beside the weights."""
    of, units, names = names_of("gpt2")
    bare = [name.removeprefix("transformer.") for name in names]
    found = locate(of, units, [*bare, "h.0.attn.bias", "h.1.attn.masked_bias"])
    assert found.names == dict(zip(names, bare, strict=True))
    assert found.spare_head is None


def test_an_old_name_of_the_head() -> None:
    of, units, names = names_of("gpt_neox")
    found = locate(
        of,
        units,
        [name.replace("embed_out", "lm_head") for name in names] + ["gpt_neox.layers.0.attention.rotary_emb.inv_freq"],
    )
    assert found.names["embed_out.weight"] == "lm_head.weight"
    with pytest.raises(ValueError, match=r"the weights have embed_out.weight and the same tensor under another name"):
        locate(of, units, [*names, "lm_head.weight"])


def test_a_head_that_is_stored_beside_its_tied_embedding() -> None:
    of, units, names = names_of("falcon")
    assert "lm_head.weight" not in names
    assert locate(of, units, [*names, "lm_head.weight"]).spare_head == "lm_head.weight"
    assert locate(of, units, names).spare_head is None
    without = ["lm_head.weight" if name == "transformer.word_embeddings.weight" else name for name in names]
    found = locate(of, units, without)
    assert (found.names["transformer.word_embeddings.weight"], found.spare_head) == ("lm_head.weight", None)


def test_missing_tensors_are_named() -> None:
    of, units, names = names_of("llama")
    with pytest.raises(ValueError, match=r"the weights lack lm_head.weight, which a llama model of this config has"):
        locate(of, units, [name for name in names if name != "lm_head.weight"])
    with pytest.raises(
        ValueError,
        match=r"the weights lack model.layers.1.\S+, model.layers.1.\S+, model.layers.1.\S+ and 6 more, which",
    ):
        locate(of, units, [name for name in names if not name.startswith("model.layers.1.")])


def test_tensors_without_a_place_are_named() -> None:
    of, units, names = names_of("llama")
    biases = [f"model.layers.{i}.self_attn.q_proj.bias" for i in range(2)]
    with pytest.raises(
        ValueError,
        match=r"the weights have model.layers.0.self_attn.q_proj.bias, .* "
        r"which a llama model of this config has no place for",
    ):
        locate(of, units, [*names, *biases])


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    of, units, _ = names_of("gpt2", n_embd=48, n_layer=2)
    config = TransformerConfig.model_validate(of.to_config({"n_embd": 48, "n_layer": 2}))
    unit = next(unit for unit in units if "c_attn.weight" in unit.theirs[0])
    with pytest.raises(
        ValueError,
        match=r"tensor transformer.h.0.attn.c_attn.weight has shape \(144, 48\), and the config asks for \(48, 144\)",
    ):
        unit.to_ours([torch.zeros(144, 48)], config)


def test_a_family_without_a_tensor_for_a_parameter_says_so() -> None:
    llama = family_of({"model_type": "llama"})
    config = TransformerConfig.model_validate({**llama.to_config({"num_hidden_layers": 2}), "query_key_norm": "head"})
    with pytest.raises(
        ValueError,
        match=r"LlamaForCausalLM has no tensor for layers.0.attention.q_norm.weight, layers.0.attention.k_norm.weight",
    ):
        resolve(llama, config)
