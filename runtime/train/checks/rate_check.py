"""The check that a rate carries over: held-out loss against learning rate at several widths (Yang et al. 2022, fig. 1).

Under muP the lowest point stays at the same rate as the model widens; with one deviation and rate for all widths it
moves.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimaran.models.parallel.group import Group
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec, fields_at_layout, parse_spec
from trimaran.runtime.train.checks.mup_check import Growth, spec_at_width
from trimaran.runtime.train.lr_schedule import lr_at
from trimaran.runtime.train.samples import TrainingData, held_out_of, train_loader
from trimaran.runtime.train.train_context import TrainingDiverged, build_train_context, evaluate_losses, train_step


@dataclass(frozen=True)
class RateCurves:
    """Held-out losses: `losses[i][j]` at `widths[i]` and `rates[j]`, infinite where training diverged."""

    widths: tuple[int, ...]
    rates: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

    def best(self, width: int) -> float:
        """Return the rate with the lowest loss at a width."""
        losses = self.losses[self.widths.index(width)]
        return self.rates[min(range(len(losses)), key=losses.__getitem__)]

    @property
    def shift(self) -> float:
        """By what factor the best rate moves from the narrowest width to the widest one."""
        return self.best(self.widths[-1]) / self.best(self.widths[0])

    def edges(self) -> list[int]:
        """Return the widths whose best rate is the lowest or the highest one, so that it may lie beyond."""
        return [width for width in self.widths if self.best(width) in (min(self.rates), max(self.rates))]


def losses_over_rates(
    spec: RunSpec,
    widths: Sequence[int],
    rates: Sequence[float],
    growth: Growth,
    data: TrainingData,
    mesh: Mesh,
    device: torch.device,
    tell: Callable[[int, float, float], None] = lambda width, rate, loss: None,
) -> RateCurves:
    """Train the spec's run at every width and rate and return the held-out losses at its end.

    Args:
        mesh: of one process.
        tell: is called with the width, rate and loss of each run that has ended.

    Raises ValueError where a width does not fit the model, or no text is held out.
    """
    if spec.data.held_out_fraction == 0:
        raise ValueError("data.held_out_fraction is 0, so there is no text to compare rates on; set it to 0.02")
    curves = []
    for width in widths:
        at_width = spec_at_width(spec, width, growth)
        losses = []
        for rate in rates:
            losses.append(_loss_of(_with_rate(at_width, rate), data, mesh, device))
            tell(width, rate, losses[-1])
        curves.append(tuple(losses))
    return RateCurves(tuple(widths), tuple(rates), tuple(curves))


def _with_rate(spec: RunSpec, rate: float) -> RunSpec:
    raw: dict[str, Any] = fields_at_layout(spec)
    raw["optimizer"] |= {"lr": rate}
    raw["train"] |= {"eval_interval": max(1, spec.train.eval_interval)}
    return parse_spec(raw)


def _loss_of(spec: RunSpec, data: TrainingData, mesh: Mesh, device: torch.device) -> float:
    """Return the held-out loss of a run that nothing is saved of."""
    alone = Group("dp", (0,), 0)
    loader, held_out = train_loader(spec, data, alone), held_out_of(spec, data, alone)
    context = build_train_context(spec, mesh, device)
    try:
        for step in range(spec.train.num_steps):
            consumed = step * spec.train.global_batch_size
            batches = [batch.to(device) for batch in loader.microbatches(consumed)]
            lr = lr_at(step, base_lr=spec.optimizer.lr, section=spec.lr_schedule, num_steps=spec.train.num_steps)
            train_step(context, batches, lr, num_losses=loader.num_losses(consumed))
    except TrainingDiverged:
        return math.inf
    on_device = [[batch.to(device) for batch in batches] for batches in held_out.batches]
    loss, _ = evaluate_losses(context, on_device, held_out.num_losses)
    return loss if math.isfinite(loss) else math.inf
