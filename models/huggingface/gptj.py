"""GPT-J (Wang and Komatsuzaki 2021): parallel blocks with one norm, interleaved rotary pairs, a biased head."""

from collections.abc import Mapping
from typing import Any, Final

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.forms import ATTENTION, row
from trimaran.models.huggingface.options import ACTIVATIONS, TIED, Option, Values, choice, fixed, unsupported, value


def _read_rotary_dim(hf: Mapping[str, Any]) -> Values:
    if hf["rotary_dim"] is None:  # transformers then computes the frequencies from hidden_size
        raise unsupported("rotary_dim", None, "a number of rotated dims")
    return {"rotary_dim": hf["rotary_dim"]}


GPTJ: Final = Family(
    name="gptj",
    model_types=("gptj",),
    architecture="GPTJForCausalLM",
    defaults={
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    options=(
        fixed(position="rotary", rotary_interleaved=True, block="parallel_one_norm", norm="layernorm", head_bias=True),
        fixed(qkv_bias=False, out_bias=False, mlp_bias=True, norm_bias=True),
        value("vocab_size", "vocab_size"),
        value("max_seq_len", "n_positions"),
        value("hidden_size", "n_embd"),
        value("num_layers", "n_layer"),
        value("num_heads", "n_head"),
        Option(("rotary_dim",), _read_rotary_dim, lambda config: {"rotary_dim": config.rotary_dim or config.head_dim}),
        value("ffn_hidden_size", "n_inner"),
        choice("activation", "activation_function", ACTIVATIONS),
        value("norm_eps", "layer_norm_epsilon"),
        value("hidden_dropout", "resid_pdrop"),
        value("embedding_dropout", "embd_pdrop"),
        value("attention_dropout", "attn_pdrop"),
        TIED,
    ),
    weights=(
        row("embedding.weight", "transformer.wte.weight"),
        row("layers.{i}.attention_norm.{p}", "transformer.h.{i}.ln_1.{p}"),
        row(f"{ATTENTION}.q.weight", "transformer.h.{i}.attn.q_proj.weight"),
        row(f"{ATTENTION}.kv.weight", "transformer.h.{i}.attn.k_proj.weight", "transformer.h.{i}.attn.v_proj.weight"),
        row(f"{ATTENTION}.out.weight", "transformer.h.{i}.attn.out_proj.weight"),
        row("layers.{i}.mlp.up.{p}", "transformer.h.{i}.mlp.fc_in.{p}"),
        row("layers.{i}.mlp.down.{p}", "transformer.h.{i}.mlp.fc_out.{p}"),
        row("final_norm.{p}", "transformer.ln_f.{p}"),
        row("head.weight", "lm_head.weight"),
        row("head_bias", "lm_head.bias"),
    ),
    prefix="transformer.",
    ignored=(r"\.attn\.(bias|masked_bias|embed_positions)$",),
)
