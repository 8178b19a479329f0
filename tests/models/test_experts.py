"""Routing and experts on one rank: against a loop over the tokens, against transformers, and with lopsided routing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from trimaran.models.batch import Microbatch
from trimaran.models.cache.key_value import KeyValueCache
from trimaran.models.config import TransformerConfig
from trimaran.models.layers.experts import ExpertMLP, Router, grouped_linear
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext, info_of, initialize
from trimaran.models.transformer import Stage, build_stages

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 12, "vocab_size": 31, "max_seq_len": 16,
    "num_experts": 5,
    "experts_per_token": 2, "init": "normal", "init_std": 0.5,
}  # fmt: skip


def placement(dtype: torch.dtype = torch.float64) -> LayerContext:
    return LayerContext(single("tp"), False, dtype, torch.device("cpu"))


def make(dtype: torch.dtype = torch.float64, **changes: Any) -> ExpertMLP:
    module = ExpertMLP(TransformerConfig(**(SHAPE | changes)), placement(dtype))
    initialize(module, seed=3)
    return module


def tokens_of(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truth(module: ExpertMLP, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """The layer as a loop over tokens and their experts; `chosen` where ties leave it open."""
    out = torch.zeros_like(x)
    for context in torch.cartesian_prod(*(torch.arange(length) for length in x.shape[:-1])).tolist():
        token = x[tuple(context)]
        probabilities = torch.softmax(module.router.weight @ token, 0)
        experts = probabilities.topk(module.router.num_chosen).indices if chosen is None else chosen[tuple(context)]
        weights = probabilities[experts]
        if module.router.renormalize:
            weights = weights / weights.sum()
        for expert, weight in zip(experts.tolist(), weights, strict=True):
            up = module.experts.up[expert]
            inner = (
                torch.nn.functional.silu(up[0] @ token) * (up[1] @ token) if up.ndim == 3 else torch.relu(up @ token)
            )
            out[tuple(context)] += weight * (module.experts.down[expert] @ inner)
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts_per_token": 1},
        {"experts_per_token": 5},
        {"renormalize_experts": False},
        {"activation": "relu", "num_experts": 3},
    ],
    ids=["two", "one", "all", "not-renormalized", "no-gate"],
)
def test_outputs_and_gradients_equal_a_loop_over_the_tokens(changes: dict[str, Any]) -> None:
    module = make(**changes)
    x, dy = tokens_of(2, 7, 8).requires_grad_(), tokens_of(2, 7, 8, seed=1)
    y = module(x)
    expected = truth(module, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad((expected * dy).sum(), [x, *module.parameters()])
    found = torch.autograd.grad((y * dy).sum(), [x, *module.parameters()])
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_gradients_are_those_of_finite_differences() -> None:
    module = make(num_experts=3)
    x = tokens_of(1, 4, 8)
    gaps = module.router(x).sort(-1).values.diff()
    assert gaps.min() > 1e-3, "no difference of 1e-6 changes a choice"
    inputs = (x.requires_grad_(), module.router.weight, module.experts.up, module.experts.down)
    assert torch.autograd.gradcheck(lambda *_: module(inputs[0]), inputs)


def test_a_tie_is_decided_somehow_and_every_token_has_its_experts() -> None:
    module = make()
    with torch.no_grad():
        module.router.weight.zero_()
    x = tokens_of(3, 5, 8)
    weights, chosen = module.router.choose(module.router(x))
    assert weights.eq(0.5).all()
    assert chosen[..., 0].ne(chosen[..., 1]).all()
    torch.testing.assert_close(module(x), truth(module, x, chosen), rtol=0, atol=1e-12)
    assert module(x).equal(module(x))


def give_main_grads(module: ExpertMLP) -> None:
    """Give the parameters a main_grad, as the optimizer does."""
    for parameter in module.parameters():
        info_of(parameter).main_grad = torch.zeros_like(parameter)


def test_all_tokens_may_go_to_one_expert_and_the_others_have_no_gradient() -> None:
    module = make(experts_per_token=1)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[3, 0] = 100.0
    x = tokens_of(2, 6, 8).abs()
    give_main_grads(module)
    y = module(x.requires_grad_())
    torch.testing.assert_close(y, truth(module, x.detach()), rtol=0, atol=1e-12)
    y.sum().backward()
    for weight in (module.experts.up, module.experts.down):
        gradient = info_of(weight).main_grad
        assert weight.grad is None
        assert gradient is not None
        assert gradient.flatten(1).any(1).tolist() == [False, False, False, True, False]


def test_no_tokens_at_all_leave_zeros() -> None:
    module = make()
    give_main_grads(module)
    x = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    y = module.experts(x, [0] * 5)
    assert y.shape == (0, 8)
    y.sum().backward()
    for weight in (module.experts.up, module.experts.down):
        gradient = info_of(weight).main_grad
        assert gradient is not None
        assert not gradient.any()


def test_bfloat16_gradients_add_up_in_float32() -> None:
    weight = make(torch.bfloat16).experts.down
    main_grad = torch.zeros_like(weight, dtype=torch.float32)
    info_of(weight).main_grad = main_grad
    for scale in (256.0, 1.0):
        out = grouped_linear(torch.ones(2, 12, dtype=torch.bfloat16, requires_grad=True), weight, [0, 2, 0, 0, 0])
        out.backward(torch.full_like(out, scale))
    assert main_grad[1].eq(2 * 257.0).all(), "257 is not a bfloat16"


def test_the_sum_over_a_tokens_experts_is_taken_in_float32() -> None:
    wide, narrow = make(torch.float32), make(torch.bfloat16)
    x = tokens_of(2, 6, 8, dtype=torch.bfloat16)
    assert narrow.router(x).dtype == torch.float32
    assert narrow(x).dtype == torch.bfloat16
    torch.testing.assert_close(narrow(x).float(), wide(x.float()), rtol=0.1, atol=0.1)


# ---------------------------------------------------------------- the balance of the experts


def balance_loss(module: ExpertMLP, x: Tensor) -> Tensor:
    """Equations 17 to 20 of DeepSeek-V3 for each sequence of x [batch, seq, hidden], with autograd's own gradient."""
    probabilities = torch.softmax(x @ module.router.weight.t(), -1)
    chosen = probabilities.topk(module.router.num_chosen).indices
    losses = []
    for sequence, experts in zip(probabilities, chosen, strict=True):
        counts = torch.bincount(experts.flatten(), minlength=module.num_experts)
        share = counts.double() * module.num_experts / experts.numel()
        losses.append((share * sequence.mean(0)).sum())
    return torch.stack(losses)


