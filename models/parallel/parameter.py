"""Parameters with a record of how they are cut, how they are initialized, and where their gradient is summed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from trimaran.kernels.dispatch import TORCH, KernelSet
from trimaran.kernels.random import fill_normal_
from trimaran.models.parallel.group import Group, single
from trimaran.models.parallel.shard import ShardSpec, cut_evenly, whole
from trimaran.models.recompute import Droppable

_ATTRIBUTE = "trimaran_info"


@dataclass(frozen=True)
class InitSpec:
    """The normal distribution (mean 0) of a weight's initial values, and the factor of its learning rate.

    Args:
        std: standard deviation; for stacked matrices [parts, out, in] one for all parts, or one each.
        lr_scale: factor of the learning rate. It does not change how much weight decay subtracts in a step.
    """

    std: float | tuple[float, ...] = 0.0
    lr_scale: float = 1.0


_UNSCALED = InitSpec()
_ALONE = single("ep")


@dataclass(eq=False)
class WeightGradientQueue:
    """Where backward passes leave the weight gradients that are computed later.

    Args:
        later: what computes them, in order; None where backward passes compute them at once.
    """

    later: list[Callable[[], None]] | None = None

    @contextmanager
    def into(self, later: list[Callable[[], None]]) -> Iterator[None]:
        """Leave in `later` those of the backward passes inside the block."""
        self.later = later
        try:
            yield
        finally:
            self.later = None


@dataclass(eq=False)
class ParameterInfo:
    """What the runtime must know of a parameter; the layer that creates the parameter writes it.

    Args:
        shard: the local tensor's place in the global one.
        init: "normal" (mean 0, deviation `init_spec.std`), "ones" or "zeros".
        init_spec: deviation, and factor of the learning rate.
        decay: whether weight decay applies (to matrices; not to biases and norms).
        needs_tp_grad_reduce: each tp rank's gradient is a part of a sum over tp (the parameters that act on
            sequence-parallel activations).
        tied_copy: another stage's copy of a tied embedding; not counted and not stored in checkpoints.
        main_grad: buffer that sums the gradients, shape of the parameter, float32 (float64 for float64 parameters); the
            optimizer sets it.
        queue: that of the layers of this rank.
    """

    shard: ShardSpec
    init: Literal["normal", "ones", "zeros"] = "normal"
    init_spec: InitSpec = _UNSCALED
    decay: bool = True
    needs_tp_grad_reduce: bool = False
    tied_copy: bool = False
    main_grad: Tensor | None = None
    queue: WeightGradientQueue = field(default_factory=WeightGradientQueue)


def info_of(parameter: Tensor) -> ParameterInfo:
    """Return the record that `new_parameter` attached to the parameter."""
    info = getattr(parameter, _ATTRIBUTE)
    assert isinstance(info, ParameterInfo)
    return info


@dataclass(frozen=True)
class LayerContext:
    """What every layer of a stage is built with: tensor-parallel group, dtype, device and kernels.

    Args:
        deterministic: whether kernels must give the same bits every time.
        ep: the data-parallel ranks among which the experts are spread.
        queue: of weight gradients that a pipeline schedule computes apart from the input's.
        recompute: every block whose global number is a multiple of this computes its activations again in its backward
            pass; 0: none does.
        droppable: what the other blocks compute again.
        without_storage: parameters have a shape and no memory, which the optimizer gives them.
    """

    tp: Group
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device
    kernels: KernelSet = TORCH
    deterministic: bool = True
    ep: Group = _ALONE
    queue: WeightGradientQueue = field(default_factory=WeightGradientQueue)
    recompute: int = 0
    droppable: Droppable = field(default_factory=Droppable)
    without_storage: bool = False


def new_parameter(
    global_shape: tuple[int, ...],
    context: LayerContext,
    *,
    dim: int | None = None,
    init: Literal["normal", "ones", "zeros"] = "normal",
    init_spec: InitSpec = _UNSCALED,
    decay: bool = True,
    needs_tp_grad_reduce: bool = False,
    over_ep: bool = False,
    unit: int = 1,
) -> nn.Parameter:
    """Return an uninitialized parameter: this tp rank's shard of `global_shape` along `dim` (None: the whole tensor).

    All shards have one length along `dim`; where that does not divide, the last ones are padded.

    Args:
        over_ep: whether to cut over the grid of ep and tp ranks, tp innermost, instead of over tp.
        unit: rows along `dim` that must stay on one rank, such as those of a head.
    """
    if dim is None:
        spec, local_shape = whole(global_shape), global_shape
    elif over_ep:
        index, count = context.ep.rank * context.tp.size + context.tp.rank, context.ep.size * context.tp.size
        spec, local_shape = cut_evenly(global_shape, "ep", dim, index, count)
    else:
        spec, local_shape = cut_evenly(global_shape, "tp", dim, context.tp.rank, context.tp.size, unit)
    return adopt(
        local_shape, context, ParameterInfo(spec, init, init_spec, decay, needs_tp_grad_reduce, queue=context.queue)
    )


def adopt(local_shape: tuple[int, ...], context: LayerContext, info: ParameterInfo) -> nn.Parameter:
    """Return an uninitialized parameter with the record `info`."""
    parameter = nn.Parameter(torch.empty(local_shape, dtype=context.dtype, device=context.device))
    if context.without_storage:
        parameter.untyped_storage().resize_(0)
    setattr(parameter, _ATTRIBUTE, info)
    return parameter


def initialize(module: nn.Module, seed: int) -> None:
    """Draw every parameter of `module`."""
    for name, parameter in module.named_parameters():
        draw(name, parameter, seed=seed)


@torch.no_grad()
def draw(name: str, parameter: nn.Parameter, *, seed: int) -> None:
    """Fill a parameter with its shard of the global tensor of that name; only that shard is drawn."""
    info = info_of(parameter)
    if info.init == "normal":
        spec, std = info.shard, info.init_spec.std
        shard = {"global_shape": spec.global_shape, "dim": spec.dim, "offset": spec.offset}
        fill_normal_(parameter, seed=seed, name=name, std=std, **shard)  # type: ignore[arg-type]
        return
    parameter.fill_(1.0 if info.init == "ones" else 0.0)
    if info.shard.dim is not None:  # padding is zero for every init
        length = info.shard.real_length(tuple(parameter.shape))
        parameter.narrow(info.shard.dim, length, parameter.shape[info.shard.dim] - length).zero_()
