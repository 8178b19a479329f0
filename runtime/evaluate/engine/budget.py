"""How much is computed at once where the batch size is auto: what the free memory of the ranks has room for.

The estimates are upper bounds, and a share of what is free is taken, so that a wrong one costs speed alone: scores do
not depend on the size of a batch beyond rounding.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Final

import torch

from trimaran.models.config import TransformerConfig
from trimaran.models.transformer import Stage
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.processes import free_memory_bytes, this_machine

_SHARE: Final = 0.5  # of the free memory, for each of the two kinds of requests, which are never computed together
_FEWEST_TOKENS: Final = 256
_MOST_TOKENS: Final = {"cpu": 4096, "cuda": 65536}  # of a batch: on two cores a longer one is hardly faster
_MOST_CACHE_BYTES: Final = {"cpu": 1 << 30, "cuda": 32 << 30}
_MOST_TOGETHER: Final = {"cpu": 32, "cuda": 256}  # texts that are continued at once
_WIDE_BYTES: Final = 4  # of a number in a mask and in scores of attention
_LOGITS_BYTES: Final = {"cpu": 64 << 20, "cuda": 512 << 20}  # a chunk and its exponentials (models/parallel/likelihood)


@dataclass(frozen=True)
class Budget:
    """The size of batches.

    Args:
        tokens: of a batch of likelihoods.
        cache_tokens: in the key-value cache of texts that are continued together.
        together: texts that are continued together.
    """

    tokens: int
    cache_tokens: int
    together: int


def measured_budget(
    stages: dict[int, Stage], mesh: Mesh, config: TransformerConfig, *, bounds_cache: bool = True
) -> Budget:
    """Return the budget that every rank has the memory for, the same on all of them. Collective over the world.

    Args:
        bounds_cache: whether the key-value cache has an upper bound besides the memory.
    """
    context = next(iter(stages.values())).context
    free = _free_bytes(context.device)
    # The ranks of a host share its memory; each GPU has its own.
    place = "" if context.device.type == "cuda" else this_machine() or "a host"
    found = [text.split("|") for text in mesh.gather_text(f"{place}|{-1 if free is None else free}")]
    ranks_of = Counter(place for place, _ in found)
    shares = [int(free) // (ranks_of[place] if place else 1) for place, free in found if int(free) >= 0]
    return budget_of(
        config,
        min(shares, default=None),
        tp=mesh.tp.size,
        pp=mesh.pp.size,
        dtype_bytes=context.dtype.itemsize,
        device=context.device.type,
        bounds_cache=bounds_cache,
    )


def budget_of(
    config: TransformerConfig,
    free_bytes: int | None,
    *,
    tp: int,
    pp: int,
    dtype_bytes: int,
    device: str,
    bounds_cache: bool = True,
) -> Budget:
    """Return what a rank with `free_bytes` of memory computes at once; the most of all where that is not known."""
    heads, kv_heads = (-(-count // tp) for count in (config.num_heads, config.num_kv_heads))
    layers = -(-config.num_layers // pp)
    kept = 2 * layers * kv_heads * config.head_dim * dtype_bytes  # bytes of a token's keys and values
    # Some hidden states at a time, the widest intermediate ones, and a row of a mask that a unit of attention keeps.
    wide = 8 * config.hidden_size + 4 * config.ffn_hidden_size // tp + 4 * (heads + kv_heads) * config.head_dim
    computed = wide * max(dtype_bytes, _WIDE_BYTES) + _WIDE_BYTES * config.max_seq_len + kept
    # A unit's scores of attention, and the prefixes that wait for later batches.
    fixed = _LOGITS_BYTES[device] + 2 * _WIDE_BYTES * heads * 192 * config.max_seq_len + 2 * kept * config.max_seq_len
    tokens, cache_bytes = _MOST_TOKENS[device], _MOST_CACHE_BYTES[device]
    if free_bytes is not None:
        room = int(_SHARE * free_bytes)
        tokens = max(_FEWEST_TOKENS, min(tokens, (room - fixed) // computed))
        cache_bytes = min(cache_bytes, room) if bounds_cache else room
    return Budget(tokens, max(1, cache_bytes // kept), _MOST_TOGETHER[device])


def _free_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process may still take on the device; None where it is not known."""
    if device.type != "cuda":
        return free_memory_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
