"""Rotary position embedding (Su et al., RoFormer, 2021, section 3.2.2) and the published scalings for longer contexts.

The first `rot` elements of a head form pairs. Pair i at position p is rotated by the angle p * base^(-2i / rot):

    y1 = x1 cos - x2 sin      y2 = x2 cos + x1 sin      backward: the inverse rotation, sin -> -sin

Pairs are (x_i, x_{i + rot/2}), "half-split", as in LLaMA checkpoints on the Hugging Face hub and in GPT-NeoX, or
(x_{2i}, x_{2i+1}), "interleaved", as in RoFormer, GPT-J and Meta's LLaMA. Elements past `rot` do not change (GPT-NeoX,
Black et al. 2022, section 2.1.1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.kernels.autograd import apply
from trimaran.kernels.launch import launch, tuned

_Turn: TypeAlias = Callable[[Tensor, Tensor, Tensor, bool, bool, bool], Tensor]
"""(x, cos, sin, interleaved, back, in_place) -> x rotated."""


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, equation 4): positions divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class NTKScaling:
    """NTK-aware interpolation (Peng et al., YaRN, 2023, section 3.1).

    The lowest frequency is divided by `factor`; the highest does not change.
    """

    factor: float


@dataclass(frozen=True)
class DynamicNTKScaling:
    """NTK-aware interpolation by the actual length (YaRN, section 3.3), from `original_max_position` positions on."""

    factor: float
    original_max_position: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, section 3.4): keeps high frequencies, interpolates low ones, with a ramp between.

    Args:
        beta_fast, beta_slow: a pair with more than beta_fast turns within `original_max_position` positions keeps its
            frequency; one with fewer than beta_slow is interpolated.
        attention_factor: multiplies cos and sin; by default 0.1 ln(factor) + 1 (equation 15). With both mscale and
            mscale_all_dim (DeepSeek-V2): 0.1 mscale ln(factor) + 1 over the same with mscale_all_dim.
        truncate: whether the ramp begins and ends at whole pairs.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1's scaling.

    Wavelengths over original_max_position / low_freq_factor are interpolated; those under original_max_position /
    high_freq_factor do not change.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


RotaryScaling: TypeAlias = LinearScaling | NTKScaling | DynamicNTKScaling | YarnScaling | Llama3Scaling


def rotary_frequencies(
    rot: int, base: float, scaling: RotaryScaling | None, seq_len: int, device: torch.device
) -> tuple[Tensor, float]:
    """Return each pair's angle per position [rot / 2] float64, and the factor of cos and sin.

    Args:
        seq_len: length of the sequence, for `DynamicNTKScaling`.
    Raises ValueError for an odd `rot` or invalid settings.
    """
    if rot % 2 or rot < 2:
        raise ValueError(f"rotary positions turn pairs: rot ({rot}) must be even and at least 2")
    if scaling is not None and scaling.factor < 1.0:
        raise ValueError(f"the factor of a rotary scaling must be at least 1, got {scaling}")
    exponents = torch.arange(0, rot, 2, dtype=torch.float64, device=device) / rot
    match scaling:
        case None:
            return base**-exponents, 1.0
        case LinearScaling(factor):
            return base**-exponents / factor, 1.0
        case NTKScaling(factor):
            return _ntk_base(rot, base, factor) ** -exponents, 1.0
        case DynamicNTKScaling(factor, original):
            return _ntk_base(rot, base, factor * max(seq_len, original) / original - (factor - 1.0)) ** -exponents, 1.0
        case YarnScaling():
            return _yarn_frequencies(base**-exponents, base, scaling), _yarn_attention_factor(scaling)
        case Llama3Scaling():
            return _llama3_frequencies(base**-exponents, scaling), 1.0


def _ntk_base(rot: int, base: float, factor: float) -> float:
    if rot < 4:
        raise ValueError(f"NTK-aware scaling needs two pairs or more, got rot = {rot}")
    return float(base * factor ** (rot / (rot - 2)))


def _yarn_frequencies(frequencies: Tensor, base: float, scaling: YarnScaling) -> Tensor:
    rot = 2 * len(frequencies)

    def pair_that_turns(times: float) -> float:
        """Solve original_max_position * base^(-2i / rot) = 2 pi times for i (equation 17 with its i = 2 pair)."""
        return rot * math.log(scaling.original_max_position / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rot - 1)
    width = high - low or 0.001  # a step instead of a ramp, as in transformers
    ramp = ((torch.arange(rot // 2, dtype=torch.float64, device=frequencies.device) - low) / width).clamp_(0, 1)
    return frequencies * (1 - ramp) + frequencies / scaling.factor * ramp


def _yarn_attention_factor(scaling: YarnScaling) -> float:
    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return grown(scaling.mscale) / grown(scaling.mscale_all_dim)
    return grown(1.0)


def _llama3_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low >= high:
        raise ValueError(f"low_freq_factor ({low}) must be below high_freq_factor ({high})")
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp_(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def rotary_tables(
    first_position: int,
    num_positions: int,
    head_dim: int,
    base: float,
    dtype: torch.dtype,
    device: torch.device,
    *,
    scaling: RotaryScaling | None = None,
    seq_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [num_positions, head_dim / 2], for the positions from `first_position` on.

    Angles are computed in float64.

    Args:
        head_dim: how many elements of a head are rotated; fewer than the head has for a partial rotation.
        seq_len: length of the whole sequence, for `DynamicNTKScaling`; by default up to the last of these positions.
    """
    length = first_position + num_positions if seq_len is None else seq_len
    frequencies, factor = rotary_frequencies(head_dim, base, scaling, length, device)
    positions = torch.arange(first_position, first_position + num_positions, dtype=torch.float64, device=device)
    angles = torch.outer(positions, frequencies)
    return angles.cos().mul_(factor).to(dtype), angles.sin().mul_(factor).to(dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool, in_place: bool) -> Tensor:
    """Rotate x: the torch reference, into a new tensor or in place."""
    rot, dtype = 2 * cos.shape[-1], torch.promote_types(x.dtype, cos.dtype)
    turn = _turn_neighbours if interleaved else _turn_halves
    if rot == x.shape[-1] and x.dtype == cos.dtype and not in_place:
        return turn(x, cos, sin, -1 if back else 1)
    out = turn(x[..., :rot].to(dtype), cos.to(dtype), sin.to(dtype), -1 if back else 1).to(x.dtype)
    if in_place:
        x[..., :rot] = out
        return x
    return out if rot == x.shape[-1] else torch.cat((out, x[..., rot:]), dim=-1)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    out: Tensor = x * torch.cat((cos, cos), dim=-1).unsqueeze(-2)
    sin = sin.unsqueeze(-2)
    x1, x2 = x.chunk(2, dim=-1)
    y1, y2 = out.chunk(2, dim=-1)
    y1.addcmul_(x2, sin, value=-sign)
    y2.addcmul_(x1, sin, value=sign)
    return out


