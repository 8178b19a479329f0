"""The options of attention: which keys a query attends to, how scores are modified, how dropout draws its mask."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimaran.kernels.random import Key


@dataclass(frozen=True)
class AttentionDropout:
    """Counter-based dropout of the probabilities, independent of the layout.

    An element's row in the mask is ((sample * total_heads) + head) * seq + query, its column the key's position (in its
    document).

    Args:
        rate: probability of dropping, in [0, 1).
        key: from `kernels.random.stream_key`.
        first_sample: global number of the first sample.
        first_head: global number of the first query head.
        total_heads: query heads of the layer on all ranks.
    """

    rate: float
    key: Key
    first_sample: int
    first_head: int
    total_heads: int


@dataclass(frozen=True)
class AttentionOptions:
    """The variant of attention, fixed for a layer.

    Args:
        causal: a query attends to no key after its own position. Where keys outnumber queries, the queries have the
            last positions.
        window: a query attends to itself and the window - 1 positions before it (not causal: and after it); None: to
            all. Sliding window: Beltagy et al. 2020, section 3.1; Jiang et al. (Mistral) 2023.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2 report, 2024, section 2); None: no cap.
        scale: factor of the query-key products; None: head_dim ** -0.5.
        deterministic: the backward pass gives the same bits every time. Otherwise it may sum the queries' gradient with
            atomic additions, whose order changes from run to run: five matrix products instead of seven.
    Raises ValueError for a window below 1 or a softcap or scale that is not positive.
    """

    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        for name in ("window", "softcap", "scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"attention's {name} ({value}) must be positive, or None")

    def scale_for(self, head_dim: int) -> float:
        """Return the factor of the query-key products."""
        return head_dim**-0.5 if self.scale is None else self.scale


CAUSAL = AttentionOptions()


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents packed into the sequences of a batch; a query attends to keys of its own document only.

    Args:
        starts: [documents + 1] int32, first token of each document in the flattened [batch * seq] tokens, ascending,
            then the number of tokens. A sequence must not begin in the middle of a document.
        longest: tokens of the longest document, or more; on the host, because it sizes the kernels' grid.
    """

    starts: Tensor
    longest: int

    @cached_property
    def numbers(self) -> Tensor:
        """[tokens] int64, the document of each token."""
        tokens = torch.arange(int(self.starts[-1]), device=self.starts.device)
        return torch.searchsorted(self.starts[1:].contiguous(), tokens.to(self.starts.dtype), right=True)


@dataclass(frozen=True)
class Sizes:
    """The checked sizes of one call."""

    batch: int
    seq_q: int
    seq_k: int
    heads: int
    kv_heads: int
    head_dim: int


def sizes_of(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, documents: Documents | None) -> Sizes:
    """Return the sizes of a call of `attention`.

    Raises ValueError with rule and values for inconsistent shapes.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(
            f"attention needs q [batch, seq, heads, head_dim] and k, v [batch, keys, kv_heads, head_dim], got {shapes}"
        )
    sizes = Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    if sizes.kv_heads == 0 or sizes.heads % sizes.kv_heads:
        raise ValueError(
            f"attention's query heads ({sizes.heads}) must be a multiple of its key-value heads ({sizes.kv_heads})"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention needs q, k and v of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if documents is not None and documents.starts.dtype != torch.int32:
        raise ValueError(f"the starts of packed documents must be int32, got {documents.starts.dtype}")
    if slopes is not None and slopes.shape != (sizes.heads,):
        raise ValueError(
            f"attention needs one ALiBi slope a query head ({sizes.heads}), got shape {tuple(slopes.shape)}"
        )
    if documents is not None and sizes.seq_q != sizes.seq_k:
        raise ValueError(f"packed documents need as many queries ({sizes.seq_q}) as keys ({sizes.seq_k})")
    return sizes


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slope of every head (Press et al. 2022, section 3): 2^(-8/n), 2^(-16/n), ... for n a power of two.

    For other n: the slopes of the next lower power of two, then every other slope of the next higher one, as in the
    authors' code.
    """
    below = 1 << (num_heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * i / below) for i in range(1, below + 1)]
    between = [2.0 ** (-4.0 * i / below) for i in range(1, 2 * below, 2)]
    return first + between[: num_heads - below]
