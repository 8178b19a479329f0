"""Chooses the implementation of the ops: Triton on a GPU, plain torch elsewhere, or what the run spec says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch

from trimaran.kernels import activation, adamw, cross_entropy, decode, dropout, norm, rotary, signatures
from trimaran.kernels.attention import (
    attention,
    attention_with_lse,
    keeps_scores,
    triton_attention,
    triton_attention_with_lse,
    triton_keeps_scores,
)
from trimaran.kernels.cross_entropy import CrossEntropyKernels
from trimaran.kernels.launch import why_not_triton
from trimaran.kernels.limits import LARGEST_HEAD_DIM, Backend


@dataclass(frozen=True, eq=False)
class KernelSet:
    """One implementation of every op, each documented at its torch reference, which has the same name.

    Args:
        name: "triton" or "torch".
        activations: by their names in a model's config.
    """

    name: Literal["triton", "torch"]
    attention: signatures.Attention
    attention_with_lse: signatures.AttentionWithLse
    keeps_scores: signatures.KeepsScores
    decode_attention: signatures.DecodeAttention
    append_to_cache_: signatures.AppendToCache
    rms_norm: signatures.RMSNorm
    layer_norm: signatures.LayerNorm
    add_rms_norm: signatures.AddRMSNorm
    add_layer_norm: signatures.AddLayerNorm
    rotary: signatures.Rotary
    rotary_: signatures.Rotary
    dropout: signatures.Dropout
    dropout_add: signatures.DropoutAdd
    cross_entropy: CrossEntropyKernels
    adamw_: signatures.AdamW
    activations: Mapping[str, signatures.Activation] = field(repr=False)

    def __reduce__(self) -> tuple[Callable[[str], "KernelSet"], tuple[str]]:
        """Copy and pickle by name, because models hold kernels and are copied and pickled."""
        return _by_name, (self.name,)


TORCH = KernelSet(
    name="torch",
    attention=attention,
    attention_with_lse=attention_with_lse,
    keeps_scores=keeps_scores,
    decode_attention=decode.decode_attention,
    append_to_cache_=decode.append_to_cache_,
    rms_norm=norm.rms_norm,
    layer_norm=norm.layer_norm,
    add_rms_norm=norm.add_rms_norm,
    add_layer_norm=norm.add_layer_norm,
    rotary=rotary.rotary,
    rotary_=rotary.rotary_,
    dropout=dropout.dropout,
    dropout_add=dropout.dropout_add,
    cross_entropy=cross_entropy.TORCH_CROSS_ENTROPY,
    adamw_=adamw.adamw_,
    activations=MappingProxyType(
        {
            "relu": activation.relu,
            "gelu": activation.gelu,
            "gelu_tanh": activation.gelu_tanh,
            "swiglu": activation.swiglu,
            "geglu": activation.geglu,
            "geglu_tanh": activation.geglu_tanh,
        }
    ),
)
TRITON = KernelSet(
    name="triton",
    attention=triton_attention,
    attention_with_lse=triton_attention_with_lse,
    keeps_scores=triton_keeps_scores,
    decode_attention=decode.triton_decode_attention,
    append_to_cache_=decode.triton_append_to_cache_,
    rms_norm=norm.triton_rms_norm,
    layer_norm=norm.triton_layer_norm,
    add_rms_norm=norm.triton_add_rms_norm,
    add_layer_norm=norm.triton_add_layer_norm,
    rotary=rotary.triton_rotary,
    rotary_=rotary.triton_rotary_,
    dropout=dropout.triton_dropout,
    dropout_add=dropout.triton_dropout_add,
    cross_entropy=cross_entropy.TRITON_CROSS_ENTROPY,
    adamw_=adamw.triton_adamw_,
    activations=MappingProxyType(
        {
            "relu": activation.relu,
            "gelu": activation.triton_gelu,
            "gelu_tanh": activation.triton_gelu_tanh,
            "swiglu": activation.triton_swiglu,
            "geglu": activation.triton_geglu,
            "geglu_tanh": activation.triton_geglu_tanh,
        }
    ),
)


def _by_name(name: str) -> KernelSet:
    return TRITON if name == "triton" else TORCH


def choose_kernels(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[KernelSet, str]:
    """Return the kernels for a model of this dtype and head width on `device`, and a phrase that names the choice.

    "auto" chooses Triton wherever it can run. Raises ValueError where `backend` is "triton" and Triton can't run, with
    the reason, and for an unknown backend.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels.backend ({backend!r}) must be 'auto', 'triton' or 'torch'")
    if backend == "torch":
        return TORCH, "torch's kernels"
    reason = why_not_triton(device, dtype)
    if reason is None and head_dim > LARGEST_HEAD_DIM:
        reason = f"attention takes a head_dim of at most {LARGEST_HEAD_DIM} and this model has {head_dim}"
    if reason is None:
        return TRITON, "Triton's kernels"
    if backend == "triton":
        rule = f"kernels.backend is triton, and the Triton kernels can't run: {reason}"
        raise ValueError(f"{rule}; set kernels.backend to auto or torch")
    # On a CPU nobody expects Triton; on a GPU the user must learn why it is not used.
    return TORCH, "torch's kernels" if device.type == "cpu" else f"torch's kernels (Triton's can't run: {reason})"
