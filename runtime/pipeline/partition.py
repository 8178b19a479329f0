"""The layers of each pipeline stage: contiguous, every layer once, with the least possible cost of the slowest stage.

A pipeline runs at the pace of its slowest stage, so the largest stage cost is minimized. The language-model head
(`2 * hidden_size * vocab_size` FLOPs a token) costs as much as several layers of a small model, so the last stage gets
fewer layers. The embedding lookup has no matmul and costs almost nothing.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimaran.models.config import TransformerConfig


def partition_layers(
    num_layers: int,
    num_stages: int,
    layer_cost: float = 1.0,
    embedding_cost: float = 0.0,
    head_cost: float = 0.0,
    layers_per_stage: Sequence[int] | None = None,
) -> list[range]:
    """Contiguous layer ranges, one per stage, with the exact minimum of the largest stage cost.

    Stage 0 also has `embedding_cost` and the last stage `head_cost` (in any one unit). Among equal maxima the layer
    counts are as even as possible; the remainder goes to cheaper stages first, then to later ones, which hold fewer
    microbatches in flight.

    Args:
        layers_per_stage: explicit counts, one per stage; checked and used unchanged.

    Raises:
        ValueError: fewer layers than stages, a bad cost, or counts that do not add up.
    """
    _check_sizes(num_layers, num_stages)
    if layers_per_stage is not None:
        _check_counts(num_layers, num_stages, layers_per_stage)
        return _ranges(layers_per_stage)
    for name, cost in (("layer_cost", layer_cost), ("embedding_cost", embedding_cost), ("head_cost", head_cost)):
        if not math.isfinite(cost) or cost < 0 or (name == "layer_cost" and cost == 0):
            raise ValueError(
                f"{name} must be finite and {'above' if name == 'layer_cost' else 'at least'} 0; got {cost}"
            )
    return _ranges(_balanced_counts(num_layers, num_stages, layer_cost, embedding_cost, head_cost))


@lru_cache(maxsize=1024)
def _balanced_counts(
    num_layers: int, num_stages: int, layer_cost: float, embedding_cost: float, head_cost: float
) -> Sequence[int]:
    # Fractions represent floats exactly, so equal costs compare equal and the minimum is exact.
    layer = Fraction(layer_cost)
    extras = [Fraction(0)] * num_stages
    extras[0] += Fraction(embedding_cost)
    extras[-1] += Fraction(head_cost)
    limits = _count_limits(num_layers, layer, extras)
    return tuple(_even_counts(num_layers, layer, extras, limits))


def stage_layers(
    config: "TransformerConfig", seq_len: int, num_stages: int, layers_per_stage: Sequence[int] | None = None
) -> list[range]:
    """The layers of each stage of `config`: `layers_per_stage` if given, else balanced by FLOPs at `seq_len` tokens.

    Raises:
        ValueError: fewer layers than stages, or counts that do not add up.
    """
    return partition_layers(
        config.num_layers,
        num_stages,
        layer_cost=config.layer_forward_flops(seq_len),
        head_cost=config.head_forward_flops(),
        layers_per_stage=layers_per_stage,
    )


def stage_costs(config: "TransformerConfig", seq_len: int, layers: Sequence[range]) -> list[float]:
    """Forward FLOPs a token of each stage, for stages with these `layers`; the last stage also has the head."""
    costs = [len(held) * config.layer_forward_flops(seq_len) for held in layers]
    costs[-1] += config.head_forward_flops()
    return costs


def _count_limits(num_layers: int, layer: Fraction, extras: list[Fraction]) -> list[int]:
    """The maximum number of layers of each stage under the minimum of the largest stage cost."""

    def limits(largest: Fraction) -> list[int]:
        return [int((largest - extra) // layer) for extra in extras]

    def fits(largest: Fraction) -> bool:
        counts = limits(largest)
        return min(counts) >= 1 and sum(counts) >= num_layers

    # The minimum is the cost of some stage with some count, so a search over those costs is exact.
    candidates = sorted({extra + count * layer for extra in set(extras) for count in range(1, num_layers + 1)})
    return limits(candidates[bisect_left(candidates, True, key=fits)])


def _even_counts(num_layers: int, layer: Fraction, extras: list[Fraction], limits: list[int]) -> list[int]:
    """The most even counts within `limits`: start at one layer each, then always add to the stage with fewest."""
    counts = [1] * len(extras)
    for _ in range(num_layers - len(extras)):
        open_stages = [stage for stage, count in enumerate(counts) if count < limits[stage]]
        chosen = min(open_stages, key=lambda stage: (counts[stage], extras[stage] + counts[stage] * layer, -stage))
        counts[chosen] += 1
    return counts


def _ranges(counts: Sequence[int]) -> list[range]:
    ranges = []
    first = 0
    for count in counts:
        ranges.append(range(first, first + count))
        first += count
    return ranges


def _check_sizes(num_layers: int, num_stages: int) -> None:
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1; got {num_stages}")
    if num_layers < num_stages:
        raise ValueError(
            f"num_layers ({num_layers}) must be at least the number of stages, pp x virtual_stages ({num_stages}), "
            f"for every stage holds at least one layer; use at least {num_stages} layers or 1 to {num_layers} stages"
        )


def _check_counts(num_layers: int, num_stages: int, counts: Sequence[int]) -> None:
    shown = list(counts)
    if len(counts) != num_stages:
        raise ValueError(
            "layers_per_stage needs one entry per stage, "
            f"pp x virtual_stages ({num_stages}); got {len(counts)}: {shown}"
        )
    if min(counts) < 1:
        raise ValueError(f"layers_per_stage needs at least one layer in every stage; got {shown}")
    if sum(counts) != num_layers:
        raise ValueError(f"layers_per_stage must sum to num_layers ({num_layers}); got {shown} with sum {sum(counts)}")
