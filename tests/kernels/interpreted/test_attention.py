"""Attention kernels in the interpreter: every option, against the float64 reference."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.covering import covered, covering_array, label, pairs_of
from trimaran.kernels.attention import (
    AttentionDropout,
    AttentionOptions,
    Documents,
    alibi_slopes,
    attention,
    attention_with_lse,
    triton_attention,
    triton_attention_with_lse,
)
from trimaran.kernels.random import stream_key


def inputs(batch: int, seq_q: int, seq_k: int, heads: int, kv_heads: int, head_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(batch, seq_q, heads, head_dim), (batch, seq_k, kv_heads, head_dim), (batch, seq_k, kv_heads, head_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def both(options: AttentionOptions, **more: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (
        lambda q, k, v: triton_attention_with_lse(q, k, v, options, **more),
        lambda q, k, v: attention_with_lse(q, k, v, options, **more),
    )


SHAPES = [
    (2, 18, 18, 2, 2, 64),
    (1, 1, 1, 1, 1, 16),
    (1, 19, 19, 4, 2, 80),
    (2, 17, 17, 3, 1, 32),
    (1, 33, 33, 2, 1, 96),
    (1, 5, 40, 2, 2, 16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], equals_reference: Callable[..., None]) -> None:
    equals_reference(*both(AttentionOptions()), inputs(*shape), torch.float32)


# Tiles are 16 by 16: 37 keys are three tiles, the last of them cut. Windows see one key, part of a tile or all keys.
KEYS, HEADS = 37, 2
LEVELS: dict[str, Sequence[Any]] = {
    "window": (None, 1, 7, 40),
    "causal": (True, False),
    "softcap": (None, 2.5),
    "scale": (None, 0.7),
    "deterministic": (True, False),
    "alibi": (False, True),
    "documents": (False, True),
    "dropout": (0.0, 0.3),
    "dtype": (torch.float32, torch.float16),
    "kv_heads": (1, 2),
    "queries": (KEYS, 21),
}


def impossible(levels: Mapping[str, Any]) -> bool:
    """Packed documents are whole sequences: as many queries as keys."""
    return bool(levels.get("documents")) and levels.get("queries", KEYS) != KEYS


EVERYTHING = {name: levels[-1] for name, levels in LEVELS.items()} | {"window": 7, "causal": True, "queries": KEYS}
CASES = [*covering_array(LEVELS, impossible), EVERYTHING]


def test_the_cases_cover_every_pair_of_options() -> None:
    assert pairs_of(LEVELS, impossible) == covered(CASES, LEVELS)
    assert len(CASES) <= 13


@pytest.mark.parametrize("case", CASES, ids=label)
def test_options(case: dict[str, Any], equals_reference: Callable[..., None]) -> None:
    batch = 2 if case["documents"] else 1
    starts = torch.tensor([0, 1, 18, KEYS, 57, batch * KEYS], dtype=torch.int32)
    more = {
        "slopes": torch.tensor(alibi_slopes(HEADS)) if case["alibi"] else None,
        "documents": Documents(starts, longest=20) if case["documents"] else None,
        # The samples' numbers pass 2^32 / heads, and the heads are those of a rank that is not the first.
        "dropout": AttentionDropout(
            case["dropout"], stream_key(3, "x"), first_sample=2**29, first_head=3, total_heads=8
        )
        if case["dropout"]
        else None,
    }
    options = AttentionOptions(
        **{name: case[name] for name in ("window", "causal", "softcap", "scale", "deterministic")}
    )
    tensors = inputs(batch, case["queries"], KEYS, HEADS, case["kv_heads"], 16)
    equals_reference(*both(options, **more), tensors, case["dtype"])


def test_queries_before_every_key_get_zeros() -> None:
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(1, 40, 20, 2, 2, 16))
    out, lse = triton_attention_with_lse(q, k, v)
    expected, expected_lse = attention_with_lse(q, k, v)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert (lse[:, :20] == -torch.inf).all()
    out.sum().backward()
    assert q.grad is not None
    assert (q.grad[:, :20] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 2, 16), (2, 0, 4, 2, 2, 16), (2, 3, 0, 2, 2, 16)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(*shape))
    out = triton_attention(q, k, v, AttentionOptions(causal=False))
    torch.testing.assert_close(out, attention(q, k, v, AttentionOptions(causal=False)))
    out.sum().backward()
    assert q.grad is not None


def test_chunks_of_a_joint_projection_are_read_in_place(equals_reference: Callable[..., None]) -> None:
    joint = torch.randn(2, 20, 4 * 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    q = inputs(2, 20, 20, 2, 2, 16)[0]

    def call(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(q: Tensor, joint: Tensor) -> Tensor:
            k, v = (x.unflatten(-1, (2, 16)) for x in joint.chunk(2, dim=-1))
            return op(q, k, v)

        return attend

    equals_reference(call(triton_attention), call(attention), [q, joint], torch.float32)


def test_odd_head_dim_is_padded(equals_reference: Callable[..., None]) -> None:
    equals_reference(*both(AttentionOptions()), inputs(1, 20, 20, 2, 1, 13), torch.float16)


def test_a_head_too_wide_is_refused() -> None:
    q = torch.zeros(1, 2, 1, 257)
    with pytest.raises(ValueError, match=r"head_dim \(257\)"):
        triton_attention(q, q, q)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_without_end_is_no_window(causal: bool, equals_reference: Callable[..., None]) -> None:
    equals_reference(
        both(AttentionOptions(causal=causal, window=2**31 - 1))[0],
        both(AttentionOptions(causal=causal))[1],
        inputs(1, 20, 20, 2, 2, 16),
        torch.float32,
    )


def test_very_negative_scores_leave_no_trace_of_the_keys_past_the_end(equals_reference: Callable[..., None]) -> None:
    q, k, v = inputs(1, 20, 20, 2, 2, 16)
    with torch.no_grad():
        q.copy_(q.abs())
        k.copy_(-k.abs() * 40)  # every score about -100: exp(-lse) overflows
    equals_reference(*both(AttentionOptions(causal=False, deterministic=False)), [q, k, v], torch.float32)


def test_a_gradient_of_the_lse_that_is_nan_moves_nothing_where_no_key_is_seen() -> None:
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(1, 40, 20, 2, 2, 16))
    out, lse = triton_attention_with_lse(q, k, v)
    dlse = torch.zeros_like(lse)
    dlse[:, :20] = torch.nan
    for grad in torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), dlse]):
        assert grad.isfinite().all()


def test_strided_slopes_are_read_as_they_are(equals_reference: Callable[..., None]) -> None:
    slopes = torch.tensor(alibi_slopes(8))[::2]
    equals_reference(*both(AttentionOptions(), slopes=slopes), inputs(1, 20, 20, 4, 2, 16), torch.float32)


def test_a_nan_score_is_not_a_row_that_saw_nothing() -> None:
    q, k, v = (x.detach().float() for x in inputs(1, 20, 20, 1, 1, 16))
    q[0, 3] = torch.nan
    out, lse = triton_attention_with_lse(q, k, v)
    assert out[0, 3].isnan().all()
    assert lse[0, 3].isnan().all()
    assert lse[0, 4:].isfinite().all()