def _turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):  # only these have complex products on every device
        return _turn_neighbours(x.float(), cos.float(), sin.float(), sign).to(x.dtype)
    pairs = x.unflatten(-1, (-1, 2))
    if pairs.storage_offset() % 2 or pairs.stride(-1) != 1 or any(stride % 2 for stride in pairs.stride()[:-1]):
        pairs = pairs.clone(memory_format=torch.contiguous_format)  # a complex number needs an even offset
    turns = torch.complex(cos, sin * sign)[..., None, :]
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2)


class _RotaryFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, in_place: bool, turn: _Turn
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.turn = interleaved, turn
        if in_place:
            ctx.mark_dirty(x)
        return turn(x, cos, sin, interleaved, False, in_place)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None, None]:
        # A rotation's transpose is its inverse. Never in place: autograd may use this gradient elsewhere too.
        return ctx.turn(grads[0], *ctx.saved_tensors, ctx.interleaved, True, False), None, None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, in_place: bool, turn: _Turn) -> Tensor:
    batch, seq, _, head_dim = x.shape
    half = cos.shape[-1]
    if cos.shape not in ((seq, half), (batch, seq, half)) or sin.shape != cos.shape:
        shapes = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        raise ValueError(
            f"cos and sin must be [{seq}, rot / 2] or [{batch}, {seq}, rot / 2] for x {tuple(x.shape)}, got {shapes}"
        )
    if not 2 <= 2 * half <= head_dim:
        raise ValueError(f"cos has {half} pairs, which must be at least 1 and fit into a head of {head_dim}")
    if in_place and any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"x {tuple(x.shape)} with strides {x.stride()} holds elements several times: it can't be rotated in place"
        )
    out: Tensor = apply(_RotaryFunction, x, cos, sin, interleaved, in_place, turn)
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Return x rotated by its positions, a new tensor of x's shape and dtype.

    Args:
        x: [batch, seq, heads, head_dim].
        cos, sin: [seq, rot / 2], or [batch, seq, rot / 2] where samples have different positions; dtype of x or
            float32, rot <= head_dim. They get no gradient.
        interleaved: whether pairs are (2i, 2i + 1) rather than (i, i + rot / 2).
    Raises ValueError for inconsistent shapes.
    """
    return _rotate(x, cos, sin, interleaved, False, _turn)


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x in place and return it; arguments as in `rotary`.

    Under autograd x must not be a leaf or a result of chunk, split or unbind: autograd refuses to change one of several
    views (use narrow or select). A backward pass through a view copies the gradient of the viewed tensor.
    """
    return _rotate(x, cos, sin, interleaved, True, _turn)


