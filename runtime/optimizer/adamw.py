"""AdamW over flat shards: its moments, its count of steps, and the step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimaran.kernels.adamw import AdamWState
from trimaran.kernels.dispatch import KernelSet


@dataclass(frozen=True)
class AdamWSettings:
    """Hyperparameters that do not change during a run."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class UpdateRange:
    """A range [start, stop) of a shard: whether its weights decay, and the factor of its learning rate."""

    start: int
    stop: int
    decay: bool
    lr_scale: float


@dataclass(frozen=True, eq=False)
class FlatShard:
    """What an update rule changes and reads.

    Args:
        main: [n], the parameters that a step changes, float32 or wider.
        grads: [n], their summed gradients, in the dtype of `main`.
        copy: [n], the same parameters in the narrower dtype of the model; None where `main` are the model's.
        ranges: in order, disjoint; elements outside are padding.
    """

    main: Tensor
    grads: Tensor
    copy: Tensor | None
    ranges: Sequence[UpdateRange]


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) over shards, in one call of the kernel for all ranges with the same settings.

    Attributes:
        num_steps: steps taken, from which the moments' bias is corrected.
        moments: of each shard, name -> tensor [n].
    """

    def __init__(self, settings: AdamWSettings, kernels: KernelSet, shards: Sequence[FlatShard]) -> None:
        self.num_steps = 0
        self.moments: list[dict[str, Tensor]] = [
            {"exp_avg": torch.zeros_like(shard.grads), "exp_avg_sq": torch.zeros_like(shard.grads)} for shard in shards
        ]
        self._settings, self._kernels = settings, kernels
        self._alike: dict[tuple[bool, float], list[AdamWState]] = {}
        for shard, moments in zip(shards, self.moments, strict=True):
            for each in shard.ranges:
                part = slice(each.start, each.stop)
                state = AdamWState(
                    shard.main[part],
                    shard.grads[part],
                    moments["exp_avg"][part],
                    moments["exp_avg_sq"][part],
                    torch.zeros((), dtype=torch.float32, device=shard.main.device),
                    None if shard.copy is None else shard.copy[part],
                )
                self._alike.setdefault((each.decay, each.lr_scale), []).append(state)

    def step(self, lr: float, grad_factor: float = 1.0) -> None:
        """Take a step with gradients times `grad_factor`, which may be multiplied in place. No communication."""
        self.num_steps += 1
        settings = self._settings
        shared = {"beta1": settings.beta1, "beta2": settings.beta2, "eps": settings.eps, "grad_factor": grad_factor}
        for (decay, lr_scale), states in self._alike.items():
            # AdamW subtracts lr * weight_decay: divided by lr_scale, that is the same at every width.
            weight_decay = settings.weight_decay / lr_scale if decay else 0.0
            self._kernels.adamw_(states, lr=lr * lr_scale, weight_decay=weight_decay, **shared)

    def resume_at(self, num_steps: int) -> None:
        """Go on as after `num_steps` steps, with the moments as they are."""
        self.num_steps = num_steps
        for states in self._alike.values():
            for state in states:
                state.step.fill_(num_steps)
