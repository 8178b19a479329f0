"""One call of the Triton attention: its tensors as the kernels want them, and the arguments that all of them take."""

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

_CACHE_BYTES = (
    24 * 2**20
)  # keys and values in flight together: half of the second-level cache of an H100 (50 MB) or an A100 (40 MB)
_ALIGNMENT = 16  # bytes: what a tensor descriptor asks of its base and of every stride
NOT_SPECIALIZED = (
    *("blocks", "num_head_indices", "tile_group", "seq_q", "seq_k", "tokens", "total_heads"),
    *("first_row", "key0", "key1", "mask_blocks", "threshold"),
)
"""Arguments that change from call to call: a kernel must not be compiled again where one of them is 1 or divisible by 16."""


class Variant(NamedTuple):
    """What a kernel is compiled for, besides its tile sizes. Triton tells compiled kernels apart by the text of this record: leave its `str` whole.

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
        q: [batch * seq_q, heads, head_dim]; k, v: [batch * seq_k, kv_heads, head_dim]; all fit for tensor descriptors,
            their head dim padded to a multiple of 16 bytes.
        sizes: of the call, before that padding.
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
        """Sequences, or documents: what is attended to on its own."""
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
        """Of the tuned table."""
        key = f"d{max(64, self.tile_dim)}"  # narrower heads fit wherever 64 does
        if self.q.dtype == torch.float32:
            return f"{key}_float32"
        # What these need takes registers.
        extras = self.dropout is not None or self.options.softcap is not None or self.tile_dim != self.q.shape[2]
        return f"{key}_extras" if extras else key

    def config(self, op: str) -> dict[str, int]:
        """Return the tuned configuration of one of the kernels."""
        return tuned(op, self.q.device, self._key)

    @property
    def is_fused(self) -> bool:
        """Whether one kernel makes all three gradients, with atomic additions: where that is allowed and the chip has a configuration for it."""
        return not self.options.deterministic and has_tuned("attention_backward_fused", self.q.device, self._key)

    def describe(self, x: Tensor, rows: int) -> TensorDescriptor:
        """Return the descriptor of tiles [rows, tile_dim], at [token, head * head_dim]; what lies outside `x` reads as zero."""
        tokens, heads, head_dim = x.shape
        return TensorDescriptor(x, [tokens, heads * head_dim], [x.stride(0), 1], [rows, self.tile_dim])

    def tile_group(self, num_head_indices: int) -> int:
        """Return how many head indices (query heads of a sequence) run together, so that what they read stays in the cache."""
        per_head = 2 * self.longest_k * self.k.shape[2] * self.k.element_size() // self.group
        return max(1, min(num_head_indices, _CACHE_BYTES // max(1, per_head)))

    def arguments(self, blocks: int, num_head_indices: int, tile_group: int) -> tuple[Any, ...]:
        """Return what every kernel takes after its own tensors, in order."""
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
        # A wider window is no window; positions with one added must stay in 32 bits.
        window = 0 if options.window is None else min(options.window, sizes.seq_q + sizes.seq_k)
        variant = (window, options.scale_for(sizes.head_dim), options.softcap or 1.0)
        if dropout is None:
            return (starts, slopes, *shape, *variant, 0, 1, 0, 0, 1, 0, 1.0)
        first_row = (dropout.first_sample * dropout.total_heads + dropout.first_head) * sizes.seq_q
        key0, key1, threshold = keep_arguments(dropout.key, dropout.rate)
        draw = (first_row, dropout.total_heads, key0, key1, -(-sizes.seq_k // 4), threshold)
        return (starts, slopes, *shape, *variant, *draw, 1.0 / (1.0 - dropout.rate))

    def constants(self) -> dict[str, Any]:
        """Return the constexpr arguments of every kernel, but for its tile sizes."""
        variant = Variant(
            causal=self.options.causal,
            window=self.options.window is not None,
            softcap=self.options.softcap is not None,
            alibi=self.slopes is not None,
            documents=self.documents is not None,
            dropout=self.dropout is not None,
            # Of float32 all digits count: three products of TF32 parts give nearly all of them (Ootomo and Yokota
            # 2022).
            precision="tf32x3" if self.q.dtype == torch.float32 else "tf32",
            padded=self.tile_dim != self.q.shape[2],
        )
        return {"V": variant, "HEAD_DIM": self.tile_dim}


def tokens_of(x: Tensor) -> Tensor:
    """Return x [batch, seq, heads, head_dim] as [batch * seq, heads, head_dim], fit for a tensor descriptor: a view of x where x is fit.

    The head dim is padded with zeros to a multiple of 16 bytes.
    """
    elements = _ALIGNMENT // x.element_size()
    if x.shape[-1] % elements:
        x = F.pad(x, (0, -x.shape[-1] % elements))
    x = x.reshape(-1, *x.shape[2:])
    fit = x.data_ptr() % _ALIGNMENT == 0 and x.stride(0) % elements == 0 and x.stride()[1:] == (x.shape[2], 1)
    return x if fit else x.clone(memory_format=torch.contiguous_format)
