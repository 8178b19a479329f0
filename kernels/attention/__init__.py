"""Scaled dot-product attention (Vaswani et al. 2017, equation 1) and what has been added to it since.

    attention(q, k, v) = dropout(softmax(softcap(scale q k^T) - slope |i - j| + mask)) v

causal or full; grouped-query heads (Ainslie et al. 2023); sliding window; ALiBi (Press et al. 2022); logit soft-cap
(Gemma 2, 2024); packed documents; dropout by counter; the log-sum-exp as a second, differentiable output. `attention`
is the torch reference, `triton_attention` the kernels.

Tiles of the kernels reach past the end of a document and, for heads narrower than a tile, into the next head; what lies
there is weighted by zero. So an infinite or NaN value may spread to its neighbours in the batch, which it does not in
the reference. Finite values never do.
"""

from trimaran.kernels.attention.function import triton_attention, triton_attention_with_lse
from trimaran.kernels.attention.options import CAUSAL, AttentionDropout, AttentionOptions, Documents, alibi_slopes
from trimaran.kernels.attention.reference import attention, attention_with_lse

__all__ = [
    "CAUSAL",
    "AttentionDropout",
    "AttentionOptions",
    "Documents",
    "alibi_slopes",
    "attention",
    "attention_with_lse",
    "triton_attention",
    "triton_attention_with_lse",
]
