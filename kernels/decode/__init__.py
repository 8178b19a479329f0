"""Attention over a key-value cache during generation, and appending new tokens to the cache.

decode_attention, append_to_cache_                  plain torch
triton_decode_attention, triton_append_to_cache_    Triton, same arguments
"""

from trimaran.kernels.decode.cache import append_to_cache_, triton_append_to_cache_
from trimaran.kernels.decode.reference import decode_attention
from trimaran.kernels.decode.split import triton_decode_attention

__all__ = ["append_to_cache_", "decode_attention", "triton_append_to_cache_", "triton_decode_attention"]
