"""Scaled dot-product attention (Vaswani et al. 2017, equation 1) and its later variants.

    attention(q, k, v) = dropout(softmax(softcap(scale q k^T) - slope |i - j| + mask)) v

Causal or full; grouped-query heads (Ainslie et al. 2023); sliding window; ALiBi (Press et al. 2022); logit soft-cap
(Gemma 2, 2024); packed documents; counter-based dropout; the log-sum-exp as a second, differentiable output.
`attention` is the torch reference, `triton_attention` runs the kernels.

A tile of the kernels may reach past the end of a document and, for a head narrower than the tile, into the next head;
those elements get weight zero. An infinite or NaN value there spreads, unlike in the reference. A finite one does not.
"""

from trimaran.kernels.attention.function import triton_attention, triton_attention_with_lse, triton_keeps_scores
from trimaran.kernels.attention.masked import masked_attention
from trimaran.kernels.attention.options import CAUSAL, AttentionDropout, AttentionOptions, Documents, alibi_slopes
from trimaran.kernels.attention.reference import attention, attention_with_lse, keeps_scores

__all__ = [
    "CAUSAL",
    "AttentionDropout",
    "AttentionOptions",
    "Documents",
    "alibi_slopes",
    "attention",
    "attention_with_lse",
    "keeps_scores",
    "masked_attention",
    "triton_attention",
    "triton_attention_with_lse",
    "triton_keeps_scores",
]
