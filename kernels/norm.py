"""LayerNorm (Ba et al. 2016, section 3) and RMSNorm (Zhang and Sennrich 2019, eq. 4), alone or with a residual sum.

    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight

Statistics are over the last dim. With n = (x - mean) rstd (RMSNorm: n = x rstd) and g = dy weight, per row:

    dx = rstd (g - n mean(g n) - mean(g))      the last term for LayerNorm alone
    dweight = sum over rows of dy n            dbias = sum over rows of dy

The add_ forms take a sub-layer's output x and the residual stream, and return the new stream x + residual and its norm.
That saves one pass over memory in each direction. The norm reads the sum rounded to x's dtype, as it is stored, so that
recomputation gives the same bits. The backward pass keeps the norm's input and float32 statistics, never the output.

A Triton program holds a tile of whole rows in registers and touches each element of memory once. It processes a row
longer than the tile in pieces, which come from the cache after the first pass. The backward pass runs few programs;
each walks over many rows and sums its own dweight and dbias, without atomics.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimaran.kernels.autograd import apply
from trimaran.kernels.checks import check_residual
from trimaran.kernels.launch import launch, multiprocessors, rows_of, tuned

_WIDEST = 65536  # the widest row in the tuned tables


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return layer_norm(x), shape and dtype of x: [..., hidden]; weight and bias: [hidden]."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _rms_forward(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(rows) [n, hidden], rstd [n, 1] float32 at least)."""
    # The statistics need float32 at least.
    wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).to(rows.dtype).mul_(weight), rstd


def _rms_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (dx [n, hidden] plus dsum if given, dweight [hidden]) for rows; autograd would run some 20 operators."""
    wide = rstd.dtype
    x_wide, weight_wide, dy_wide = x.to(wide), weight.to(wide), dy.to(wide)
    dx = dy_wide * x_wide
    dweight = torch.mv(dx.t(), rstd.squeeze(-1))
    mean = torch.mv(dx, weight_wide).unsqueeze_(-1).div_(x.shape[-1]).mul_(rstd.pow(3))
    torch.mul(dy_wide, weight_wide, out=dx)  # reuses dx: allocating a buffer costs more than the product
    if dsum is None:
        dx.mul_(rstd)
    else:
        torch.addcmul(dsum.to(wide), dx, rstd, out=dx)
    return dx.addcmul_(x_wide, mean, value=-1).to(x.dtype), dweight.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = _rows(x)
        y, rstd = _rms_forward(rows, weight, eps)
        ctx.save_for_backward(rows, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        (dy,) = grads
        dx, dweight = _rms_backward(_rows(dy), *ctx.saved_tensors)
        return dx.view(dy.shape), dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return rms_norm(x), shape and dtype of x: [..., hidden]; weight: [hidden]. Statistics are float32 at least."""
    if _is_plain(x, weight):
        return F.rms_norm(x, weight.shape, weight, eps)
    out: Tensor = apply(_RMSNorm, x, weight, eps)
    return out


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Return whether to use torch's operator: faster forward, slower backward; with mixed dtypes it promotes."""
    return not torch.is_grad_enabled() and x.dtype == weight.dtype


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = (x + residual).to(x.dtype)
        y, rstd = _rms_forward(_rows(total), weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return total, y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        dsum, dy = grads
        if dy is None:
            return dsum, dsum, None, None
        total, weight, rstd = ctx.saved_tensors
        dsum_rows = None if dsum is None else _rows(dsum)
        dx, dweight = _rms_backward(_rows(dy), _rows(total), weight, rstd, dsum_rows)
        dx = dx.view(total.shape)
        return dx, dx, dweight, None


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x + residual, rms_norm of the sum), both with the shape and dtype of x; residual: of x's shape.

    Raises ValueError where the shapes of x and residual differ.
    """
    check_residual(x, residual)
    if _is_plain(x, weight):
        total = x + residual
        total = total if total.dtype == x.dtype else total.to(x.dtype)
        return total, F.rms_norm(total, weight.shape, weight, eps)
    sum_and_norm: tuple[Tensor, Tensor] = apply(_AddRMSNorm, x, residual, weight, eps)
    return sum_and_norm


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (x + residual, layer_norm of the sum), both with the shape and dtype of x; residual: of x's shape.

    Raises ValueError where the shapes of x and residual differ.
    """
    check_residual(x, residual)
    total = (x + residual).to(x.dtype)
    return total, layer_norm(total, weight, bias, eps)


