"""Cross entropy over a vocabulary cut over ranks, and its gradient, without the communication.

    loss = (1 - s) (lse - z_label) + s (lse - mean_v z_v) + c lse^2        lse = log(sum_v exp(z_v))
    d loss / d z_v = softmax(z)_v (1 + 2 c lse) - (1 - s) [v = label] - s / V

with the label smoothing s (Szegedy et al. 2016, section 7; uniform over the V ids of the vocabulary) and the z-loss c
(PaLM, Chowdhery et al. 2022, section 5: it keeps lse near 0). Each rank holds the columns [first, first + num_real) of
the logits; the ranks exchange three or four numbers per row, never the logits (Megatron-LM, Shoeybi et al. 2019,
section 3).

The sum of exponentials is relative to the row's maximum M: lse - z = log(sum) + (M - z) and softmax = exp(z - M) / sum
then lose no digits, however large the logits are.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.kernels.launch import launch, tuned
from trimaran.kernels.signatures import CrossEntropyGradient, CrossEntropyStatistics

IGNORED_LABEL = -100
# Logits that a CPU processes at once: with a copy of them they stay in a core's second-level cache between the passes.
_CACHED_BYTES = 1 << 20


class CrossEntropyKernels(NamedTuple):
    """One implementation of the two passes over the logits: the second reads what the first left in them."""

    statistics_: CrossEntropyStatistics
    gradient_: CrossEntropyGradient


def _cached_rows(logits: Tensor) -> Iterator[slice]:
    """Yield slices of the rows that fit a CPU's cache; on another device one slice of all rows."""
    row_bytes = max(1, logits.shape[1] * logits.element_size())
    step = max(1, _CACHED_BYTES // row_bytes) if logits.device.type == "cpu" else max(1, len(logits))
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and losses for logits of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def local_statistics_(logits: Tensor, labels: Tensor, first: int, num_real: int, with_sum: bool = False) -> Tensor:
    """Return the statistics of the local logits that other ranks need: [3, rows], or [4, rows] `with_sum`.

    They are float32 (float64 for float64 logits): the maximum (-inf without columns), the sum of exp(z - maximum), the
    label's logit (-inf where another rank has the label), the sum of z.

    Args:
        logits: [rows, n], any float dtype; the first `num_real` columns are read, the others are padding. Overwritten
            with what the same implementation's `logits_gradient_` reads: here exp(z - maximum), to compute it once.
        labels: [rows] int64, global ids; IGNORED_LABEL for none.
        first: global id of the first local column.
    """
    real = logits[:, :num_real]
    out = torch.zeros(3 + with_sum, len(logits), dtype=statistics_dtype(logits.dtype), device=logits.device)
    if num_real == 0:
        out[0], out[2] = -torch.inf, -torch.inf
        return out
    mine, column = _local_labels(labels, first, num_real)
    out[2] = real.gather(1, column).squeeze(1).masked_fill(~mine, -torch.inf)
    for rows in _cached_rows(real):
        z = real[rows].to(out.dtype)  # a view of the logits where they have this dtype already
        if with_sum:
            torch.sum(z, -1, out=out[3, rows])
        maximum = torch.amax(z, -1, out=out[0, rows])
        z.sub_(maximum.unsqueeze(1)).exp_()
        torch.sum(z, -1, out=out[1, rows])
        if z.dtype != logits.dtype:
            real[rows] = z
    return out


def _local_labels(labels: Tensor, first: int, num_real: int) -> tuple[Tensor, Tensor]:
    """Return (whether the label is a local column [rows], that column or else 0 [rows, 1])."""
    local = labels - first
    mine = (local >= 0) & (local < num_real)
    return mine, torch.where(mine, local, 0).unsqueeze(1)


def combine(
    statistics: Tensor, labels: Tensor, vocab_size: int, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (loss [rows], normalizer [2, rows]).

    The normalizer is each row's maximum M over the whole vocabulary, and the sum of exp(z - M).

    Args:
        statistics: [ranks, 3 or 4, rows], of every rank; 4 where `label_smoothing` is not 0.
        labels: [rows] int64; IGNORED_LABEL has loss 0, a label that no rank holds infinite loss.
        vocab_size: ids in the whole vocabulary.
    """
    maximum = statistics[:, 0].amax(0)
    total = (statistics[:, 1] * (statistics[:, 0] - maximum).exp_()).sum(0)
    log_total = total.log()
    loss = log_total + (maximum - statistics[:, 2].amax(0))
    if label_smoothing:
        uniform = log_total + (maximum - statistics[:, 3].sum(0) / vocab_size)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    if z_loss:
        loss = loss + z_loss * (maximum + log_total).square()
    return loss.masked_fill(labels == IGNORED_LABEL, 0.0), torch.stack((maximum, total))


def logits_gradient_(
    logits: Tensor,
    labels: Tensor,
    first: int,
    num_real: int,
    statistics: Tensor,
    normalizer: Tensor,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Turn `logits` [rows, n], as `local_statistics_` left them, into the gradient of the summed losses, in place.

    Rows with IGNORED_LABEL and columns from `num_real` on become 0. Returns `logits`.

    Args:
        statistics: [3 or 4, rows] of these logits; normalizer: [2, rows] from `combine`. The other arguments as there.
    """
    logits[:, num_real:] = 0
    real = logits[:, :num_real]
    if num_real == 0:
        return logits
    maximum, total = normalizer
    weight = (labels != IGNORED_LABEL).to(normalizer.dtype)
    scale = weight / total
    if z_loss:
        scale = scale * (1 + 2 * z_loss * (maximum + total.log()))
    uniform = weight * (label_smoothing / vocab_size)
    torch.mul(real, ((statistics[0] - maximum).exp_() * scale).unsqueeze(1), out=real)
    if label_smoothing:
        torch.sub(real, uniform.unsqueeze(1), out=real)
    # Computes the label's column again from the statistics: in bfloat16 the difference of a probability near 1 and 1
    # would have lost its digits.
    mine, column = _local_labels(labels, first, num_real)
    at_label = (statistics[2] - maximum).exp_() * scale - uniform - (1 - label_smoothing)
    at_label = torch.where(mine, at_label.to(real.dtype), real.gather(1, column).squeeze(1))
    real.scatter_(1, column, at_label.unsqueeze(1))
    return logits


@triton.jit
def _cross_entropy_statistics(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    num_real: tl.tensor,
    first: tl.tensor,
    WITH_SUM: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """One program per row. Each lane reduces its own columns, one short vector at a time; the end reduces the lanes."""
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * stride
    maximum = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    plain = tl.zeros([LANES], tl.float32)
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for start in range(0, num_real, LANES * VECTOR):
        cols = start + offsets
        # Loads up to `width`, so that vectors stay whole, and masks the columns past the real ones.
        z = tl.load(logits_row + cols, mask=cols < width, other=0.0).to(tl.float32)
        real = cols < num_real
        if WITH_SUM:
            plain += tl.sum(tl.where(real, z, 0.0), 1)
        z = tl.where(real, z, float("-inf"))
        higher = tl.maximum(maximum, tl.max(z, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a lane without a column yet: -inf - -inf is NaN
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        maximum = higher
    top = tl.max(maximum, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(out_ptr + row, top)
    tl.store(out_ptr + num_rows + row, tl.sum(total * tl.exp(maximum - base), 0))
    local = tl.load(labels_ptr + row) - first
    mine = (local >= 0) & (local < num_real)
    label_logit = tl.load(logits_row + local, mask=mine, other=float("-inf")).to(tl.float32)
    tl.store(out_ptr + num_rows * 2 + row, label_logit)
    if WITH_SUM:
        tl.store(out_ptr + num_rows * 3 + row, tl.sum(plain, 0))


@triton.jit
def _cross_entropy_gradient(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    normalizer_ptr: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    num_real: tl.tensor,
    first: tl.tensor,
    smoothing: tl.tensor,
    uniform: tl.tensor,
    z_loss: tl.tensor,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * stride + cols
    z = tl.load(at, mask=cols < width, other=0.0).to(tl.float32)
    label = tl.load(labels_ptr + row)
    maximum = tl.load(normalizer_ptr + row)
    total = tl.load(normalizer_ptr + num_rows + row)
    scale = (1.0 + 2.0 * z_loss * (maximum + tl.log(total))) / total
    gradient = tl.exp(z - maximum) * scale - uniform - tl.where(cols == label - first, 1.0 - smoothing, 0.0)
    keep = (cols < num_real) & (label != IGNORED)
    tl.store(at, tl.where(keep, gradient, 0.0), mask=cols < width)


def triton_local_statistics_(
    logits: Tensor, labels: Tensor, first: int, num_real: int, with_sum: bool = False
) -> Tensor:
    """`local_statistics_` for float32, bfloat16 and float16, in one pass that does not change the logits."""
    rows, width = logits.shape
    work = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty(3 + with_sum, rows, dtype=torch.float32, device=logits.device)
    config = tuned("cross_entropy", logits.device, "statistics")
    sizes = (rows, work.stride(0), width, num_real, first)
    launch(_cross_entropy_statistics, (rows,), work, labels.contiguous(), out, *sizes, WITH_SUM=with_sum, **config)
    return out


def triton_logits_gradient_(
    logits: Tensor,
    labels: Tensor,
    first: int,
    num_real: int,
    statistics: Tensor,
    normalizer: Tensor,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """`logits_gradient_` for float32, bfloat16 and float16, in one pass over the logits; does not read `statistics`."""
    rows, width = logits.shape
    work = logits if logits.stride(1) == 1 else logits.contiguous()
    config = tuned("cross_entropy", logits.device, "gradient")
    grid = (rows, triton.cdiv(width, config["BLOCK"]))
    sizes = (rows, work.stride(0), width, num_real, first)
    terms = (label_smoothing, label_smoothing / vocab_size, z_loss)
    launch(
        _cross_entropy_gradient,
        grid,
        work,
        labels.contiguous(),
        normalizer.contiguous(),
        *sizes,
        *terms,
        IGNORED=IGNORED_LABEL,
        **config,
    )
    if work is not logits:
        logits.copy_(work)
    return logits


TORCH_CROSS_ENTROPY = CrossEntropyKernels(local_statistics_, logits_gradient_)
TRITON_CROSS_ENTROPY = CrossEntropyKernels(triton_local_statistics_, triton_logits_gradient_)
