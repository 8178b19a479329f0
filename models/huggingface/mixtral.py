"""Mixtral (Jiang et al. 2024): Mistral's blocks with experts for the feed-forward layer."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import GATED_EXPERTS, PRE_NORMS, STACKED, llama_rows, row
from trimaran.models.huggingface.options import (
    GATED_ACTIVATIONS,
    KV_HEADS,
    SIZES,
    TIED,
    Option,
    Values,
    attention_window,
    choice,
    fixed,
    head_width,
    only,
    value,
)
from trimaran.models.huggingface.rotary import rotary


def _read_aux_loss(hf: Mapping[str, Any]) -> Values:
    """Read the weight of the load-balancing loss; transformers adds the loss only with output_router_logits."""
    return {"router_aux_loss": hf["router_aux_loss_coef"] if hf["output_router_logits"] else 0.0}


def _write_aux_loss(config: TransformerConfig) -> Values:
    return {"router_aux_loss_coef": config.router_aux_loss, "output_router_logits": False}


MIXTRAL: Final = Family(
    name="mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "rope_theta": 1000000.0,
    },
    aliases={"num_experts": "num_local_experts"},
    options=(
        *SIZES,
        KV_HEADS,
        head_width(is_field=True),
        rotary(),
        fixed(norm="rmsnorm", renormalize_experts=True),
        attention_window(),
        value("num_experts", "num_local_experts"),
        value("experts_per_token", "num_experts_per_tok"),
        Option(("router_aux_loss_coef", "output_router_logits"), _read_aux_loss, _write_aux_loss),
        only("router_jitter_noise", 0.0),
        choice("activation", "hidden_act", GATED_ACTIVATIONS),
        value("norm_eps", "rms_norm_eps"),
        value("attention_dropout", "attention_dropout"),
        TIED,
    ),
    weights=(
        *llama_rows(),
        *PRE_NORMS,
        row("layers.{i}.mlp.router.weight", "model.layers.{i}.block_sparse_moe.gate.weight"),
        row(
            "layers.{i}.mlp.experts.up",
            "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
            "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
            form=GATED_EXPERTS,
        ),
        row("layers.{i}.mlp.experts.down", "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight", form=STACKED),
    ),
)
