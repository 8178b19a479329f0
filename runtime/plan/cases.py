"""Case: what a step's time and memory depend on, of a published run, of a spec or of a layout that a search tries."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RECOMPUTE: Final = ("none", "selective", "full")


@dataclass(frozen=True)
class Case:
    """One training step: shape, layout, chip. Sizes are global; flags are 0 or 1.

    Attributes:
        gated: whether the feed-forward layer has a gate.
        tied: whether the head reads the embedding's weights.
        experts, experts_per_token: 0 and 1 for a plain feed-forward layer.
        virtual_stages: stages of a pipeline rank.
        zero: stage 0 to 3.
        batch: samples of a step, of all ranks.
        microbatch: samples of a microbatch, of one dp rank.
        recompute: share of layers whose forward runs again in the backward pass.
        selective: whether scores and what is cheap are computed again (Korthikanti et al. 2022).
        unfused: whether attention writes its scores to memory.
        overlap: whether dp's collectives run beside the backward pass.
        gradient_bytes: of an element that dp ranks exchange.
        first_layers, last_layers: of the first and of the last pipeline rank; most_layers: of the fullest.
        reductions: over tp of a layer's stream, forward and backward: 4; of a parallel block 3, with one norm 2.
        nic_rate: bytes a second, a GPU and direction, between nodes.
        flops: the chip's peak in FLOP/s in the dtype of the run.
        memory_rate, link_rate: the chip's, bytes a second.
        processors: that share out a product's tiles.
    """

    layers: float
    hidden: float
    ffn: float
    heads: float
    kv_heads: float
    head_dim: float
    vocab: float
    gated: float
    tied: float
    seq: float
    tp: float
    pp: float
    cp: float
    dp: float
    ep: float
    virtual_stages: float
    sequence_parallel: float
    zero: float
    batch: float
    microbatch: float
    gpus_per_node: float
    recompute: float
    selective: float
    unfused: float
    overlap: float
    gradient_bytes: float
    experts: float
    experts_per_token: float
    first_layers: float
    last_layers: float
    most_layers: float
    reductions: float
    nic_rate: float
    flops: float
    memory_rate: float
    link_rate: float
    processors: float

    @property
    def microbatches(self) -> float:
        """Microbatches of a step."""
        return self.batch / (self.microbatch * self.dp)


class Cases:
    """Many cases, an array [cases] of float64 for each attribute of `Case`."""

    def __init__(self, columns: dict[str, Array]) -> None:
        self._columns = columns
        self.count = len(next(iter(columns.values())))

    @classmethod
    def of(cls, cases: Iterable[Case]) -> Self:
        """Return these cases, in order."""
        rows = list(cases)
        names = [field.name for field in fields(Case)]
        return cls({name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in names})

    def __getattr__(self, name: str) -> Array:
        """Return an attribute of every case."""
        try:
            return self._columns[name]
        except KeyError:
            raise AttributeError(name) from None

    def take(self, rows: Any) -> "Cases":
        """Return the cases at these indexes, or where a mask is true."""
        return Cases({name: column[rows] for name, column in self._columns.items()})

    @property
    def microbatches(self) -> Array:
        """Microbatches of a step."""
        return self.batch / (self.microbatch * self.dp)


def even_layers(layers: int, stages: int) -> list[int]:
    """Return the layers of each stage as Megatron and FSDP share them out: evenly, the first ones taking what is over.

    Raises:
        ValueError: fewer layers than stages.
    """
    if layers < stages:
        raise ValueError(f"{layers} layers can't be shared out over {stages} stages; give fewer stages")
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def layers_by_cost(layers: int, stages: int, layer: float, head: float) -> list[int]:
    """Return the layers of each stage as nanotron shares them out: by their cost, the head's on the last one.

    A block goes to the open stage, which closes with the block that exceeds its share of the whole cost
    (huggingface/nanotron: src/nanotron/models/base.py, build_model).

    Raises:
        ValueError: fewer layers than stages.
    """
    even_layers(layers, stages)
    counts, stage, spent, whole = [0] * stages, 0, 0.0, layers * layer + head
    for _ in range(layers):
        counts[stage] += 1
        spent += layer
        if spent > whole * (stage + 1) / stages:
            stage += 1
    return counts
