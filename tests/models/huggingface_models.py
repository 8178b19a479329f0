"""Small random models made by transformers itself, several of every family, with the awkward options on.

They are made from a config; nothing is fetched. Vocabularies are odd, windows are shorter than `SEQ`, heads share keys
and values, and no parameter is what a fresh model has, so that a swap of two norms or biases shows.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface import Family, family_of, locate, resolve

Tensors = dict[str, Tensor]
BATCH, SEQ, VOCAB, HIDDEN, LAYERS, HEADS, FFN = 2, 13, 61, 32, 3, 4, 44

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
GPT2_SIZES = {
    "vocab_size": VOCAB,
    "n_positions": 32,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
FALCON_SIZES = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def made(model: type[PreTrainedModel], config: type[Any], **options: Any) -> Callable[[], PreTrainedModel]:
    """What makes the model, the same every time; in torch's default dtype."""

    def build() -> PreTrainedModel:
        torch.manual_seed(11)
        built = model(config(**{**NO_TOKENS, **options}))
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return built.eval()

    return build


def llama(**options: Any) -> Callable[[], PreTrainedModel]:
    return made(LlamaForCausalLM, LlamaConfig, **{**SIZES, **options})


def falcon(**options: Any) -> Callable[[], PreTrainedModel]:
    return made(FalconForCausalLM, FalconConfig, **{**FALCON_SIZES, **options})


def bloom(**options: Any) -> Callable[[], PreTrainedModel]:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "seq_length": 32,
        "initializer_range": 0.2,
    }
    return made(BloomForCausalLM, BloomConfig, **{**sizes, **options})


def opt(**options: Any) -> Callable[[], PreTrainedModel]:
    sizes = {**FALCON_SIZES, "ffn_dim": FFN, "dropout": 0.0, "init_std": 0.2}
    del sizes["initializer_range"]
    return made(OPTForCausalLM, OPTConfig, **{**sizes, **options})


def mixtral(**options: Any) -> Callable[[], PreTrainedModel]:
    # Its other implementations have no float64.
    return made(MixtralForCausalLM, MixtralConfig, **SIZES, experts_implementation="eager", **options)


def gemma2(**options: Any) -> Callable[[], PreTrainedModel]:
    sizes = {**SIZES, "head_dim": 10, "num_key_value_heads": 2, "query_pre_attn_scalar": 7, "sliding_window": 4}
    return made(Gemma2ForCausalLM, Gemma2Config, **{**sizes, "attn_implementation": "eager", **options})


