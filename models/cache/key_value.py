"""The key-value cache of a rank's layers, and the record that a forward pass hands to every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.kernels.attention import Documents
from trimaran.models.cache.prefix import PackedAttention
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.parameter import LayerContext

RotaryTables = tuple[Tensor, Tensor]
"""(cos, sin), each [seq, rotary_dim / 2], or [batch, seq, rotary_dim / 2] where samples have different positions."""


class KeyValueCache:
    """Keys and values [batch, capacity, kv heads, head_dim] of this rank's layers, allocated at first use.

    Args:
        batch: number of samples.
        capacity: most tokens of a sample.
    """

    def __init__(self, batch: int, capacity: int, config: TransformerConfig, context: LayerContext) -> None:
        self.capacity = capacity
        self.host_lengths: list[int] = [0] * batch
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=context.device)
        self._batch, self._head_dim = batch, config.head_dim
        self._context = context
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Set how many tokens each sample has after the next forward pass; a smaller number drops its last tokens.

        Raises ValueError where a length exceeds the capacity.
        """
        if max(lengths) > self.capacity:
            raise ValueError(
                f"a sample of {max(lengths)} tokens does not fit into a key-value cache of {self.capacity}"
            )
        self.host_lengths = list(lengths)
        with torch.inference_mode(False):  # kernels cache on this tensor, which takes a version counter
            self.lengths = torch.tensor(self.host_lengths, dtype=torch.int32).to(self.lengths.device)

    def of_layer(self, index: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Return (keys, values) of layer `index` (global number); initially zeros.

        Args:
            kv_heads: key-value heads that this rank computes with.
        """
        if index not in self._layers:
            self._layers[index] = (self._empty(kv_heads), self._empty(kv_heads))
        return self._layers[index]

    def begin_with(self, other: "KeyValueCache") -> None:
        """Copy the tokens of the samples of `other`, in the layers that it has, to the beginning of this cache's.

        Each sample of `other` begins as many consecutive samples: all, where it has one.
        """
        copies = self._batch // len(other.host_lengths)
        for index, (keys, values) in other._layers.items():
            for mine, theirs in zip(self.of_layer(index, keys.shape[2]), (keys, values), strict=True):
                mine[:, : other.capacity].unflatten(0, (-1, copies)).copy_(theirs.unsqueeze(1))

    def _empty(self, kv_heads: int) -> Tensor:
        dtype, device = self._context.dtype, self._context.device
        if device.type == "cpu":  # torch's attention reads head by head: the tokens of one lie together
            shape = (self._batch, kv_heads, self.capacity, self._head_dim)
            return torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)
        return torch.zeros((self._batch, self.capacity, kv_heads, self._head_dim), dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """The inputs that all layers share in one forward pass.

    Args:
        first_sample: global index of the first sample, for the dropout masks.
        tables: rotary tables of the tokens' positions; None without rotary positions.
        cache: keys and values of earlier tokens; None where the batch has whole sequences.
        packed: the attention of a packed batch; None where samples are apart.
        sequence_weight: total weight of one sequence's token losses in the gradient, which is also the weight of its
            load-balancing loss.
        targets: [batch, predicted] int64, the positions that the query stream predicts; None without a query stream.
        documents: packed into the rows; None where a row is one.
    """

    first_sample: int
    tables: RotaryTables | None = None
    cache: KeyValueCache | None = None
    sequence_weight: float = 0.0
    targets: Tensor | None = None
    packed: PackedAttention | None = None
    documents: Documents | None = None
