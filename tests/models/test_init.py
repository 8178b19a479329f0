"""Initial weights: deviations by the papers' formulas, the same numbers at every layout, no stall in training."""

import math
from typing import Any, get_args

import mup
import pytest
import torch
from pydantic import ValidationError

from trimaran.models.batch import Microbatch
from trimaran.models.config import TransformerConfig
from trimaran.models.init import Role, init_spec
from trimaran.models.parallel.group import Group, single
from trimaran.models.parallel.parameter import LayerContext, info_of
from trimaran.models.shape.choices import Initialization
from trimaran.models.transformer import Stage, build_stages

CPU = torch.device("cpu")
KINDS = get_args(Initialization)
H, HEADS, KV, D, F, V, S, N = 96, 4, 2, 32, 160, 320, 128, 6
SHAPE: dict[str, Any] = {
    "num_layers": N, "hidden_size": H, "num_heads": HEADS, "num_kv_heads": KV, "head_dim": D, "ffn_hidden_size": F,
    "vocab_size": V,
    "max_seq_len": S, "position": "learned", "init_std": 0.03,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "tfixup": {"norm_position": "none"},
    "deepnorm": {"norm_position": "post"},
    "mup": {"mup_base_width": 24},
}
Q, K = HEADS * D, KV * D


def shape_of(init: str, **changes: Any) -> TransformerConfig:
    return TransformerConfig(**{**SHAPE, "init": init, **OTHERS.get(init, {}), **changes})


def build(config: TransformerConfig, tp: Group | None = None, dtype: torch.dtype = torch.float32) -> Stage:
    """The whole network, or one tp rank's part of it; making it needs no other rank."""
    context = LayerContext(tp or single("tp"), sequence_parallel=False, dtype=dtype, device=CPU)
    (stage,) = build_stages(config, [range(config.num_layers)], [0], context, seed=5)
    return stage


def glorot(fan_in: int, fan_out: int) -> float:
    return math.sqrt(2 / (fan_in + fan_out))


def expected(init: str) -> dict[str, float]:
    """The deviations of the papers, written out; names as in the network, without `layers.i.` and `.weight`."""
    matrices = {
        "attention.q": (H, Q), "key": (H, K), "value": (H, K), "attention.out": (Q, H), "mlp.up": (H, F),
        "mlp.down": (F, H), "head": (H, V),
    }  # fmt: skip
    tables = ("embedding", "position")
    smaller = ("value", "attention.out", "mlp.up", "mlp.down")
    normal = dict.fromkeys((*tables, *matrices), 0.03)
    xavier = {name: glorot(*fans) for name, fans in matrices.items()} | dict.fromkeys(tables, 1 / math.sqrt(H))
    match init:
        case "normal":
            return normal
        case "depth_scaled":
            return normal | dict.fromkeys(("attention.out", "mlp.down"), 0.03 / math.sqrt(12))
        case "small_init":
            return dict.fromkeys(normal, math.sqrt(2 / (5 * 96))) | dict.fromkeys(
                ("attention.out", "mlp.down"), 2 / (6 * math.sqrt(96))
            )
        case "xavier":
            return xavier
        case "fan_in":
            return {name: fans[0] ** -0.5 for name, fans in matrices.items()} | dict.fromkeys(tables, 1.0)
        case "tfixup":
            scaled = {name: xavier[name] * 0.67 * 6**-0.25 for name in smaller}
            return xavier | scaled | dict.fromkeys(tables, 96**-0.5 * 54**-0.25)
        case "deepnorm":
            return xavier | {name: xavier[name] * 48**-0.25 for name in smaller}
        case "mup":  # four times the base width
            return dict.fromkeys(matrices, 0.03 / 2) | dict.fromkeys((*tables, "head"), 0.03)
    raise AssertionError(init)