@triton.jit
def _turn_pairs(x1: tl.tensor, x2: tl.tensor, cos: tl.tensor, sin: tl.tensor) -> tl.tensor:
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def _rotary(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    x_batch: tl.tensor,
    x_seq: tl.tensor,
    x_head: tl.tensor,
    x_dim: tl.tensor,
    y_batch: tl.tensor,
    y_seq: tl.tensor,
    y_head: tl.tensor,
    y_dim: tl.tensor,
    table_batch: tl.tensor,
    num_tokens: tl.tensor,
    seq: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    rest: tl.tensor,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    batch = token // seq
    position = (token - batch * seq).to(tl.int64)
    batch = batch.to(tl.int64)
    inside = (token < num_tokens)[:, None, None] & (head < heads)[None, :, None]
    head = head.to(tl.int64)[None, :, None]
    x_head_ptr = x_ptr + (batch * x_batch + position * x_seq)[:, None, None] + head * x_head
    y_head_ptr = y_ptr + (batch * y_batch + position * y_seq)[:, None, None] + head * y_head

    pair = tl.arange(0, HALF)
    at = (batch * table_batch + position * half)[:, None] + pair[None, :]
    in_table = (token < num_tokens)[:, None] & (pair < half)[None, :]
    cos = tl.load(cos_ptr + at, mask=in_table).to(tl.float32)[:, None, :]
    sin = tl.load(sin_ptr + at, mask=in_table).to(tl.float32)[:, None, :]
    if BACK:
        sin = -sin
    if INTERLEAVED:
        dim = tl.arange(0, 2 * HALF)[None, None, :]
        in_pairs = inside & (dim < 2 * half)
        x1, x2 = tl.split(tl.reshape(tl.load(x_head_ptr + dim * x_dim, mask=in_pairs), (TOKENS, HEADS, HALF, 2)))
        y1, y2 = _turn_pairs(x1, x2, cos, sin)
        tl.store(y_head_ptr + dim * y_dim, tl.reshape(tl.join(y1, y2), (TOKENS, HEADS, 2 * HALF)), mask=in_pairs)
    else:
        dim = pair[None, None, :]
        in_half = inside & (dim < half)
        x1 = tl.load(x_head_ptr + dim * x_dim, mask=in_half)
        x2 = tl.load(x_head_ptr + (half + dim) * x_dim, mask=in_half)
        y1, y2 = _turn_pairs(x1, x2, cos, sin)
        tl.store(y_head_ptr + dim * y_dim, y1, mask=in_half)
        tl.store(y_head_ptr + (half + dim) * y_dim, y2, mask=in_half)
    if REST > 0:
        dim = tl.arange(0, REST)[None, None, :]
        in_rest = inside & (dim < rest)
        passed = tl.load(x_head_ptr + (2 * half + dim) * x_dim, mask=in_rest)
        tl.store(y_head_ptr + (2 * half + dim) * y_dim, passed, mask=in_rest)


def _triton_turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool, in_place: bool) -> Tensor:
    batch, seq, heads, head_dim = x.shape
    half = cos.shape[-1]
    y = x if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rest = 0 if in_place else head_dim - 2 * half
    config = tuned("rotary", x.device, "default")
    half_tile, rest_tile = triton.next_power_of_2(half), triton.next_power_of_2(rest) if rest else 0
    rows = max(1, config.pop("BLOCK") // max(half_tile, rest_tile))  # (token, head) vectors per program
    head_tile = max(1, min(triton.next_power_of_2(heads), rows))
    tiles = {"TOKENS": rows // head_tile, "HEADS": head_tile, "HALF": half_tile, "REST": rest_tile}
    grid = (triton.cdiv(batch * seq, tiles["TOKENS"]), triton.cdiv(heads, head_tile))
    strides = (*x.stride(), *y.stride(), cos.shape[-2] * half if cos.dim() == 3 else 0)
    sizes = (batch * seq, seq, heads, half, rest)
    tensors = (x, y, cos.contiguous(), sin.contiguous())
    launch(_rotary, grid, *tensors, *strides, *sizes, INTERLEAVED=interleaved, BACK=back, **tiles, **config)
    return y


def triton_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rotary` in one pass over memory, for x with any strides."""
    return _rotate(x, cos, sin, interleaved, False, _triton_turn)


def triton_rotary_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rotary_` in one pass over memory, for x with any strides."""
    return _rotate(x, cos, sin, interleaved, True, _triton_turn)
