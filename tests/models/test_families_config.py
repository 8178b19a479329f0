"""Every option of transformers' config classes is read, refused or known as harmless; old and new spellings agree."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface import FAMILIES, Family, family_for, family_of
from trimaran.models.huggingface.family import canonical_config
from trimaran.models.huggingface.options import COMMON
from trimaran.models.presets import PRESETS, preset

ROOT = Path(__file__).parents[2]


def family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def config_class(of: Family) -> Any:
    return CONFIG_MAPPING[of.model_types[0]]


def config_of(name: str, **hf: Any) -> TransformerConfig:
    return TransformerConfig.model_validate(family(name).to_config(hf))


@pytest.mark.parametrize("of", FAMILIES, ids=lambda of: of.name)
def test_every_option_of_the_config_class_belongs_to_the_map(of: Family) -> None:
    """A field that transformers adds to a class fails here until somebody has looked at what it does."""
    known = {key for option in (*COMMON, *of.options) for key in option.keys} | of.aliases.keys()
    base = PreTrainedConfig.__dataclass_fields__.keys()
    fields = {name for name in config_class(of).__dataclass_fields__ if name not in base}
    assert fields - known == set()


@pytest.mark.parametrize("of", FAMILIES, ids=lambda of: of.name)
def test_the_defaults_are_those_of_the_config_class(of: Family) -> None:
    fields = config_class(of).__dataclass_fields__
    given = {name: fields[name].default for name in of.defaults if name in fields}
    assert given == {name: of.defaults[name] for name in given}
    told = json.loads(config_class(of)().to_json_string(use_diff=False))
    nothing, everything = (TransformerConfig.model_validate(of.to_config(hf)) for hf in ({}, told))
    assert nothing == everything


@pytest.mark.parametrize("of", FAMILIES, ids=lambda of: of.name)
def test_a_config_is_the_same_after_the_way_there_and_back(of: Family) -> None:
    config = TransformerConfig.model_validate(of.to_config({}))
    written = of.from_config(config)
    assert of.from_config(TransformerConfig.model_validate(of.to_config(written))) == written
    assert (written["model_type"], written["architectures"]) == (of.model_types[0], [of.architecture])
    assert type(
        config_class(of)(**{name: value for name, value in written.items() if name != "model_type"})
    ) is config_class(of)
    json.dumps(written)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx true is not supported; this runtime has false",
    ),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention true is not supported; this runtime has false"),
    (
        "gpt2",
        {"activation_function": "quick_gelu"},
        "activation_function 'quick_gelu' is not supported; this runtime has 'gelu', ",
    ),
    ("gpt2", {"activation_function": ["gelu"]}, "activation_function ['gelu'] is not supported"),
    ("gpt2", {"n_embd": 64, "hidden_size": 32}, "n_embd has two values, 64 and 32, one of them under an older name"),
    ("gptj", {"rotary_dim": None}, "rotary_dim null is not supported; this runtime has a number of rotated dims"),
    (
        "gpt_neo",
        {"attention_types": [[["flash"], 24]]},
        "attention_types 'flash' is not supported; this runtime has 'global' or 'local'",
    ),
    ("gpt_neo", {"attention_types": [[["global"], 23]]}, "attention_types names 23 layers, and num_layers is 24"),
    (
        "falcon",
        {"new_decoder_architecture": True, "parallel_attn": False},
        "new_decoder_architecture true with parallel_attn false",
    ),
    (
        "falcon",
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3},
        "num_ln_in_parallel_attn 3 is not supported; this runtime has 1 or 2",
    ),
    (
        "falcon",
        {"num_ln_in_parallel_attn": 2},
        "num_ln_in_parallel_attn 2 with new_decoder_architecture false is not supported",
    ),
    (
        "falcon",
        {"multi_query": False, "num_kv_heads": 8},
        "num_kv_heads 8 with new_decoder_architecture and multi_query false is not supported",
    ),
    (
        "llama",
        {"quantization_config": {"bits": 4}},
        "quantization_config {'bits': 4} is not supported; this runtime has null",
    ),
    ("llama", {"is_causal": False}, "is_causal false is not supported; this runtime has true"),
    (
        "llama",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor 0.5 is not supported; the heads of this family turn whole",
    ),
    (
        "llama",
        {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        "rope_type 'longrope' is not supported; this runtime has 'default', 'linear'",
    ),
    (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
        "truncate false of rope_type 'yarn' is not supported",
    ),
    (
        "llama",
        {"rope_scaling": [2.0]},
        "rope_scaling [2.0] is not supported; this runtime has an object with a rope_type",
    ),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling of rope_type 'linear' lack factor"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "of rope_type 'llama3' lack low_freq_factor or high_freq_factor",
    ),
    (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        "rope_parameters for full_attention layers are not supported",
    ),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not supported; this runtime has 0.0"),
    (
        "qwen2",
        {"layer_types": ["linear_attention"] * 32},
        "layer_types 'linear_attention' is not supported; this runtime has 'sliding_attention' or",
    ),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, and num_hidden_layers is 32"),
    (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 32},
        "layer_types has layers with sliding_attention, and use_sliding_window is false",
    ),
    (
        "gemma",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention true is not supported; this runtime has false",
    ),
    ("gemma2", {"sliding_window": None}, "layer_types has layers with sliding_attention, and sliding_window is null"),
    ("olmo", {"clip_qkv": 8.0}, "clip_qkv 8 is not supported; this runtime has null"),
    (
        "bloom",
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm true is not supported",
    ),
    (
        "opt",
        {"word_embed_proj_dim": 512, "hidden_size": 1024},
        "word_embed_proj_dim 512 is not supported; this runtime has embeddings of hidden_size (1024)",
    ),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm true is not supported"),
    ("opt", {"layerdrop": 0.1}, "layerdrop 0.1 is not supported; this runtime has 0.0"),
    ("palm", {"use_qk_norm": True}, "use_qk_norm true is not supported; this runtime has false"),
]


@pytest.mark.parametrize(
    ("name", "hf", "sentence"), REFUSED, ids=[f"{name}-{next(iter(hf))}" for name, hf, _ in REFUSED]
)
def test_an_option_that_we_do_not_have_is_refused_with_its_value(name: str, hf: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is compared
        family(name).to_config(hf)
    assert str(caught.value).startswith(f"{name}: {sentence}") or sentence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hf", "text", "words"),
    [
        ("gpt2", {"n_embd": 30, "n_head": 4}, "hidden_size (30), num_heads (4)", "n_embd (30), n_head (4)"),
        ("falcon", {"num_attention_heads": 7}, "num_heads 7", "num_attention_heads 7"),
        ("bloom", {"num_attention_heads": 7}, "num_heads 7", "num_attention_heads 7"),  # under its older name
        ("gpt_neox", {"hidden_act": "gelu"}, "activation gelu", "hidden_act gelu"),
        ("llama", {"hidden_act": "silu"}, "activation swiglu", "activation (hidden_act 'silu') swiglu"),
        ("llama", {}, "num_heads and norm", "num_attention_heads and norm"),
    ],
)
def test_a_sentence_about_our_fields_is_told_in_the_words_of_config_json(
    name: str, hf: dict[str, Any], text: str, words: str
) -> None:
    assert family(name).in_their_words(text, hf) == words


def refusal_of(of: Family, hf: dict[str, Any]) -> str | None:
    try:
        TransformerConfig.model_validate(of.to_config(hf))
    except ValidationError as error:
        return of.in_their_words(str(error), hf)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("of", FAMILIES, ids=[of.name for of in FAMILIES])
def test_a_bad_value_is_told_with_its_key(of: Family) -> None:
    for key in {key for option in of.options for key in option.keys}:
        for bad in ("x", -1, 0, 2.5, [], {}, [1], {"a": 1}, True, float("inf")):
            said = refusal_of(of, {key: bad})
            assert said is None or key in said, (key, bad)


def test_all_refused_options_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"quick_gelu.*\n.*scale_attn_by_inverse_layer_idx true"):
        family("gpt2").to_config({"scale_attn_by_inverse_layer_idx": True, "activation_function": "quick_gelu"})


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"model_type 'mamba' is not known; this runtime knows .*bloom, .*gpt2, .*starcoder2"
    ):
        family_of({"model_type": "mamba"})
    with pytest.raises(ValueError, match=r"config.json has no model_type; this runtime knows"):
        family_of({})


YARN = {"factor": 4.0, "original_max_position_embeddings": 8192}
SPELLINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    (
        "qwen2",
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    ),
    ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention"] * 32}, {"sliding_window": None}),
    (
        "gpt_neox",
        {"rotary_pct": 0.5, "rotary_emb_base": 99},
        {"rope_parameters": {"rope_theta": 99.0, "partial_rotary_factor": 0.5}},
    ),
    (
        "bloom",
        {"n_embed": 1024, "num_attention_heads": 16, "n_layer": 24},
        {"hidden_size": 1024, "n_head": 16, "num_hidden_layers": 24},
    ),
    ("gpt2", {"n_embd": 96, "n_inner": None}, {"hidden_size": 96, "n_inner": 384}),
    ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}),
    ("falcon", {"alibi": None, "bias": None}, {"num_kv_heads": 71}),
    ("llama", {"num_key_value_heads": None, "head_dim": None}, {"num_key_value_heads": 32, "head_dim": 128}),
]


@pytest.mark.parametrize(
    ("name", "old", "new"), SPELLINGS, ids=[f"{name}-{next(iter(old))}" for name, old, _ in SPELLINGS]
)
def test_old_and_new_spellings_mean_the_same_as_in_transformers(
    name: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    assert config_of(name, **old) == config_of(name, **new)
    told = json.loads(config_class(family(name))(**old).to_json_string(use_diff=False))
    assert config_of(name, **told) == config_of(name, **new)


def test_scaled_positions_reach_as_far_as_they_are_made_for() -> None:
    dynamic = config_of("llama", rope_scaling={"type": "dynamic", "factor": 3.0})
    assert (dynamic.max_seq_len, dynamic.rotary_scaling and dynamic.rotary_scaling.original_max_position) == (
        6144,
        2048,
    )
    assert family("llama").from_config(dynamic)["max_position_embeddings"] == 2048
    yarn = config_of("qwen2", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})
    assert (yarn.max_seq_len, family("qwen2").from_config(yarn)["max_position_embeddings"]) == (131072, 131072)


def test_scaling_is_written_for_old_readers_too() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = config_of("llama", rope_theta=5e5, rope_scaling=scaling, max_position_embeddings=131072)
    written = family("llama").from_config(config)
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == scaling
    assert written["rope_parameters"] == {**scaling, "rope_theta": 5e5}


def test_a_rotated_part_that_is_no_fraction_of_the_head_survives() -> None:
    for head_dim in range(2, 130, 2):
        for rotary_dim in range(2, head_dim + 1, 2):
            config = config_of("gpt_neox", hidden_size=head_dim, num_attention_heads=1, rotary_pct=1.0).model_copy(
                update={"rotary_dim": rotary_dim}
            )
            assert int(head_dim * family("gpt_neox").from_config(config)["rotary_pct"]) == rotary_dim


CANNOT: list[tuple[str, dict[str, Any], str]] = [
    (
        "gpt2",
        {"activation": "swiglu"},
        "activation_function has no word for activation 'swiglu'; it knows 'gelu', 'gelu_tanh' or 'relu'",
    ),
    ("gpt2", {"position": "rotary"}, "GPT2LMHeadModel can't express position 'rotary' (there 'learned')"),
    ("llama", {"num_kv_heads": 4, "qkv_bias": True}, "LlamaForCausalLM can't express qkv_bias true (there false)"),
    ("llama", {"attention_window": 512}, "LlamaForCausalLM can't express attention_window 512 (there null)"),
    (
        "llama",
        {"rotary_scaling": {"kind": "ntk", "factor": 2.0}},
        "rope_type has no word for rotary_scaling of kind ntk",
    ),
    (
        "mistral",
        {"attention_window": 512, "attention_pattern": ("full", "window")},
        "MistralForCausalLM can't express attention_window (None, 512",
    ),
    ("gemma", {"embedding_scale": 2.0}, "GemmaForCausalLM can't express embedding_scale 2.0 (there 55.4"),
    (
        "falcon",
        {"block": "sequential", "num_kv_heads": 2, "num_heads": 8, "hidden_size": 64},
        "num_kv_heads 2 with new_decoder_architecture and multi_query false is not supported",
    ),
    ("palm", {"norm_bias": True, "bias": True}, "CohereForCausalLM can't express"),
]


@pytest.mark.parametrize(
    ("name", "change", "sentence"), CANNOT, ids=[f"{name}-{next(iter(change))}" for name, change, _ in CANNOT]
)
def test_a_model_that_a_family_cannot_express_is_refused(name: str, change: dict[str, Any], sentence: str) -> None:
    config = TransformerConfig.model_validate({**family(name).to_config({}), **change})
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is compared
        family(name).from_config(config)
    assert sentence in str(caught.value)


def test_what_only_training_knows_is_no_obstacle() -> None:
    config = preset("llama-7b").model_copy(update={"z_loss": 1e-4, "hidden_dropout": 0.1, "init": "normal"})
    assert family_for(config).name == "llama"


def test_how_a_config_says_a_thing_is_no_obstacle() -> None:
    llama = preset("llama-7b").model_dump()
    same = TransformerConfig.model_validate(
        {**llama, "bias": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False, "alibi_scale": 2.0}
    )
    assert family_for(same).name == "llama"


# Of every published shape, by the first word of its name, the family in which it is exported.
EXPORTED_AS = {
    "gpt": "gpt2",
    "gpt2": "gpt2",
    "gpt3": "gpt2",
    "megatron": "gpt2",
    "opt": "opt",
    "bloom": "bloom",
    "gptj": "gptj",
    "pythia": "gpt_neox",
    "falcon": "falcon",
    "llama": "llama",
    "llama2": "llama",
    "llama3": "llama",
    "llama3.1": "llama",
    "llama3.2": "llama",
    "smollm2": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "qwen2.5": "qwen2",
    "qwen3": "qwen3",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "palm": "palm",
    "gemma": "gemma",
    "gemma2": "gemma2",
}


@pytest.mark.parametrize("name", [name for name in PRESETS if name.split("-")[0] in EXPORTED_AS])
def test_a_published_shape_is_exported_as_its_own_family(name: str) -> None:
    # The first GPT has norms after the sums, as one OPT has.
    expected = {"gpt-117m": "opt", "gpt-neox-20b": "gpt_neox"}.get(name) or EXPORTED_AS[name.split("-")[0]]
    assert family_for(preset(name)).name == expected


# What the files of published models say, without what is the tokenizer's, and the preset of that model.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2-124m": {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "bloom-560m": {
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "hidden_dropout": 0.0,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": 1024,
        "n_inner": None,
        "n_layer": 24,
        "num_attention_heads": 16,
        "offset_alibi": 100,
        "pretraining_tp": 1,
        "seq_length": 2048,
        "skip_bias_add": True,
        "slow_but_exact": False,
        "vocab_size": 250880,
    },
    "falcon-7b": {
        "alibi": False,
        "apply_residual_connection_post_layernorm": False,
        "bias": False,
        "hidden_size": 4544,
        "layer_norm_epsilon": 1e-05,
        "model_type": "falcon",
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "parallel_attn": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 65024,
    },
    "falcon-40b": {
        "alibi": False,
        "bias": False,
        "hidden_size": 8192,
        "layer_norm_epsilon": 1e-05,
        "model_type": "falcon",
        "multi_query": True,
        "new_decoder_architecture": True,
        "num_attention_heads": 128,
        "num_hidden_layers": 60,
        "num_kv_heads": 8,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "llama3.1-8b": {
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "mistral-7b": {
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "mixtral-8x7b": {
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "gemma2-9b": {
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "vocab_size": 256000,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_of_a_published_model_is_its_preset(name: str) -> None:
    hf = PUBLISHED[name]
    assert canonical_config(TransformerConfig.model_validate(family_of(hf).to_config(hf))) == canonical_config(
        preset(name)
    )


def test_a_shape_that_no_family_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match=r"no architecture of Hugging Face that this runtime knows is this model\n"
        r"LlamaForCausalLM can't express activation",
    ):
        family_for(preset("chinchilla-70b"))


def test_a_model_of_no_family_is_refused_with_the_nearest() -> None:
    config = preset("gpt2-124m").model_copy(update={"norm_position": "sandwich"})
    with pytest.raises(
        ValueError,
        match=r"no architecture of Hugging Face that this runtime knows is this model\n"
        r"GPT2LMHeadModel .*norm_position 'sandwich'",
    ):
        family_for(config)


def test_the_page_on_adding_a_family_shows_the_files_as_they_are() -> None:
    page = (ROOT / "docs" / "add-a-model.md").read_text(encoding="utf-8")
    files = ["models/huggingface/starcoder2.py", "models/huggingface/registry.py", "tests/models/huggingface_models.py"]
    sources = [(ROOT / file).read_text(encoding="utf-8") for file in files]
    snippets = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) == 5
    for snippet in snippets:
        assert any(snippet in source for source in sources), snippet