def measured(stage: Stage) -> dict[str, torch.Tensor]:
    """All numbers of a kind of weight in the network, over the layers."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, parameter in stage.named_parameters():
        if "norm" in name or parameter.ndim < 2:
            continue
        kind = ".".join(name.split(".")[2:] if name.startswith("layers.") else name.split(".")).removesuffix(".weight")
        if kind == "attention.kv":
            found.setdefault("key", []).append(parameter.data[0].flatten())
            found.setdefault("value", []).append(parameter.data[1].flatten())
        else:
            found.setdefault(kind, []).append(parameter.data.flatten())
    return {kind: torch.cat(parts).double() for kind, parts in found.items()}


@pytest.mark.parametrize("init", KINDS)
def test_deviations_are_those_of_the_formulas(init: str) -> None:
    weights, formula = measured(build(shape_of(init))), expected(init)
    assert weights.keys() == formula.keys()
    for kind, numbers in weights.items():
        # The deviation of n normal numbers is known to 1 / sqrt(2 n); five of those are never seen by chance.
        tolerance = 5 / math.sqrt(2 * len(numbers))
        assert numbers.std().item() == pytest.approx(formula[kind], rel=tolerance), kind
        assert abs(numbers.mean().item()) < 5 * formula[kind] / math.sqrt(len(numbers)), kind


@pytest.mark.parametrize("init", KINDS)
@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_starts_from_its_slices_of_the_weights_of_one_process(init: str, tp: int) -> None:
    config = shape_of(init, vocab_size=V + 3)  # the last rank's rows are padded
    whole = dict(build(config).named_parameters())
    for rank in range(tp):
        for name, part in build(config, Group("tp", tuple(range(tp)), rank)).named_parameters():
            shard = info_of(part).shard
            if shard.dim is None:  # kv heads are fewer than 4 ranks, and norms are whole anyway
                assert torch.equal(part, whole[name]), name
                continue
            length = shard.real_length(tuple(part.shape))
            assert torch.equal(
                part.narrow(shard.dim, 0, length), whole[name].narrow(shard.dim, shard.offset, length)
            ), name


def test_keys_and_values_differ_only_in_scale_from_a_plain_draw() -> None:
    plain, scaled = (
        build(shape_of(init)).get_parameter("layers.3.attention.kv.weight").data for init in ("normal", "tfixup")
    )
    ratio = (scaled / plain).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-5, atol=0)
    assert ratio[1, 0].item() == pytest.approx(ratio[0, 0].item() * 0.67 * 6**-0.25, rel=1e-5)


def test_gate_and_up_start_like_a_matrix_of_their_own() -> None:
    gated = init_spec(shape_of("xavier", activation="swiglu"), "mlp_input")
    assert gated.std == pytest.approx(glorot(H, F))


def test_mup_is_the_plain_model_at_its_base_and_slower_in_wide_matrices() -> None:
    base = shape_of("mup", mup_base_width=H)
    plain = shape_of("normal")
    for name, parameter in build(base).named_parameters():
        assert torch.equal(parameter, build(plain).get_parameter(name)), name
        assert info_of(parameter).init_spec.lr_scale == 1.0
    assert base.attention_scale == pytest.approx(D**-0.5)
    assert base.logits_scale == 1.0
    for name, parameter in build(shape_of("mup")).named_parameters():
        is_matrix = name.startswith("layers.") and parameter.ndim > 1
        assert info_of(parameter).init_spec.lr_scale == (0.25 if is_matrix else 1.0), name


ROLES: dict[str, Role] = {
    "embedding": "embedding", "position": "position", "query": "query", "key": "key", "value": "value",
    "out": "attention_output", "up": "mlp_input", "down": "mlp_output", "head": "head",
}  # fmt: skip


def mup_peer(factor: int) -> torch.nn.ModuleDict:
    """The weights of a model as Microsoft's mup is told of them, `factor` times as wide as its base."""
    h, q, k, f = (size * factor for size in (48, 64, 32, 80))
    linear = {"query": (h, q), "key": (h, k), "value": (h, k), "out": (q, h), "up": (h, f), "down": (f, h)}
    layers = {name: torch.nn.Linear(*sizes, bias=False) for name, sizes in linear.items()}
    tables = {"embedding": torch.nn.Embedding(V, h), "position": torch.nn.Embedding(S, h)}
    return torch.nn.ModuleDict({**tables, **layers, "head": mup.MuReadout(h, V, bias=False)})


def test_mup_gives_what_microsofts_mup_gives() -> None:
    """Deviations, learning rates and the factor of the logits of every weight, four times as wide as the base."""
    sizes = {"hidden_size": 192, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "ffn_hidden_size": 320}
    config = shape_of("mup", mup_base_width=48, **sizes)
    peer = mup_peer(4)
    mup.set_base_shapes(peer, mup_peer(1), delta=mup_peer(2))
    optimizer = mup.MuAdamW(peer.parameters(), lr=1.0)
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    torch.manual_seed(0)
    for name, role in ROLES.items():
        weight = peer.get_parameter(f"{name}.weight")
        mup.init.normal_(weight, std=config.init_std)
        ours = init_spec(config, role)
        assert ours.lr_scale == rates[id(weight)], name
        assert weight.std().item() == pytest.approx(ours.std, rel=5 / math.sqrt(2 * weight.numel())), name
    head = peer["head"]
    assert isinstance(head, mup.MuReadout)
    assert config.logits_scale == head.output_mult / head.width_mult()
    # attention by 1 / head_dim, the same as 1 / root where it is that of the base: here the heads grow in number
    assert config.attention_scale == pytest.approx(32**-0.5)


