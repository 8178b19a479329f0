"""The Triton attention as an autograd function."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimaran.kernels.attention.backward import attention_backward
from trimaran.kernels.attention.call import Call, tokens_of
from trimaran.kernels.attention.forward import attention_forward
from trimaran.kernels.attention.options import CAUSAL, AttentionDropout, AttentionOptions, Documents, Sizes, sizes_of
from trimaran.kernels.limits import LARGEST_HEAD_DIM


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sizes: Sizes,
        options: AttentionOptions,
        slopes: Tensor | None,
        documents: Documents | None,
        dropout: AttentionDropout | None,
    ) -> tuple[Tensor, Tensor]:
        call = Call(tokens_of(q), tokens_of(k), tokens_of(v), sizes, options, slopes, documents, dropout)
        out, lse = attention_forward(call)
        ctx.save_for_backward(call.q, call.k, call.v, out, lse)
        ctx.variant = (sizes, options, slopes, documents, dropout)
        ctx.set_materialize_grads(False)
        shaped = out[..., : sizes.head_dim].view(sizes.batch, sizes.seq_q, sizes.heads, sizes.head_dim)
        return shaped, lse.view(sizes.heads, sizes.batch, sizes.seq_q).permute(1, 2, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout, dlse = grads
        sizes: Sizes = ctx.variant[0]
        dout = torch.zeros_like(out) if dout is None else tokens_of(dout).contiguous()
        if dlse is not None:
            dlse = dlse.permute(2, 0, 1).contiguous().view(lse.shape)
        found = attention_backward(Call(q, k, v, *ctx.variant), out, lse, dout, dlse)
        lengths = (sizes.seq_q, sizes.seq_k, sizes.seq_k)
        dq, dk, dv = (
            x[..., : sizes.head_dim].unflatten(0, (sizes.batch, seq)) for x, seq in zip(found, lengths, strict=True)
        )
        return dq, dk, dv, None, None, None, None, None


def triton_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions = CAUSAL,
    *,
    slopes: Tensor | None = None,
    documents: Documents | None = None,
    dropout: AttentionDropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (attention, log-sum-exp) as `attention_with_lse`; ValueError also for a head wider than 256."""
    sizes = sizes_of(q, k, v, slopes, documents)
    if sizes.head_dim > LARGEST_HEAD_DIM:
        raise ValueError(
            f"Triton attention needs a head_dim ({sizes.head_dim}) of at most {LARGEST_HEAD_DIM}; use the torch backend"
        )
    if slopes is not None and slopes.requires_grad:
        raise ValueError("Triton attention makes no gradient of ALiBi slopes; detach them, or use the torch backend")
    if sizes.batch * sizes.seq_q * sizes.seq_k * sizes.heads * sizes.head_dim == 0:
        # Without elements: zeros that stay connected to the graph.
        nothing = (k.sum() + v.sum()) * 0.0
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        return q * 0.0 + nothing, lse
    found: tuple[Tensor, Tensor] = _Attention.apply(  # type: ignore[no-untyped-call]
        q, k, v, sizes, options, slopes, documents, dropout
    )
    return found


def triton_keeps_scores(options: AttentionOptions, dropout: AttentionDropout | None) -> bool:
    """Return False: the backward kernels compute the scores again."""
    return False


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions = CAUSAL,
    *,
    slopes: Tensor | None = None,
    documents: Documents | None = None,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """Return attention as the reference `attention`."""
    return triton_attention_with_lse(q, k, v, options, slopes=slopes, documents=documents, dropout=dropout)[0]