@triton.jit
def _load_sum(x_ptr: tl.tensor, residual_ptr: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Load x, or x + residual rounded to x's dtype; zero outside the mask."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if residual_ptr is not None:
        x = (x.to(tl.float32) + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _scale(n: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, cols: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Return n weight + bias."""
    y = n * tl.load(weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    return y


@triton.jit
def _norm_forward(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    here = rows < num_rows - first
    inside, at = here & (cols < width), rows * width + cols
    x_ptr += first * width
    if residual_ptr is not None:
        residual_ptr += first * width
    total = _load_sum(x_ptr, residual_ptr, at, inside)
    if residual_ptr is not None:
        tl.store(sum_ptr + first * width + at, total, mask=inside)
    x = total.to(tl.float32)
    if mean_ptr is not None:
        mean = tl.sum(x, axis=1, keep_dims=True) / width
        tl.store(mean_ptr + first + rows, mean, mask=here)
        x = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / width + eps)
    tl.store(rstd_ptr + first + rows, rstd, mask=here)
    tl.store(y_ptr + first * width + at, _scale(x * rstd, weight_ptr, bias_ptr, cols, width), mask=inside)


@triton.jit
def _norm_forward_in_pieces(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    COLS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start, piece = row * width, tl.arange(0, COLS)
    mean = 0.0
    if mean_ptr is not None:
        level = tl.zeros([COLS], tl.float32)
        for first in range(0, width, COLS):
            cols = first + piece
            level += _load_sum(x_ptr, residual_ptr, start + cols, cols < width).to(tl.float32)
        mean = tl.sum(level) / width
        tl.store(mean_ptr + row, mean)
    square = tl.zeros([COLS], tl.float32)
    for first in range(0, width, COLS):
        cols = first + piece
        x = _load_sum(x_ptr, residual_ptr, start + cols, cols < width).to(tl.float32) - mean
        square += tl.where(cols < width, x * x, 0.0)
    rstd = tl.rsqrt(tl.sum(square) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    for first in range(0, width, COLS):
        cols = first + piece
        total = _load_sum(x_ptr, residual_ptr, start + cols, cols < width)
        if residual_ptr is not None:
            tl.store(sum_ptr + start + cols, total, mask=cols < width)
        y = _scale((total.to(tl.float32) - mean) * rstd, weight_ptr, bias_ptr, cols, width)
        tl.store(y_ptr + start + cols, y, mask=cols < width)


@triton.jit
def _load_gradients(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    cols: tl.tensor,
    width: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    TIME: tl.constexpr,
) -> tl.tensor:
    """Load dy, g = dy weight and n = (x - mean) rstd, float32.

    TIME: "evict_last" before a second load of the same, "evict_first" at that second load. It is a hint to the cache
    and keeps the compiler from merging the two loads.
    """
    x = tl.load(x_ptr + at, mask=inside, other=0.0, eviction_policy=TIME).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0, eviction_policy=TIME).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < width, other=0.0, eviction_policy=TIME).to(tl.float32)
    return dy, dy * weight, (x - mean) * rstd


@triton.jit
def _norm_backward(
    dsum_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dweight_ptr: tl.tensor,
    dbias_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
    RELOAD: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)  # int64: rows x width may overflow int32
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    dweight, dbias = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < width, other=0.0)
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        first = tile * ROWS
        here = rows < num_rows - first
        inside, at, start = here & (cols < width), rows * width + cols, first * width
        rstd, mean = tl.load(rstd_ptr + first + rows, mask=here, other=0.0), 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + first + rows, mask=here, other=0.0)
        if RELOAD:
            dy, g, n = _load_gradients(
                dy_ptr + start, x_ptr + start, weight_ptr, at, inside, cols, width, mean, rstd, "evict_last"
            )
        else:
            dy = tl.load(dy_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
            n = (tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
            g = dy * weight.to(tl.float32)
        dweight += dy * n
        if dbias_ptr is not None:
            dbias += dy
        slope, shift = tl.sum(g * n, axis=1, keep_dims=True) / width, 0.0
        if mean_ptr is not None:
            shift = tl.sum(g, axis=1, keep_dims=True) / width
        if RELOAD:
            dy, g, n = _load_gradients(
                dy_ptr + start, x_ptr + start, weight_ptr, at, inside, cols, width, mean, rstd, "evict_first"
            )
        dx = (g - n * slope - shift) * rstd
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + start + at, dx, mask=inside)
    own = program * width + cols
    tl.store(dweight_ptr + own, tl.sum(dweight, axis=0, keep_dims=True), mask=cols < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + own, tl.sum(dbias, axis=0, keep_dims=True), mask=cols < width)


@triton.jit
def _norm_backward_in_pieces(
    dsum_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dweight_ptr: tl.tensor,
    dbias_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    COLS: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    own, piece = program * width, tl.arange(0, COLS)
    for row in tl.range(program, num_rows, tl.num_programs(0)):
        start = row * width
        rstd, mean = tl.load(rstd_ptr + row), 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row)
        along, level = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
        for first in range(0, width, COLS):
            cols = first + piece
            inside = cols < width
            _, g, n = _load_gradients(
                dy_ptr + start, x_ptr + start, weight_ptr, cols, inside, cols, width, mean, rstd, "evict_last"
            )
            along += g * n
            level += g
        slope, shift = tl.sum(along) / width, 0.0
        if mean_ptr is not None:
            shift = tl.sum(level) / width
        for first in range(0, width, COLS):
            cols = first + piece
            inside = cols < width
            dy, g, n = _load_gradients(
                dy_ptr + start, x_ptr + start, weight_ptr, cols, inside, cols, width, mean, rstd, "evict_first"
            )
            dx = (g - n * slope - shift) * rstd
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + start + cols, dx, mask=inside)
            # The program keeps its sums in memory, initially zero: a wide row has too many for the registers.
            tl.store(
                dweight_ptr + own + cols,
                tl.load(dweight_ptr + own + cols, mask=inside, other=0.0) + dy * n,
                mask=inside,
            )
            if dbias_ptr is not None:
                tl.store(
                    dbias_ptr + own + cols, tl.load(dbias_ptr + own + cols, mask=inside, other=0.0) + dy, mask=inside
                )
        tl.debug_barrier()  # for the next row other threads read the sums than wrote them


def _config(direction: str, x: Tensor, kind: str) -> dict[str, int]:
    """Return the launch configuration for rows x [n, width]; it has ROWS where a tile holds whole rows.

    The tables give TILE and the row's width in bytes, so that a tile takes the same shared memory in every dtype.
    """
    width = triton.next_power_of_2(x.shape[1])
    key = f"{direction}_{width * x.element_size()}"
    config = tuned("norm", x.device, f"{key}_{kind}", key, direction)
    tile = config.pop("TILE") // x.element_size()
    if width <= tile:
        return {"ROWS": tile // width, "COLS": width, **config}
    return {"COLS": tile, **{name: value for name, value in config.items() if name not in ("STAGES", "RELOAD")}}


class _TritonNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
    ) -> Any:
        rows, weight = rows_of(x), weight.contiguous()
        y = torch.empty_like(rows)
        total = rows if residual is None else torch.empty_like(rows)
        rstd = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        mean = torch.empty_like(rstd) if kind == "layer" else None
        residual_rows, total_out = (None, None) if residual is None else (rows_of(residual), total)
        tensors = (rows, residual_rows, weight, None if bias is None else bias.contiguous(), total_out, y, mean, rstd)
        config = _config("forward", rows, kind)
        kernel = _norm_forward if "ROWS" in config else _norm_forward_in_pieces
        launch(kernel, (triton.cdiv(len(rows), config.get("ROWS", 1)),), *tensors, *rows.shape, eps, **config)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.kind, ctx.has_residual, ctx.has_bias = kind, residual is not None, bias is not None
        ctx.set_materialize_grads(False)
        return y.view(x.shape) if residual is None else (total.view(x.shape), y.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *grads: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        dsum, dy = grads if len(grads) == 2 else (None, *grads)
        if dy is None:
            return dsum, dsum, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        config = _config("backward", x, ctx.kind)
        kernel, new_sums = (
            (_norm_backward, torch.empty) if "ROWS" in config else (_norm_backward_in_pieces, torch.zeros)
        )
        programs = min(triton.cdiv(len(x), config.get("ROWS", 1)), config.pop("PROGRAMS") * multiprocessors(x.device))
        sums = new_sums(1 + ctx.has_bias, programs, x.shape[1], dtype=torch.float32, device=x.device)
        dbias = sums[1] if ctx.has_bias else None
        dx = torch.empty_like(x)
        tensors = (None if dsum is None else rows_of(dsum), rows_of(dy), x, weight, mean, rstd, dx, sums[0], dbias)
        launch(kernel, (programs,), *tensors, *x.shape, **config)
        totals = sums.sum(1).to(weight.dtype)
        dx = dx.view(dy.shape)
        return dx, dx if ctx.has_residual else None, totals[0], totals[1] if ctx.has_bias else None, None, None


def _triton_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Any:
    hidden = x.shape[-1]
    if not 0 < hidden <= _WIDEST:
        raise ValueError(f"hidden ({hidden}) must be 1 to {_WIDEST} in a Triton norm; use the torch one")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (hidden,):
            raise ValueError(f"{name} must have the shape [hidden] = [{hidden}]; it has {list(vector.shape)}")
    return _TritonNorm.apply(x, residual, weight, bias, eps, kind)  # type: ignore[no-untyped-call]


def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `rms_norm`; raises ValueError where hidden is over 65536 or weight is not [hidden]."""
    y: Tensor = _triton_norm(x, None, weight, None, eps, "rms")
    return y


def triton_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return `layer_norm`; raises ValueError where hidden is over 65536 or weight or bias is not [hidden]."""
    y: Tensor = _triton_norm(x, None, weight, bias, eps, "layer")
    return y


def triton_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `add_rms_norm`; raises ValueError as it and `triton_rms_norm` do."""
    check_residual(x, residual)
    pair: tuple[Tensor, Tensor] = _triton_norm(x, residual, weight, None, eps, "rms")
    return pair


def triton_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `add_layer_norm`; raises ValueError as it and `triton_layer_norm` do."""
    check_residual(x, residual)
    pair: tuple[Tensor, Tensor] = _triton_norm(x, residual, weight, bias, eps, "layer")
    return pair
