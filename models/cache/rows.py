"""A key-value cache whose samples come and go: passes read a range of its rows, and rows change their places."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimaran.models.cache.key_value import KeyValueCache
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.parameter import LayerContext


class RowCache(KeyValueCache):
    """Keys and values of `batch` rows, each of which has the tokens that its owner knows of.

    On a CPU the kernel gives a row's memory where it is first written: rows that stay short cost little.
    """

    def __init__(self, batch: int, capacity: int, config: TransformerConfig, context: LayerContext) -> None:
        super().__init__(batch, capacity, config, context)
        self._config = config

    def view(self, first: int, lengths: Sequence[int]) -> KeyValueCache:
        """Return the rows from `first` on, which share the memory, as the cache of one pass.

        Args:
            lengths: of the rows after the pass, whose number is that of the rows.
        """
        return _View(self, first, lengths, self._config, self._context)

    def copy_row(self, target: int, source: "RowCache", row: int, tokens: int) -> None:
        """Make the first tokens of a row those of a row of `source`, which has the same layers."""
        for index, kept in source._layers.items():
            for mine, theirs in zip(self.of_layer(index, kept[0].shape[2]), kept, strict=True):
                mine[target, :tokens] = theirs[row, :tokens]

    def swap_rows(self, a: int, b: int, tokens_a: int, tokens_b: int) -> None:
        """Exchange two rows, of which row `a` has `tokens_a` tokens and row `b` has `tokens_b`."""
        if tokens_a < tokens_b:
            a, b, tokens_a, tokens_b = b, a, tokens_b, tokens_a
        for kept in self._layers.values():
            for part in kept:
                shorter = part[b, :tokens_b].clone()
                part[b, :tokens_a] = part[a, :tokens_a]
                part[a, :tokens_b] = shorter

    def _empty(self, kv_heads: int) -> Tensor:
        dtype, device = self._context.dtype, self._context.device
        if device.type == "cpu":  # see KeyValueCache
            shape = (self._batch, kv_heads, self.capacity, self._head_dim)
            return torch.empty(shape, dtype=dtype, device=device).transpose(1, 2)
        return torch.empty((self._batch, self.capacity, kv_heads, self._head_dim), dtype=dtype, device=device)


class _View(KeyValueCache):
    """Some rows of a RowCache for one pass."""

    def __init__(
        self,
        whole: RowCache,
        first: int,
        lengths: Sequence[int],
        config: TransformerConfig,
        context: LayerContext,
    ) -> None:
        super().__init__(len(lengths), whole.capacity, config, context)
        self._whole, self._rows = whole, slice(first, first + len(lengths))
        self.set_lengths(lengths)

    def of_layer(self, index: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Return (keys, values) of these rows in layer `index` (global number)."""
        keys, values = self._whole.of_layer(index, kv_heads)
        return keys[self._rows], values[self._rows]
