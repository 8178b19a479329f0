"""The signature of every op as a Protocol, which both implementations satisfy: mypy checks each call against it.

The torch reference that each Protocol names documents the arguments.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from trimaran.kernels.adamw import AdamWState
from trimaran.kernels.attention import AttentionDropout, AttentionOptions, Documents


class Attention(Protocol):
    """`attention.reference.attention`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: AttentionOptions = ...,
        *,
        slopes: Tensor | None = None,
        documents: Documents | None = None,
        dropout: AttentionDropout | None = None,
    ) -> Tensor: ...


class KeepsScores(Protocol):
    """`attention.reference.keeps_scores`."""

    def __call__(self, options: AttentionOptions, dropout: AttentionDropout | None) -> bool: ...


class AttentionWithLse(Protocol):
    """`attention.reference.attention_with_lse`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: AttentionOptions = ...,
        *,
        slopes: Tensor | None = None,
        documents: Documents | None = None,
        dropout: AttentionDropout | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class DecodeAttention(Protocol):
    """`decode.reference.decode_attention`."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: Tensor,
        *,
        block_table: Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        scale: float | None = None,
        max_length: int | None = None,
    ) -> Tensor: ...


class AppendToCache(Protocol):
    """`decode.cache.append_to_cache_`."""

    def __call__(
        self,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        *,
        block_table: Tensor | None = None,
    ) -> None: ...


class RMSNorm(Protocol):
    """`norm.rms_norm`."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class LayerNorm(Protocol):
    """`norm.layer_norm`."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor: ...


class AddRMSNorm(Protocol):
    """`norm.add_rms_norm`."""

    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...


class AddLayerNorm(Protocol):
    """`norm.add_layer_norm`."""

    def __call__(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]: ...


class Rotary(Protocol):
    """`rotary.rotary`, and `rotary.rotary_` in place."""

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor: ...


class Dropout(Protocol):
    """`dropout.dropout`."""

    def __call__(
        self, x: Tensor, rate: float, *, seed: int, site: str, first_sample: int, first_position: int, seq_len: int
    ) -> Tensor: ...


class DropoutAdd(Protocol):
    """`dropout.dropout_add`."""

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        rate: float,
        *,
        seed: int,
        site: str,
        first_sample: int,
        first_position: int,
        seq_len: int,
    ) -> Tensor: ...


class AdamW(Protocol):
    """`adamw.adamw_`."""

    def __call__(
        self,
        states: Sequence[AdamWState],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        grad_factor: float = 1.0,
    ) -> None: ...


class Activation(Protocol):
    """`activation.gelu` and the others of that file."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


class CrossEntropyStatistics(Protocol):
    """`cross_entropy.local_statistics_`."""

    def __call__(self, logits: Tensor, labels: Tensor, first: int, num_real: int, with_sum: bool = False) -> Tensor: ...


class CrossEntropyGradient(Protocol):
    """`cross_entropy.logits_gradient_`."""

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        first: int,
        num_real: int,
        statistics: Tensor,
        normalizer: Tensor,
        vocab_size: int,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor: ...
