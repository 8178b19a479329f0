"""A network whose weights are frozen and whose linear layers have low-rank adapters (LoRA, QLoRA)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trimaran.models.layers.score import SCORE_WEIGHT
from trimaran.models.parallel.linear import ColumnParallelLinear, RowParallelLinear
from trimaran.models.parallel.low_rank import LowRank, LowRankOptions
from trimaran.models.parallel.parameter import LayerContext, adopt, draw, info_of
from trimaran.models.parallel.quantized import QuantizedWeight
from trimaran.models.parallel.shard import ShardSpec
from trimaran.models.targets import is_target
from trimaran.models.transformer import Stage

ReadWeight = Callable[[str, str, ShardSpec, tuple[int, ...]], Tensor]
"""(name, "weight", shard, local shape) -> local tensor."""


@dataclass(frozen=True)
class AdapterPlan:
    """What learns, and how the rest is held.

    Args:
        targets: linear layers that get an adapter, as `targets.is_target` reads them.
        is_quantized: whether all linear layers of the blocks are held in NormalFloat4.
    """

    options: LowRankOptions
    targets: tuple[str, ...]
    is_quantized: bool


def adapt(stage: Stage, plan: AdapterPlan, *, without_storage: bool) -> None:
    """Freeze the parameters of a stage, but not a score head, and give its linear layers adapters without numbers.

    Args:
        stage: whose parameters have no memory where the plan quantizes; those that are not quantized get it here.
        without_storage: whether the parameters that learn get no memory yet.
    """
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(name == SCORE_WEIGHT)
    for name, layer in _linear_layers(stage):
        if is_target(name.split(".", 2)[2], plan.targets):
            layer.adapter = _adapter_of(name, layer, replace(stage.context, without_storage=without_storage), plan)
        if plan.is_quantized:
            weight = layer.weight
            layer.quantized = QuantizedWeight(info_of(weight), tuple(weight.shape), weight.dtype, weight.device)
            del layer.weight
    for parameter in stage.parameters():
        has_storage = not (parameter.requires_grad and without_storage)
        if plan.is_quantized or not has_storage:
            parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size() if has_storage else 0)


def _adapter_of(
    name: str, layer: ColumnParallelLinear | RowParallelLinear, context: LayerContext, plan: AdapterPlan
) -> LowRank:
    info = info_of(layer.weight)
    return LowRank(
        info.shard,
        tuple(layer.weight.shape),
        context,
        plan.options,
        is_row_parallel=isinstance(layer, RowParallelLinear),
        is_partial=info.needs_tp_grad_reduce,
        name=name,
    )


def _linear_layers(stage: Stage) -> Iterator[tuple[str, ColumnParallelLinear | RowParallelLinear]]:
    """Yield the linear layers of the stage's blocks by global name, such as layers.3.attention.q."""
    for name, module in stage.named_modules():
        if name.startswith("layers.") and isinstance(module, ColumnParallelLinear | RowParallelLinear):
            yield name, module


def quantized_weights(stage: Stage) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield the weights in 4 bits by the global name of the parameter that each stands for."""
    for name, layer in _linear_layers(stage):
        if layer.quantized is not None:
            yield f"{name}.weight", layer.quantized


def frozen_parameters(stage: Stage) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the frozen parameters by global name."""
    return ((name, parameter) for name, parameter in stage.named_parameters() if not parameter.requires_grad)


@torch.no_grad()
def load_frozen(stages: Iterable[Stage], read: ReadWeight) -> None:
    """Fill what is frozen from `read`, one tensor at a time."""
    for stage in stages:
        for name, parameter in frozen_parameters(stage):
            parameter.copy_(read(name, "weight", info_of(parameter).shard, tuple(parameter.shape)))
        for name, weight in quantized_weights(stage):
            weight.fill(read(name, "weight", weight.info.shard, weight.shape))


@torch.no_grad()
def draw_frozen(stage: Stage, seed: int) -> None:
    """Fill what is frozen with the numbers of a new network."""
    for name, parameter in frozen_parameters(stage):
        draw(name, parameter, seed=seed)
    context = replace(stage.context, without_storage=False)
    for name, weight in quantized_weights(stage):
        whole = adopt(weight.shape, context, weight.info)
        draw(name, whole, seed=seed)
        weight.fill(whole.detach())


def draw_adapters(stage: Stage, seed: int) -> None:
    """Fill what learns: the adapters, whose product is zero, and a score head."""
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            draw(name, parameter, seed=seed)


def frozen_bytes(stage: Stage) -> int:
    """Return the bytes of what is frozen."""
    dense = sum(parameter.numel() * parameter.element_size() for _, parameter in frozen_parameters(stage))
    return dense + sum(weight.num_bytes for _, weight in quantized_weights(stage))
