"""Cross-entropy kernels in the interpreter: both passes against their references, on the cuts of simulated ranks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.covering import covering_array, label
from trimaran.kernels.cross_entropy import (
    IGNORED_LABEL,
    TORCH_CROSS_ENTROPY,
    TRITON_CROSS_ENTROPY,
    CrossEntropyKernels,
    combine,
)

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
"""Some roundings of the dtype; a gradient is at most one or so."""


def passes(
    kernels: CrossEntropyKernels,
    logits: Tensor,
    labels: Tensor,
    num_ranks: int,
    label_smoothing: float,
    z_loss: float,
    padding: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss [tokens], statistics [ranks, 3 or 4, tokens], gradient [tokens, vocab]).

    Each rank has two columns more than it needs.
    """
    tokens, vocab = logits.shape
    width = -(-vocab // num_ranks)
    padded = torch.full((tokens, width * num_ranks + 2), padding, dtype=logits.dtype)
    padded[:, :vocab] = logits
    parts = [padded[:, rank * width : (rank + 1) * width + 2].clone() for rank in range(num_ranks)]
    wheres = [(labels, rank * width, max(0, min(width, vocab - rank * width))) for rank in range(num_ranks)]
    found = [kernels.statistics_(part, *where, label_smoothing > 0) for part, where in zip(parts, wheres, strict=True)]
    statistics = torch.stack(found)
    loss, normalizer = combine(statistics, labels, vocab, label_smoothing, z_loss)
    gradients = []
    for part, where, own in zip(parts, wheres, found, strict=True):
        gradient = kernels.gradient_(part, *where, own, normalizer, vocab, label_smoothing, z_loss)
        assert not gradient[:, where[2] :].any(), "padded columns have no gradient"
        gradients.append(gradient[:, : where[2]])
    return loss, statistics, torch.cat(gradients, dim=1)


def case(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 100 + vocab)
    logits = (torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * 4).to(dtype)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[1::4] = IGNORED_LABEL
    return logits, labels


def assert_equal_reference(
    logits: Tensor, labels: Tensor, num_ranks: int, label_smoothing: float, z_loss: float, padding: float = 50.0
) -> None:
    terms = (num_ranks, label_smoothing, z_loss, padding)
    found = passes(TRITON_CROSS_ENTROPY, logits, labels, *terms)
    expected = passes(TORCH_CROSS_ENTROPY, logits.double(), labels, *terms)
    for name, a, b in zip(("loss", "statistics", "gradient"), found, expected, strict=True):
        assert a.dtype == (logits.dtype if name == "gradient" else torch.float32)
        # Losses and statistics are computed in float32 from the very same logits.
        tolerance = TOLERANCES[logits.dtype if name == "gradient" else torch.float32]
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# The interpreter's tiles are 16 columns wide.
SHAPES = [(1, 1), (5, 7), (4, 16), (3, 17), (2, 33), (6, 70), (0, 8)]


LEVELS = {
    "shape": SHAPES,
    "num_ranks": [1, 3],
    "smoothing_and_z_loss": [(0.0, 0.0), (0.1, 0.0), (0.2, 1e-2)],
    "dtype": [torch.float32, torch.float16],
}


@pytest.mark.parametrize("levels", covering_array(LEVELS), ids=label)
def test_equals_the_reference(levels: dict[str, Any]) -> None:
    logits, labels = case(*levels["shape"], levels["dtype"])
    assert_equal_reference(logits, labels, levels["num_ranks"], *levels["smoothing_and_z_loss"])


@pytest.mark.parametrize(("vocab", "num_ranks"), [(9, 8), (2, 8)])
def test_ranks_of_padding_alone(vocab: int, num_ranks: int) -> None:
    assert_equal_reference(*case(5, vocab, torch.float32), num_ranks, 0.1, 1e-2)


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf])
def test_what_stands_in_padded_columns_does_not_matter(padding: float) -> None:
    assert_equal_reference(*case(4, 20, torch.float32), 3, 0.1, 1e-2, padding)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_far_from_zero(shift: float) -> None:
    logits, labels = case(6, 40, torch.float32)
    assert_equal_reference(logits + shift, labels, 2, 0.0, 0.0)


def test_columns_of_minus_infinity_fill_whole_tiles() -> None:
    logits, labels = case(4, 64, torch.float32)
    logits[:, 0:40] = -math.inf
    labels[:] = 50
    assert_equal_reference(logits, labels, 1, 0.0, 0.0)


@pytest.mark.parametrize("transposed", [False, True], ids=["wide-rows", "transposed"])
def test_logits_that_are_not_contiguous(transposed: bool) -> None:
    logits, labels = case(5, 21, torch.float32)
    labels = labels.repeat_interleave(2)[::2]
    wide = logits.t().contiguous().t() if transposed else torch.cat((logits, torch.full((5, 9), 3.0)), dim=1)[:, :21]
    assert not wide.is_contiguous()
    kernels = TRITON_CROSS_ENTROPY
    statistics = kernels.statistics_(wide, labels, 0, 21)
    loss, normalizer = combine(statistics[None], labels, 21)
    assert kernels.gradient_(wide, labels, 0, 21, statistics, normalizer, 21) is wide
    expected = passes(TORCH_CROSS_ENTROPY, logits.double(), labels, 1, 0.0, 0.0, 0.0)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide.double(), expected[2], rtol=1e-5, atol=1e-5)


def test_the_statistics_pass_leaves_the_logits_alone() -> None:
    logits, labels = case(3, 30, torch.float32)
    before = logits.clone()
    TRITON_CROSS_ENTROPY.statistics_(logits, labels, 0, 30, True)
    assert logits.equal(before)
