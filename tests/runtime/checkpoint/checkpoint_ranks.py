"""Shared by the checkpoint tests: ranks as threads with an all-gather, and tensors cut into pieces at any layout."""

import itertools
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimaran.models.parallel.shard import Shape, ShardPiece, ShardSpec, cut_evenly, num_elements, whole
from trimaran.runtime.checkpoint.store import Gather, save

WAIT_S = 30.0


class ThreadGather:
    """An all-gather between threads that counts each rank's calls; `on_call(rank, call)` runs before any goes on."""

    def __init__(self, world_size: int, on_call: Callable[[int, int], None] | None = None) -> None:
        self._barrier = threading.Barrier(world_size)
        self._texts = [""] * world_size
        self._on_call = on_call
        self.calls = [0] * world_size

    def of(self, rank: int) -> Gather:
        """The gather of one rank."""

        def gather(text: str) -> list[str]:
            if self._on_call is not None:
                self._on_call(rank, self.calls[rank])
            self.calls[rank] += 1
            self._texts[rank] = text
            self._barrier.wait(WAIT_S)
            texts = list(self._texts)
            self._barrier.wait(WAIT_S)
            return texts

        return gather


def run_ranks(world_size: int, work: Callable[[int], Any]) -> list[Any]:
    """Run `work(rank)` on a thread per rank and return each one's result, or the exception it raised."""
    results: list[Any] = [None] * world_size

    def body(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:  # noqa: BLE001 - handed to the test as a value
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    assert not any(thread.is_alive() for thread in threads), "a rank is still waiting in gather"
    return results


def save_ranks(
    folder: Path,
    step: int,
    pieces: Sequence[Sequence[ShardPiece]],
    state: Mapping[str, Any] | None = None,
    *,
    keep_last: int = 0,
    gather: ThreadGather | None = None,
) -> list[Any]:
    """Save with one thread per entry of `pieces`; returns each rank's path or exception."""
    world_size = len(pieces)
    meeting = gather or ThreadGather(world_size)
    return run_ranks(
        world_size,
        lambda rank: save(
            folder,
            step,
            pieces[rank],
            state or {},
            rank=rank,
            world_size=world_size,
            gather=meeting.of(rank),
            keep_last=keep_last,
        ),
    )


@dataclass(frozen=True)
class Layout:
    """How a tensor is cut: along `dim` into `count` shards (None: one), each shard's range again at `cuts` (shares)."""

    dim: int | None
    count: int
    cuts: tuple[float, ...] = ()

    def shards(self, shape: Sequence[int]) -> list[tuple[ShardSpec, Shape]]:
        """Spec and local shape of every shard."""
        if self.dim is None:
            return [(whole(shape), tuple(shape))]
        return [cut_evenly(shape, "tp", self.dim, index, self.count) for index in range(self.count)]

    def ranges(self, local_shape: Shape) -> list[tuple[int, int]]:
        """Flat ranges that `cuts` makes of a shard; some may be empty."""
        size = num_elements(local_shape)
        edges = sorted({0, size, *(int(share * size) for share in self.cuts)})
        return list(itertools.pairwise(edges))


def shard_of(tensor: Tensor, spec: ShardSpec, local_shape: Shape, padding: float = 0.0) -> Tensor:
    """The truth: the local shard of a global tensor by plain slicing, padded with `padding`."""
    shard = torch.full(local_shape, padding, dtype=tensor.dtype)
    inside = tuple(slice(low, high) for low, high in spec.box(local_shape))
    held = tuple(slice(0, high - low) for low, high in spec.box(local_shape))
    shard[held] = tensor[inside]
    return shard


def cut(tensors: Mapping[tuple[str, str], tuple[Tensor, Layout]], world_size: int) -> list[list[ShardPiece]]:
    """Pieces of every tensor, dealt out to ranks in turn. Padding holds NaN, which a test notices if it comes back."""
    ranks: list[list[ShardPiece]] = [[] for _ in range(world_size)]
    for (name, key), (tensor, layout) in tensors.items():
        turn = 0
        for spec, local_shape in layout.shards(tensor.shape):
            flat = shard_of(tensor, spec, local_shape, padding=float("nan")).reshape(-1)
            for low, high in layout.ranges(local_shape):
                holders = [
                    r
                    for r in range(world_size)
                    if not any(p.name == name and p.key == key and p.start == low for p in ranks[r])
                ]
                rank = holders[turn % len(holders)]
                ranks[rank].append(ShardPiece(name, key, flat[low:high].clone(), spec, local_shape, low))
                turn += 1
    return ranks


def lines_without_this_package(folder: Path, key: str = "weight") -> str:
    """Return the page's lines that open a checkpoint, for another folder and kind of tensor."""
    page = (Path(__file__).parents[3] / "docs" / "run-folder.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r'Path\("runs/.*"\)', f"Path({str(folder)!r})", block).replace("weight", key)
