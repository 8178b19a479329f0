"""One call of the Triton attention: its tensors in the kernels' layout, and the arguments that the kernels share."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from trimaran.kernels.attention.options import AttentionDropout, AttentionOptions, Documents, Sizes
from trimaran.kernels.launch import has_tuned, tuned
from trimaran.kernels.random import keep_arguments

# Keys and values in use at once: about half of the second-level cache of an H100 (50 MB) or an A100 (40 MB).
_CACHE_BYTES = 24 * 2**20
_ALIGNMENT = 16  # bytes: a tensor descriptor requires it of the base and of every stride
NOT_SPECIALIZED = (
    *("blocks", "num_head_indices", "tile_group", "seq_q", "seq_k", "tokens", "total_heads"),
    *("first_row", "key0", "key1", "mask_blocks", "threshold"),
)
"""Arguments that change between calls: Triton must not compile again where one is 1 or divisible by 16."""


class Variant(NamedTuple):
    """The constants of a compiled kernel, besides its tile sizes.

    Triton's cache distinguishes kernels by the text of this record, so its `str` must contain every field.

    Args:
        precision: of the matrix products of float32 tiles.
        padded: whether a head is narrower than its tile.
    """

    causal: bool
    window: bool
    softcap: bool
    alibi: bool
    documents: bool
    dropout: bool
    precision: str
    padded: bool


@dataclass(frozen=True, eq=False)
class Call:
    """The tensors [tokens, heads, head_dim] of one call, and its variant.

    Args:
        q: [batch * seq_q, heads, head_dim]; k, v: [batch * seq_k, kv_heads, head_dim]; all aligned for tensor
            descriptors, with the head dim padded to a multiple of 16 bytes.
        sizes: before that padding.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sizes: Sizes
    options: AttentionOptions
    slopes: Tensor | None
    documents: Documents | None
    dropout: AttentionDropout | None

    @property
    def count(self) -> int:
        """Number of sequences, or of packed documents."""
        return self.sizes.batch if self.documents is None else len(self.documents.starts) - 1

    @property
    def longest_q(self) -> int:
        """Queries of the longest sequence or document."""
        return self.sizes.seq_q if self.documents is None else min(self.sizes.seq_q, self.documents.longest)

    @property
    def longest_k(self) -> int:
        """Keys of the longest sequence or document."""
        return self.sizes.seq_k if self.documents is None else self.longest_q

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.sizes.heads // self.sizes.kv_heads

    @property
    def tile_dim(self) -> int:
        """The head's width in a tile: a power of two."""
        return max(16, int(triton.next_power_of_2(self.q.shape[2])))

    @property
    def _key(self) -> str:
        """Key in the tuned table."""
        key = f"d{max(64, self.tile_dim)}"  # narrower heads fit the configuration of 64
        if self.q.dtype == torch.float32:
            return f"{key}_float32"
        # These take more registers.
        extras = self.dropout is not None or self.options.softcap is not None or self.tile_dim != self.q.shape[2]
        return f"{key}_extras" if extras else key

    def config(self, op: str) -> dict[str, int]:
        """Return the tuned configuration of one of the kernels."""
        return tuned(op, self.q.device, self._key)

    @property
    def is_fused(self) -> bool:
        """Whether one kernel computes all three gradients, with atomics: allowed, and tuned for the chip."""
        return not self.options.deterministic and has_tuned("attention_backward_fused", self.q.device, self._key)

    def describe(self, x: Tensor, rows: int) -> TensorDescriptor:
        """Return the descriptor of tiles [rows, tile_dim] at [token, head * head_dim]; zeros are read outside `x`."""
        tokens, heads, head_dim = x.shape
        return TensorDescriptor(x, [tokens, heads * head_dim], [x.stride(0), 1], [rows, self.tile_dim])

    def tile_group(self, num_head_indices: int) -> int:
        """Return how many head indices (query heads of a sequence) run together so that their keys stay in cache."""
        per_head = 2 * self.longest_k * self.k.shape[2] * self.k.element_size() // self.group
        return max(1, min(num_head_indices, _CACHE_BYTES // max(1, per_head)))

    def arguments(self, blocks: int, num_head_indices: int, tile_group: int) -> tuple[Any, ...]:
        """Return the arguments that every kernel takes after its own tensors, in order."""
        sizes, options, dropout = self.sizes, self.options, self.dropout
        device = self.q.device
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        starts = nothing if self.documents is None else self.documents.starts.contiguous()
        slopes = nothing if self.slopes is None else self.slopes.contiguous()
        shape = (
            blocks,
            num_head_indices,
            tile_group,
            sizes.seq_q,
            sizes.seq_k,
            len(self.q),
            sizes.heads,
            self.group,
            self.q.shape[2],
        )
        # A window wider than the sequence is none; the bound keeps position + window in 32 bits.
        window = 0 if options.window is None else min(options.window, sizes.seq_q + sizes.seq_k)
        variant = (window, options.scale_for(sizes.head_dim), options.softcap or 1.0)
        if dropout is None:
            return (starts, slopes, *shape, *variant, 0, 1, 0, 0, 1, 0, 1.0)
        first_row = (dropout.first_sample * dropout.total_heads + dropout.first_head) * sizes.seq_q
        key0, key1, threshold = keep_arguments(dropout.key, dropout.rate)
        draw = (first_row, dropout.total_heads, key0, key1, -(-sizes.seq_k // 4), threshold)
        return (starts, slopes, *shape, *variant, *draw, 1.0 / (1.0 - dropout.rate))

    def constants(self) -> dict[str, Any]:
        """Return the constexpr arguments of every kernel except tile sizes."""
        variant = Variant(
            causal=self.options.causal,
            window=self.options.window is not None,
            softcap=self.options.softcap is not None,
            alibi=self.slopes is not None,
            documents=self.documents is not None,
            dropout=self.dropout is not None,
            # Three products of TF32 parts have nearly float32's precision (Ootomo and Yokota 2022).
            precision="tf32x3" if self.q.dtype == torch.float32 else "tf32",
            padded=self.tile_dim != self.q.shape[2],
        )
        return {"V": variant, "HEAD_DIM": self.tile_dim}


def tokens_of(x: Tensor) -> Tensor:
    """Return x [batch, seq, heads, head_dim] as [batch * seq, heads, head_dim], aligned for a tensor descriptor.

    A view of x where x is aligned. The head dim is padded with zeros to a multiple of 16 bytes.
    """
    elements = _ALIGNMENT // x.element_size()
    if x.shape[-1] % elements:
        x = F.pad(x, (0, -x.shape[-1] % elements))
    x = x.reshape(-1, *x.shape[2:])
    fit = x.data_ptr() % _ALIGNMENT == 0 and x.stride(0) % elements == 0 and x.stride()[1:] == (x.shape[2], 1)
    return x if fit else x.clone(memory_format=torch.contiguous_format)
