"""What a sink is: a place besides metrics.jsonl where the numbers of a run go."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class SinkRun:
    """The run as a sink is told of it.

    Args:
        folder: of the run.
        identity: by which the sink knows it from an earlier start; None for a fresh start.
        step: steps finished before this start.
        config: the resolved spec, its sections as mappings.
    """

    folder: Path
    identity: str | None
    step: int
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What people call it: the name of its folder."""
        return self.folder.absolute().name


class Sink(Protocol):
    """Takes the rows of one run. All calls after the first come from one thread, and may raise anything."""

    @property
    def identity(self) -> str:
        """By which a later start goes on in the same run of the sink."""
        ...

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values after `step` finished steps, by their names: train/loss, held_out/loss, evaluation/..."""

    def close(self, *, failed: bool) -> None:
        """Write what is left, and say how the run ended."""
