"""What training asks of an optimizer, whoever implements it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from trimaran.models.parallel.shard import ShardPiece, ShardSpec

ReadRange = Callable[[str, str, ShardSpec, tuple[int, ...], int, int], Tensor]
"""(name, key, shard, local shape, start, stop) -> the flat range of the local shard, from a checkpoint."""


class Optimizer(Protocol):
    """The state of this rank's parameters, and a step on it. Every method that communicates is collective.

    Attributes:
        description: what the user is told of it at the start of a run, "" for nothing.
    """

    description: str

    @property
    def num_steps(self) -> int:
        """Steps taken."""

    def accumulating(self) -> AbstractContextManager[None]:
        """Clear the gradients; all backward passes of the step run inside the block."""

    def finish_gradients(self) -> Tensor:
        """Finish every reduction; return this rank's part of the squared gradient norm [scalar, float64]."""

    def step(self, lr: float, grad_factor: float = 1.0) -> None:
        """Take a step with gradients times `grad_factor`."""

    def pieces(self) -> Iterator[ShardPiece]:
        """Yield the weights and moments that this rank stores, each element of the model from exactly one rank."""

    def gradient_pieces(self) -> Iterator[ShardPiece]:
        """Yield the reduced gradients (key "grad") after `finish_gradients`, each element from exactly one rank."""

    def load(self, read: ReadRange, num_steps: int, *, weights_only: bool = False) -> None:
        """Read weights and moments through `read`."""

    def state_bytes(self) -> dict[str, int]:
        """Bytes on this rank: `parameters`, `gradients` and `optimizer`."""
