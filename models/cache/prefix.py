"""Attention over packed sequences with common beginnings, whose keys and values are kept while later batches read them.

Each rank keeps those of its own layers and heads. What a unit (packing.Unit) reads lies in one piece: the kept prefix,
and behind it room for the keys of one unit, which the next unit overwrites.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.kernels.attention import AttentionOptions, masked_attention
from trimaran.kernels.dispatch import KernelSet
from trimaran.models.cache.packing import Packing, Unit

_FEW_KEYS = 1 << 20
"""Elements of a mask above which it is made anew in every layer, not kept for the batch."""


@dataclass(eq=False)
class _Kept:
    """Keys and values of a prefix in one layer, [1, length + room, kv heads, head_dim]."""

    keys: Tensor
    values: Tensor
    length: int


class PrefixCache:
    """What later batches read of earlier ones, in the layers of this rank."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], _Kept] = {}  # by layer and number of the prefix

    def of(self, layer: int, prefix: int) -> _Kept:
        """Return a kept prefix."""
        return self._kept[layer, prefix]

    def keep(self, layer: int, number: int, kept: _Kept) -> None:
        """Keep a prefix until it is dropped."""
        self._kept[layer, number] = kept

    def drop(self, numbers: tuple[int, ...]) -> None:
        """Forget the prefixes of these numbers, in every layer."""
        for key in [key for key in self._kept if key[1] in numbers]:
            del self._kept[key]


class PackedAttention:
    """A packed batch on one rank, and its attention in every layer.

    Args:
        cache: of this rank; the batch reads it and adds to it.
        multiple: padding makes the number of tokens a multiple of it (sequence parallelism: of tp).

    Attributes:
        tokens, positions: [1, tokens and padding] int64.
    """

    def __init__(self, packing: Packing, cache: PrefixCache, device: torch.device, multiple: int = 1) -> None:
        self.packing, self._cache = packing, cache
        padding = [0] * (-len(packing.tokens) % multiple)
        self.tokens = torch.tensor([*packing.tokens, *padding], device=device)[None]
        self.positions = torch.tensor([*packing.positions, *padding], device=device)[None]
        self._ends = torch.tensor(list(packing.ends), device=device)
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernels: KernelSet,
        options: AttentionOptions,
        slopes: Tensor | None,
    ) -> Tensor:
        """Return the attention of all tokens [1, tokens, heads, head_dim]; that of padding behind them is zero.

        Args:
            layer: global number.
            q: [1, tokens and padding, heads, head_dim]; k, v: the same of the key-value heads.
        """
        out = torch.zeros_like(q) if q.shape[1] > len(self.packing.tokens) else torch.empty_like(q)
        for number, unit in enumerate(self.packing.units):
            rows = slice(unit.start, unit.stop)
            keys, values = self._keys(layer, unit, k[:, rows], v[:, rows])
            if unit.is_chain and (unit.prefix is None or kernels.name == "triton"):
                out[:, rows] = kernels.attention(q[:, rows], keys, values, options, slopes=slopes)
            else:
                bias = self._bias(number, unit, keys.shape[1], options.window, slopes, q)
                out[:, rows] = masked_attention(q[:, rows], keys, values, bias, options)
        return out

    def _keys(self, layer: int, unit: Unit, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values that a unit reads, its own [1, new, kv heads, head_dim] included."""
        if unit.prefix is None and unit.keeps is None:
            return k, v
        before = None if unit.prefix is None else self._cache.of(layer, unit.prefix)
        past, new = 0 if before is None else before.length, k.shape[1]
        target = before
        if unit.keeps is not None:
            shape = (1, past + new + unit.room, *k.shape[2:])
            target = _Kept(k.new_empty(shape), v.new_empty(shape), past + new)
            if before is not None:
                target.keys[:, :past] = before.keys[:, :past]
                target.values[:, :past] = before.values[:, :past]
            self._cache.keep(layer, unit.keeps, target)
        assert target is not None
        target.keys[:, past : past + new] = k
        target.values[:, past : past + new] = v
        return target.keys[:, : past + new], target.values[:, : past + new]

    def _bias(
        self, number: int, unit: Unit, num_keys: int, window: int | None, slopes: Tensor | None, q: Tensor
    ) -> Tensor:
        """Return what is added to the scores of a unit: [1, 1, tokens, keys], with ALiBi's slopes of all heads."""
        mask = self._masks.get((number, window))
        if mask is None:
            mask = self._mask(unit, num_keys, window, q)
            if mask.numel() <= _FEW_KEYS:
                self._masks[number, window] = mask
        if slopes is None:
            return mask
        query, key = self._positions(unit, num_keys)
        distance = (query[:, None] - key).to(mask.dtype)
        return mask - slopes.to(mask.dtype).view(1, -1, 1, 1) * distance

    def _mask(self, unit: Unit, num_keys: int, window: int | None, q: Tensor) -> Tensor:
        """Return 0 where a token of a unit attends to a key, -inf elsewhere."""
        new, wide = unit.stop - unit.start, torch.promote_types(q.dtype, torch.float32)
        own = torch.arange(new, device=q.device)
        ends = self._ends[unit.start : unit.stop] - unit.start
        seen = (own[:, None] >= own) & (own[:, None] < ends)
        seen = torch.cat((seen.new_ones(new, num_keys - new), seen), dim=1)
        if window is not None:
            query, key = self._positions(unit, num_keys)
            seen &= query[:, None] - key < window
        return torch.zeros(seen.shape, dtype=wide, device=q.device).masked_fill_(~seen, -torch.inf)[None, None]

    def _positions(self, unit: Unit, num_keys: int) -> tuple[Tensor, Tensor]:
        """Return the positions of a unit's tokens and of the keys that it reads."""
        query = self.positions[0, unit.start : unit.stop]
        return query, torch.cat((torch.arange(num_keys - len(query), device=query.device), query))