SMALL_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": made(GPT2LMHeadModel, GPT2Config, **GPT2_SIZES),
    "gpt2-exact-gelu": made(GPT2LMHeadModel, GPT2Config, **GPT2_SIZES, n_inner=FFN, activation_function="gelu"),
    "gpt2-untied-unscaled": made(
        GPT2LMHeadModel, GPT2Config, **GPT2_SIZES, tie_word_embeddings=False, scale_attn_weights=False
    ),
    "gptj": made(GPTJForCausalLM, GPTJConfig, **GPT2_SIZES, rotary_dim=4),
    "gptj-tied-whole-heads": made(
        GPTJForCausalLM, GPTJConfig, **GPT2_SIZES, rotary_dim=8, n_inner=FFN, tie_word_embeddings=True
    ),
    "gpt_neo": made(
        GPTNeoForCausalLM,
        GPTNeoConfig,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=32,
        attention_types=[[["global", "local"], 1], [["local"], 1]],
        window_size=5,
        initializer_range=0.2,
    ),
    "gpt_neox": made(GPTNeoXForCausalLM, GPTNeoXConfig, **SIZES),
    "gpt_neox-sequential-linear": made(
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        **SIZES,
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
        hidden_act="gelu_new",
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    ),
    "falcon-7b": falcon(hidden_size=40, num_attention_heads=5),
    "falcon-40b": falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-11b": falcon(
        new_decoder_architecture=True,
        num_ln_in_parallel_attn=1,
        num_kv_heads=2,
        ffn_hidden_size=FFN,
        tie_word_embeddings=False,
    ),
    "falcon-rw": falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "falcon-multi-head-parallel": falcon(multi_query=False, layer_norm_epsilon=1e-3, activation="relu"),
    "falcon-multi-query-sequential": falcon(
        parallel_attn=False, bias=True, rope_parameters={"rope_type": "default", "rope_theta": 99.0}
    ),
    "llama": llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama-grouped-biases": llama(num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama-one-kv-head-tied": llama(num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama-wide-heads": llama(num_key_value_heads=2, head_dim=10, hidden_act="gelu"),
    "llama-3": llama(num_key_value_heads=2, rope_parameters=LLAMA3),
    "llama-linear": llama(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}),
    "llama-dynamic": llama(
        max_position_embeddings=8, rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0}
    ),
    "llama-yarn": llama(rope_parameters=YARN),
    "llama-yarn-scales": llama(
        rope_parameters={**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4}
    ),
    "mistral": made(MistralForCausalLM, MistralConfig, **SIZES, num_key_value_heads=2, sliding_window=5),
    "mistral-no-window-wide-heads": made(
        MistralForCausalLM, MistralConfig, **SIZES, num_key_value_heads=1, sliding_window=None, head_dim=6
    ),
    "mixtral": mixtral(num_key_value_heads=2, num_local_experts=4, sliding_window=5),
    "mixtral-three-wide-heads": mixtral(
        num_key_value_heads=4, num_local_experts=3, head_dim=6, tie_word_embeddings=True
    ),
    "qwen2": made(Qwen2ForCausalLM, Qwen2Config, **SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2-windows": made(
        Qwen2ForCausalLM,
        Qwen2Config,
        **SIZES,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        rope_parameters=YARN,
    ),
    "qwen3": made(Qwen3ForCausalLM, Qwen3Config, **SIZES, num_key_value_heads=2, head_dim=12),
    "qwen3-windows-biases": made(
        Qwen3ForCausalLM,
        Qwen3Config,
        **SIZES,
        num_key_value_heads=4,
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=True,
    ),
    "gemma": made(GemmaForCausalLM, GemmaConfig, **SIZES, num_key_value_heads=1, head_dim=12),
    "gemma-untied-biases": made(
        GemmaForCausalLM,
        GemmaConfig,
        **SIZES,
        num_key_value_heads=4,
        head_dim=8,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "gemma2": gemma2(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2-no-caps": gemma2(
        attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True, hidden_activation="silu"
    ),
    "olmo": made(OlmoForCausalLM, OlmoConfig, **SIZES, tie_word_embeddings=True),
    "olmo-grouped-biases": made(OlmoForCausalLM, OlmoConfig, **SIZES, num_key_value_heads=2, attention_bias=True),
    "olmo2": made(Olmo2ForCausalLM, Olmo2Config, **SIZES, num_key_value_heads=2),
    "olmo2-biases-tied": made(
        Olmo2ForCausalLM, Olmo2Config, **SIZES, attention_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-3
    ),
    "bloom": bloom(),
    "bloom-six-heads": bloom(hidden_size=36, n_head=6, tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    "opt": opt(),
    "opt-post-norm-no-bias": opt(do_layer_norm_before=False, enable_bias=False, activation_function="gelu"),
    "opt-no-scales-untied": opt(layer_norm_elementwise_affine=False, tie_word_embeddings=False),
    "palm": made(CohereForCausalLM, CohereConfig, **SIZES, num_key_value_heads=1, logit_scale=0.7),
    "palm-grouped-biases": made(
        CohereForCausalLM,
        CohereConfig,
        **SIZES,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
        logit_scale=1.5,
        layer_norm_eps=1e-3,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 400.0},
    ),
    "starcoder2": made(Starcoder2ForCausalLM, Starcoder2Config, **SIZES, num_key_value_heads=2, sliding_window=5),
    "starcoder2-no-bias-untied": made(
        Starcoder2ForCausalLM,
        Starcoder2Config,
        **SIZES,
        num_key_value_heads=1,
        use_bias=False,
        tie_word_embeddings=False,
        norm_epsilon=1e-3,
    ),
}


class InFloat64(TorchFunctionMode):
    """Makes torch compute in float64 where a model asks for float32 or bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.bfloat16):
            func = Tensor.double
        return func(*map(self._wide, args), **{name: self._wide(value) for name, value in (kwargs or {}).items()})

    @staticmethod
    def _wide(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value in (torch.float32, torch.bfloat16) else value


@contextmanager
def in_float64() -> Iterator[None]:
    """Make and run models of transformers in float64 throughout."""
    torch.set_default_dtype(torch.float64)
    try:
        with InFloat64():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class Imported:
    """A model of transformers, saved to a folder and read from it again under our names."""

    def __init__(self, theirs: PreTrainedModel, folder: Path) -> None:
        theirs.save_pretrained(folder)
        self.model, self.folder = theirs, folder
        self.hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.family = family_of(self.hf)
        self.config = TransformerConfig.model_validate(self.family.to_config(self.hf))
        self.stored = load_file(folder / "model.safetensors")
        self.weights = to_ours(self.family, self.config, self.stored)


def to_ours(family: Family, config: TransformerConfig, stored: Tensors) -> Tensors:
    units = resolve(family, config)
    names = locate(family, units, stored).names
    ours: Tensors = {}
    for unit in units:
        made = unit.to_ours([stored[names[name]] for name in unit.theirs], config)
        assert not ours.keys() & set(unit.ours)
        ours |= dict(zip(unit.ours, made, strict=True))
    return ours


def gradients_of(imported: Imported, folder: Path) -> Tensors:
    """The gradients of transformers' parameters under our names: saved as weights, to be converted like weights.

    A form that adds a constant to weights adds it to gradients too, hence the difference to what zeros become.
    """
    model = copy.deepcopy(imported.model)
    with torch.no_grad():
        for there, here in zip(imported.model.parameters(), model.parameters(), strict=True):
            assert there.grad is not None
            here.copy_(there.grad)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    moved, still = (
        to_ours(imported.family, imported.config, {name: tensor * factor for name, tensor in stored.items()})
        for factor in (1, 0)
    )
    return {name: moved[name] - still[name] for name in moved}
