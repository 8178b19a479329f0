"""Our network is the published one: transformers' GPT-2 and LLaMA with the same random weights give the same logits, loss and gradients.

The models are made from a config; nothing is fetched. In float32 transformers runs as it is. Its LLaMA takes norms and rotary angles in
float32 whatever the model's dtype, so for the float64 comparison these two functions are replaced by the same formulas in float64.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from trimaran.models.batch import Microbatch
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import Placement
from trimaran.models.transformer import Stage, build_stages

BATCH, SEQ, VOCAB, HIDDEN, LAYERS, HEADS, FFN = 2, 13, 61, 24, 3, 4, 40
Tensors = Mapping[str, Tensor]


def llama(*, kv_heads: int = HEADS, tied: bool = False, head_dim: int = HIDDEN // HEADS) -> tuple[nn.Module, TransformerConfig]:
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=32,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=tied,
            initializer_range=0.2,
            attn_implementation="sdpa",
        )
    )
    ours = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=FFN,
        vocab_size=VOCAB,
        max_seq_len=32,
        rotary_base=500.0,
        tie_embeddings=tied,
    )
    return theirs, ours


def gpt2(activation: str) -> tuple[nn.Module, TransformerConfig]:
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=32,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=FFN,
            activation_function=activation,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
    )
    ours = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        ffn_hidden_size=FFN,
        vocab_size=VOCAB,
        max_seq_len=32,
        position="learned",
        norm="layernorm",
        activation="gelu_tanh" if activation == "gelu_new" else "gelu",
        bias=True,
        tie_embeddings=True,
    )
    return theirs, ours


def llama_to_ours(theirs: Tensors, tied: bool) -> dict[str, Tensor]:
    """Weights, or gradients, of LlamaForCausalLM under our names."""
    ours = {"embedding.weight": theirs["model.embed_tokens.weight"], "final_norm.weight": theirs["model.norm.weight"]}
    if not tied:
        ours["head.weight"] = theirs["lm_head.weight"]
    for i in range(LAYERS):
        layer = {name.removeprefix(f"model.layers.{i}."): value for name, value in theirs.items() if name.startswith(f"model.layers.{i}.")}
        ours |= {
            f"layers.{i}.attention_norm.weight": layer["input_layernorm.weight"],
            f"layers.{i}.attention.q.weight": layer["self_attn.q_proj.weight"],
            f"layers.{i}.attention.kv.weight": torch.stack((layer["self_attn.k_proj.weight"], layer["self_attn.v_proj.weight"])),
            f"layers.{i}.attention.out.weight": layer["self_attn.o_proj.weight"],
            f"layers.{i}.mlp_norm.weight": layer["post_attention_layernorm.weight"],
            f"layers.{i}.mlp.up.weight": torch.stack((layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"])),
            f"layers.{i}.mlp.down.weight": layer["mlp.down_proj.weight"],
        }
    return ours


def gpt2_to_ours(theirs: Tensors, tied: bool) -> dict[str, Tensor]:
    """Weights, or gradients, of GPT2LMHeadModel under our names; its Conv1D holds [in, out]."""
    assert tied
    ours = {"embedding.weight": theirs["transformer.wte.weight"], "position": theirs["transformer.wpe.weight"]}
    for kind in ("weight", "bias"):
        ours[f"final_norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for i in range(LAYERS):
            prefix = f"transformer.h.{i}."
            layer = {name.removeprefix(prefix): value.t() for name, value in theirs.items() if name.startswith(prefix)}
            q, k, v = layer[f"attn.c_attn.{kind}"].chunk(3)
            ours |= {
                f"layers.{i}.attention_norm.{kind}": layer[f"ln_1.{kind}"],
                f"layers.{i}.attention.q.{kind}": q,
                f"layers.{i}.attention.kv.{kind}": torch.stack((k, v)),
                f"layers.{i}.attention.out.{kind}": layer[f"attn.c_proj.{kind}"],
                f"layers.{i}.mlp_norm.{kind}": layer[f"ln_2.{kind}"],
                f"layers.{i}.mlp.up.{kind}": layer[f"mlp.c_fc.{kind}"],
                f"layers.{i}.mlp.down.{kind}": layer[f"mlp.c_proj.{kind}"],
            }
    return ours


Build = Callable[[], tuple[nn.Module, TransformerConfig]]
MODELS: dict[str, tuple[Build, Callable[[Tensors, bool], dict[str, Tensor]]]] = {
    "gpt2": (lambda: gpt2("gelu_new"), gpt2_to_ours),
    "gpt2-exact-gelu": (lambda: gpt2("gelu"), gpt2_to_ours),
    "llama": (llama, llama_to_ours),
    "llama-grouped-query": (lambda: llama(kv_heads=2), llama_to_ours),
    "llama-one-kv-head-tied": (lambda: llama(kv_heads=1, tied=True), llama_to_ours),
    "llama-wide-heads": (lambda: llama(kv_heads=2, head_dim=10), llama_to_ours),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[nn.Module, TransformerConfig, Callable[[Tensors, bool], dict[str, Tensor]]]:
    build, to_ours = MODELS[request.param]
    torch.manual_seed(11)
    theirs, config = build()
    with torch.no_grad():  # norms start as ones and biases as zeros: a swap of two would not show
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return theirs, config, to_ours


def stage_with(config: TransformerConfig, weights: Tensors, dtype: torch.dtype) -> Stage:
    """The whole network on one rank with the given weights: every one of them is used, and no other is left."""
    place = Placement(single("tp"), False, dtype, torch.device("cpu"))
    (stage,) = build_stages(config, [range(config.num_layers)], [0], place, seed=0)
    parameters = dict(stage.named_parameters())
    assert parameters.keys() == weights.keys()
    assert sum(p.numel() for p in parameters.values()) == config.num_parameters()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
    return stage


def tokens_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    tokens = torch.randint(VOCAB, (BATCH, SEQ), generator=generator)
    labels = torch.cat((tokens[:, 1:], torch.full((BATCH, 1), -100)), dim=1)
    return tokens, labels


def test_float32_logits_and_loss_equal(model: Any) -> None:
    theirs, config, to_ours = model
    weights = {name: p.detach() for name, p in theirs.named_parameters()}
    stage = stage_with(config, to_ours(weights, config.tie_embeddings), torch.float32)
    tokens, labels = tokens_and_labels()
    with torch.no_grad():
        expected = theirs(input_ids=tokens, labels=tokens)  # shifts the labels itself
        logits = stage.logits(stage.run_layers(None, tokens))
        loss = stage(None, Microbatch(tokens, labels, 0)) / (BATCH * (SEQ - 1))
    assert expected.logits.std() > 0.1, "logits near zero would agree by themselves"
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)


def norm_in_float64(self: Any, hidden: Tensor) -> Tensor:
    """LlamaRMSNorm.forward without its cast to float32."""
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))  # type: ignore[no-any-return]


def rotary_in_float64(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """LlamaRotaryEmbedding.forward with angles in float64."""
    dim, base = self.config.head_dim, self.config.rope_parameters["rope_theta"]
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = position_ids[..., None].double() * frequencies
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()


def test_float64_logits_and_every_gradient_equal(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rotary_in_float64)
    theirs, config, to_ours = model
    theirs = theirs.double()
    named = dict(theirs.named_parameters())
    stage = stage_with(config, to_ours({name: p.detach() for name, p in named.items()}, config.tie_embeddings), torch.float64)
    tokens, labels = tokens_and_labels()

    expected_logits = theirs(input_ids=tokens).logits
    F.cross_entropy(expected_logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    stage(None, Microbatch(tokens, labels, 0)).backward()

    torch.testing.assert_close(stage.logits(stage.run_layers(None, tokens)), expected_logits, rtol=0, atol=1e-10)
    expected = to_ours({name: p.grad for name, p in named.items() if p.grad is not None}, config.tie_embeddings)
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-3, f"{name}: a gradient of zero would agree by itself"
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_our_logits_change_when_two_weights_are_swapped(model: Any) -> None:
    """The comparison can fail: keys for values, or gate for up, is seen."""
    theirs, config, to_ours = model
    weights = to_ours({name: p.detach() for name, p in theirs.named_parameters()}, config.tie_embeddings)
    tokens, _ = tokens_and_labels()
    swapped = weights | {"layers.1.attention.kv.weight": weights["layers.1.attention.kv.weight"].flip(0)}
    with torch.no_grad():
        first, second = (stage_with(config, w, torch.float32) for w in (weights, swapped))
        difference = first.logits(first.run_layers(None, tokens)) - second.logits(second.run_layers(None, tokens))
    assert difference.abs().max() > 1e-2
