"""PEFT's folder of a LoRA adapter: names, ranks, and the two matrices of each of its modules for those of ours.

A weight map turns matrices of ours into theirs by moving rows (and transposing, in a Conv1D), so it turns our B into
theirs too. Where several of ours become one of theirs (queries, keys and values fused), that one gets the A of all of
them below each other and their B side by side, each in its own rows: its rank is the sum of theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.weights import WeightMap
from trimaran.models.targets import linear_shapes

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
A_NAME: Final = ".lora_A.weight"
B_NAME: Final = ".lora_B.weight"
_WEIGHT: Final = ".weight"

Pair = tuple[Tensor, Tensor]
"""A [..., rank, in] and B [..., out, rank]."""


@dataclass(frozen=True)
class _Slot:
    """One matrix of ours: of the unit's parameter `index`, the part `part` of those that are stacked in it."""

    index: int
    part: int


def linear_units(units: Sequence[WeightMap], config: TransformerConfig) -> list[WeightMap]:
    """Return the units of linear layers that can have adapters."""
    names = tuple(f".{name}{_WEIGHT}" for name in linear_shapes(config))
    return [unit for unit in units if all(name.startswith("layers.") and name.endswith(names) for name in unit.ours)]


def to_theirs(unit: WeightMap, config: TransformerConfig, ours: Mapping[str, Pair]) -> dict[str, Pair]:
    """Return module -> its pair, for the pairs of the unit's layers that have one, by layer (`layers.3.mlp.up`).

    Args:
        ours: A [rank, in] or [parts, rank, in], and B of the same leading dims; all of one rank.
    """
    found: dict[str, list[Pair]] = {}
    for index, name in enumerate(unit.ours):
        pair = ours.get(name.removesuffix(_WEIGHT))
        if pair is None:
            continue
        for part, (a, b) in enumerate(zip(_matrices(pair[0]), _matrices(pair[1]), strict=True)):
            slot = _Slot(index, part)
            marked = _their_rows(unit, config, slot, torch.ones_like(b))
            for theirs, rows, mark in zip(unit.theirs, _their_rows(unit, config, slot, b), marked, strict=True):
                if bool(mark.any()):
                    found.setdefault(theirs.removesuffix(_WEIGHT), []).append((a, rows))
    return {
        module: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
        for module, pairs in found.items()
    }


def to_ours(unit: WeightMap, config: TransformerConfig, theirs: Mapping[str, Pair], rank: int) -> dict[str, Pair]:
    """Return layer -> its pair of rank `rank`, for the pairs of the unit's modules that have one.

    A part of a stacked matrix whose module has none gets zeros, and so do ranks that a module lacks.
    """
    shapes = unit.our_shapes
    made: dict[int, Pair] = {}
    for number, module in enumerate(each.removesuffix(_WEIGHT) for each in unit.theirs):
        if module not in theirs:
            continue
        a, b = theirs[module]
        rows, marks = (_our_rows(unit, config, number, each) for each in (b, torch.ones_like(b)))
        for index, (ours, mark) in enumerate(zip(rows, marks, strict=True)):
            for part, (b_part, has) in enumerate(zip(_matrices(ours), _matrices(mark), strict=True)):
                if not bool(has.any()):
                    continue
                *leading, out, width = shapes[index]
                if index not in made:
                    made[index] = a.new_zeros(*leading, rank, width), b.new_zeros(*leading, out, rank)
                whole_a, whole_b = made[index]
                _matrices(whole_a)[part][: len(a)] = a
                _matrices(whole_b)[part][:, : len(a)] = b_part
    return {unit.ours[index].removesuffix(_WEIGHT): pair for index, pair in made.items()}


def their_shapes(unit: WeightMap, config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return module -> (out, in) of its matrix, whichever way it is stored."""
    shapes = unit.their_shapes(config)
    if is_transposed(unit, config):
        shapes = [shape[::-1] for shape in shapes]
    return {name.removesuffix(_WEIGHT): (shape[0], shape[1]) for name, shape in zip(unit.theirs, shapes, strict=True)}


def is_transposed(unit: WeightMap, config: TransformerConfig) -> bool:
    """Whether their matrices are [in, out], as those of Conv1D."""
    width = 1 + sum(torch.Size(shape).numel() for shape in unit.our_shapes)  # no number of outputs
    made = unit.form.to_theirs([torch.empty(*shape[:-1], width, device="meta") for shape in unit.our_shapes], config)
    return made[0].shape[0] == width


def delta(pair: Pair) -> Tensor:
    """Return B A."""
    return pair[1] @ pair[0]


def suffix_of(module: str) -> str:
    """Return what follows the layer's number in a module's name: `self_attn.q_proj`."""
    parts = module.split(".")
    number = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[number + 1 :])


def _matrices(x: Tensor) -> Tensor:
    """Return x [rows, columns] or [parts, rows, columns] as [parts, rows, columns]."""
    return x.view(-1, *x.shape[-2:])


def _their_rows(unit: WeightMap, config: TransformerConfig, slot: _Slot, b: Tensor) -> list[Tensor]:
    """Return their matrices [out, rank] where all of ours are zero but the one of `slot`, which is `b` [out, rank]."""
    tensors = [b.new_zeros(*shape[:-1], b.shape[1]) for shape in unit.our_shapes]
    _matrices(tensors[slot.index])[slot.part] = b
    made = unit.form.to_theirs(tensors, config)
    return [each.t() for each in made] if is_transposed(unit, config) else made


def _our_rows(unit: WeightMap, config: TransformerConfig, number: int, b: Tensor) -> list[Tensor]:
    """Return our matrices where all of theirs are zero but number `number`, which is `b` [out, rank]."""
    turned = is_transposed(unit, config)
    tensors = [b.new_zeros(out, b.shape[1]) for out, _ in their_shapes(unit, config).values()]
    tensors[number] = b
    return unit.form.to_ours([each.t() for each in tensors] if turned else tensors, config)