def test_the_balance_loss_enters_the_gradient_and_nothing_else() -> None:
    plain, balanced = make(), make(router_aux_loss=0.3)
    x, dy = tokens_of(3, 6, 8), tokens_of(3, 6, 8, seed=1)
    gradients = []
    for module in (plain, balanced):
        inputs = [x.clone().requires_grad_(), *module.parameters()]
        y = module(inputs[0], 0.7)
        gradients.append(torch.autograd.grad((y * dy).sum(), inputs))
        assert y.equal(plain(x)), "the output stays what it is"
    leaf = x.clone().requires_grad_()
    loss = balance_loss(balanced, leaf)
    extra = torch.autograd.grad(0.7 * 0.3 * loss.sum(), [leaf, balanced.router.weight])
    for without, added, found in zip(gradients[0], [*extra, 0.0, 0.0], gradients[1], strict=True):
        torch.testing.assert_close(found, without + added, rtol=0, atol=1e-13)
    assert extra[1].abs().max() > 1e-3


def test_the_balance_of_a_sequence_does_not_depend_on_the_batch_and_is_1_where_even() -> None:
    module = make(num_experts=4)
    x = tokens_of(3, 8, 8)
    module(x.requires_grad_())
    together = module.take_load_balancing_loss()
    for sequence in x:
        module(sequence.unsqueeze(0))
    assert together is not None
    torch.testing.assert_close(module.take_load_balancing_loss(), together, rtol=1e-12, atol=0)
    torch.testing.assert_close(together, balance_loss(module, x).sum().detach(), rtol=1e-12, atol=0)
    assert module.take_load_balancing_loss() is None, "taken"
    with torch.no_grad():
        module(x)
    assert module.take_load_balancing_loss() is None, "nothing was trained"
    with torch.no_grad():
        module.router.weight.zero_()
    module(x)
    even = module.take_load_balancing_loss()
    assert even is not None
    assert even.item() == pytest.approx(3.0), "equal probabilities give 1 a sequence, whatever the choice"


# ---------------------------------------------------------------- in a model


def stage_of(dtype: torch.dtype, **changes: Any) -> Stage:
    (stage,) = build_stages(TransformerConfig(**(SHAPE | changes)), [range(2)], [0], placement(dtype), seed=5)
    return stage