def test_mup_follows_from_the_base_unless_it_is_given() -> None:
    config = shape_of("mup")
    assert config.logits_scale == 0.25
    assert config.attention_scale == pytest.approx(D**-0.5), "heads that grow in number keep their scale"
    wider_heads = shape_of("mup", mup_base_head_dim=8)
    assert wider_heads.attention_scale == pytest.approx(math.sqrt(8) / D)
    assert shape_of("mup", logits_scale=0.5).logits_scale == 0.5
    assert shape_of("normal").logits_scale == 1.0
    assert shape_of("normal").attention_scale is None


def test_deepnorm_weighs_the_stream_by_alpha() -> None:
    assert shape_of("deepnorm").residual_scale == pytest.approx(12**0.25)
    assert shape_of("normal").residual_scale == 1.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"init": "tfixup"}, ("init: init tfixup is for a model without norms, got norm_position pre; "
            "set norm_position to none, or init to depth_scaled"),
        ),
        (
            {"init": "deepnorm"},
            "init: init deepnorm is for norms after the sums, got norm_position pre; set norm_position to post",
        ),
        (
            {"residual_scale": 2.0},
            ("residual_scale: residual_scale (2) needs a norm after the sum, got norm_position pre; "
            "set norm_position to post"),
        ),
        (
            {"init": "mup"},
            "mup_base_width: is required by init mup; set it to the hidden_size at which the learning rate was found",
        ),
        (
            {"mup_base_width": 32},
            ("mup_base_width: mup_base_width (32) says something only with init mup, got init depth_scaled; "
            "set init to mup"),
        ),
    ],
)  # fmt: skip
def test_an_initialization_that_does_not_fit_says_what_would(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TransformerConfig(**{**SHAPE, **changes})
    assert sentence in str(caught.value)


def train_without_warmup(init: str, *, num_steps: int = 40, **changes: Any) -> list[float]:
    """Losses of 12 layers at the full rate from the first step; each token follows from the two before it."""
    vocab, seq, batch = 32, 16, 8
    config = TransformerConfig(
        num_layers=12, hidden_size=64, num_heads=4, vocab_size=vocab, max_seq_len=seq, activation="gelu", init=init,
        embedding_scale=8.0, **changes
    )  # fmt: skip
    stage, generator = build(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    table, losses = torch.randint(vocab, (vocab,), generator=generator), []
    for step in range(num_steps):
        tokens = torch.randint(vocab, (batch, seq + 1), generator=generator)
        for at in range(2, seq + 1):
            tokens[:, at] = table[(tokens[:, at - 1] + tokens[:, at - 2]) % vocab]
        loss = stage(None, Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), step * batch)) / (
            batch * seq
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def late(losses: list[float]) -> float:
    """The mean loss of the last steps."""
    return sum(losses[-5:]) / 5


def test_tfixup_trains_without_norms_or_warmup_where_plain_weights_diverge_or_stall() -> None:
    fixed = train_without_warmup("tfixup", norm_position="none")
    plain = train_without_warmup("normal", norm_position="none")
    unscaled = train_without_warmup("xavier", num_steps=6, norm_position="none")
    assert max(fixed) < 4.5, "no spike: a guess has ln 32 = 3.5"
    assert late(fixed) < 2.6
    assert late(plain) > late(fixed) + 0.3, "GPT-2's small weights vanish through twelve layers"
    assert late(unscaled) > 100, "the Xavier weights that T-Fixup makes smaller explode"


def test_deepnorm_trains_post_norms_without_warmup_where_plain_weights_stall() -> None:
    post = {"norm_position": "post", "norm": "layernorm", "bias": True}
    deep, plain = (train_without_warmup(init, num_steps=20, **post) for init in ("deepnorm", "xavier"))
    assert late(deep) < 2.6
    assert late(plain) > late(deep) + 0.3


@pytest.mark.parametrize(("dtype", "tables"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_rotary_tables_are_never_rounded_to_a_narrow_dtype(dtype: torch.dtype, tables: torch.dtype) -> None:
    stage = build(shape_of("normal", position="rotary"), dtype=dtype)
    found = stage._rotary(slice(100, 128), 128)
    assert found is not None
    assert {table.dtype for table in found} == {tables}
    assert stage.run_layers(None, torch.arange(128)[None]).dtype == dtype
