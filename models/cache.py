"""The keys and values of tokens seen before, and the record that one pass through the layers carries along."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.parameter import LayerContext

RotaryTables = tuple[Tensor, Tensor]
"""(cos, sin), each [seq, rotary_dim / 2], or [batch, seq, rotary_dim / 2] where samples stand at different positions."""


def local_kv_heads(config: TransformerConfig, tp_size: int) -> int:
    """Return how many key-value heads a tp rank computes with: its share, rounded up, or one where there are fewer heads than ranks."""
    return config.kv_heads_per_rank(tp_size)


class KeyValueCache:
    """Keys and values [batch, capacity, local kv heads, head_dim] of this rank's layers, made when a layer first writes.

    Args:
        batch: samples; capacity: most tokens of a sample.
    """

    def __init__(self, batch: int, capacity: int, config: TransformerConfig, context: LayerContext) -> None:
        self.capacity = capacity
        self.host_lengths: list[int] = [0] * batch
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=context.device)
        self._shape = (batch, capacity, local_kv_heads(config, context.tp.size), config.head_dim)
        self._context = context
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many tokens each sample has once the next pass has run, those of the pass included; fewer than before take tokens back.

        Raises ValueError where a length exceeds the capacity.
        """
        if max(lengths) > self.capacity:
            raise ValueError(
                f"a sample of {max(lengths)} tokens does not fit into a key-value cache of {self.capacity}"
            )
        self.host_lengths = list(lengths)
        with torch.inference_mode(False):  # a tensor with a version, by which the layers share what they make from it
            self.lengths = torch.tensor(self.host_lengths, dtype=torch.int32).to(self.lengths.device)

    def of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return (keys, values) of layer `index` (global number), zeros where nothing has been written."""
        if index not in self._layers:
            self._layers[index] = (self._empty(), self._empty())
        return self._layers[index]

    def _empty(self) -> Tensor:
        return torch.zeros(self._shape, dtype=self._context.dtype, device=self._context.device)


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """What one pass through the layers carries along.

    Args:
        first_sample: global index of the first sample, for the dropout masks.
        tables: rotary tables of the tokens' positions; None where positions enter otherwise.
        cache: keys and values of the tokens before; None where the pass has whole sequences.
        targets: [batch, predicted] int64, the tokens that the rows of a second stream predict; None where there is no
            such stream.
        sequence_weight: what the losses of one sequence's tokens count together in the gradient; a loss that a layer
            has of its own counts as much.
    """

    first_sample: int
    tables: RotaryTables | None = None
    cache: KeyValueCache | None = None
    sequence_weight: float = 0.0
    targets: Tensor | None = None