def test_a_stage_says_what_a_sequence_counts() -> None:
    """Summed losses: a sequence counts as many times as it has tokens."""
    plain, balanced = stage_of(torch.float64), stage_of(torch.float64, router_aux_loss=0.3)
    tokens = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))
    gradients = []
    for stage in (plain, balanced):
        loss = stage(None, Microbatch(tokens, tokens, 0), 0.5) * 0.5
        gradients.append(torch.autograd.grad(loss, [layer.mlp.router.weight for layer in stage.layers.values()]))
    found: list[tuple[ExpertMLP, Tensor]] = []
    for layer in plain.layers.values():
        layer.mlp.register_forward_hook(lambda module, inputs, output: found.append((module, inputs[0])))
    plain(None, Microbatch(tokens, tokens, 0))
    module, x = found[1]  # the last layer: to the router of the one before more comes through the last layer's input
    (extra,) = torch.autograd.grad(0.5 * 9 * 0.3 * balance_loss(module, x.detach()).sum(), module.router.weight)
    torch.testing.assert_close(gradients[1][1], gradients[0][1] + extra, rtol=0, atol=1e-12)
    assert plain.take_load_balancing_loss() > 0
    assert plain.take_load_balancing_loss() == 0


def test_one_token_at_a_time_gives_what_the_whole_sequence_gives() -> None:
    stage = stage_of(torch.float64)
    tokens = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(2))
    cache = KeyValueCache(2, 7, stage.config, stage.context)
    parts = []
    for position in range(7):
        cache.set_lengths([position + 1] * 2)
        parts.append(stage.extend(None, tokens[:, position : position + 1], cache))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts, 1), stage.run_layers(None, tokens), rtol=0, atol=1e-12)


def theirs(stage: Stage) -> tuple[MixtralForCausalLM, dict[str, tuple[str, int | None]]]:
    """transformers' model with the stage's weights, and our name and part of each of its parameters."""
    shape = stage.config
    config = MixtralConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token, rms_norm_eps=shape.norm_eps, rope_theta=shape.rotary_base,
        attn_implementation="eager",
    )  # fmt: skip
    names: dict[str, tuple[str, int | None]] = {
        "model.embed_tokens.weight": ("embedding.weight", None),
        "model.norm.weight": ("final_norm.weight", None),
        "lm_head.weight": ("head.weight", None),
    }
    for layer in range(shape.num_layers):
        there, here = f"model.layers.{layer}.", f"layers.{layer}."
        names |= {
            f"{there}input_layernorm.weight": (f"{here}attention_norm.weight", None),
            f"{there}post_attention_layernorm.weight": (f"{here}mlp_norm.weight", None),
            f"{there}self_attn.q_proj.weight": (f"{here}attention.q.weight", None),
            f"{there}self_attn.k_proj.weight": (f"{here}attention.kv.weight", 0),
            f"{there}self_attn.v_proj.weight": (f"{here}attention.kv.weight", 1),
            f"{there}self_attn.o_proj.weight": (f"{here}attention.out.weight", None),
            f"{there}mlp.gate.weight": (f"{here}mlp.router.weight", None),
            f"{there}mlp.experts.gate_up_proj": (f"{here}mlp.experts.up", None),
            f"{there}mlp.experts.down_proj": (f"{here}mlp.experts.down", None),
        }
    model = MixtralForCausalLM(config).to(stage.context.dtype)
    ours = dict(stage.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source, part = names[name]
            parameter.copy_((ours[source] if part is None else ours[source][part]).reshape(parameter.shape))
    return model, names


def test_mixtral_of_transformers_gives_the_same_logits_and_gradients() -> None:
    stage = stage_of(torch.float32, num_experts=6, experts_per_token=3, num_kv_heads=1, init_std=0.3)
    model, names = theirs(stage)
    generator = torch.Generator().manual_seed(4)
    tokens, labels = (torch.randint(31, (3, 12), generator=generator) for _ in range(2))
    logits = model(tokens).logits
    torch.testing.assert_close(stage.logits(stage.run_layers(None, tokens)), logits, rtol=1e-5, atol=1e-5)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    stage(None, Microbatch(tokens, labels, 0)).backward()
    ours = {name: parameter.grad for name, parameter in stage.named_parameters()}
    for name, parameter in model.named_parameters():
        source, part = names[name]
        gradient = ours[source]
        assert gradient is not None
        assert parameter.grad is not None
        gradient = gradient if part is None else gradient[part]
        # float32's digits: a gradient's error goes by the largest of its tensor.
        torch.testing.assert_close(
            gradient.reshape(parameter.shape),
            parameter.grad,
            rtol=0,
            atol=2e-5 * float(parameter.grad.abs().max()),
            msg=name,
        )


def test_the_router_is_as_wide_as_the_experts_are_many() -> None:
    router = Router(TransformerConfig(**SHAPE), placement())
    assert tuple(router.weight.shape) == (5, 8)
    assert info_of(router.weight).needs_tp_grad_reduce
