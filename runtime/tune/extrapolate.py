"""What a climbed ladder says of its target: rate, batch and loss with intervals, and the spec to train. No torch."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from trimaran.models.fields import counted
from trimaran.runtime.files import write_text
from trimaran.runtime.plan.scaling.figures import Interval, Run, ScalingError
from trimaran.runtime.plan.scaling.fit import HeldOut, LossLaw, fit_loss, hold_out
from trimaran.runtime.plan.scaling.optima import Optimum, PowerLaw, fit_power_law
from trimaran.runtime.plan.scaling.published import PUBLISHED, PublishedLaw, Scale
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.loading import dump_spec
from trimaran.runtime.tune.ladder import FIELDS, TARGET, Ladder, Rung
from trimaran.runtime.tune.space import Part, Space
from trimaran.runtime.tune.study import Trial
from trimaran.runtime.tune.transfer import optimum_of

TARGET_FILE: Final = "target.yaml"
RESULT_FILE: Final = "ladder.json"
_MOST_ROUNDED: Final = 0.05


@dataclass(frozen=True)
class Climbed:
    """What the trials of one rung came to.

    Attributes:
        optimum: None for a rung that was not searched but trained at the values of another.
        run: its loss, that of the optimum or of its only trial, at the tokens that were asked for: the laws shall not
            see how they are rounded to whole steps.
    """

    rung: Rung
    trials: tuple[Trial, ...]
    optimum: Optimum | None
    run: Run


@dataclass(frozen=True)
class HeldOutOptimum:
    """The best value of the held-out rung beside what the law of the others says."""

    rung: str
    name: str
    measured: Interval
    predicted: Interval

    @property
    def factor(self) -> float:
        """By what factor the prediction is off, 1 or more."""
        return math.exp(abs(math.log(self.predicted.value / self.measured.value)))


@dataclass(frozen=True)
class Extrapolation:
    """What a ladder says.

    Attributes:
        optima: laws of "rate" and "batch" over the rungs, as far as they were searched there.
        loss: None where the rungs are too few, which `untold` says.
        values: of the target, by "rate" and "batch".
        predicted: loss of the target.
        spent_flops: of all trials, those that diverged or were ended early too.
        target_flops: of the target's training.
        untold: sentences about what could not be told or holds but roughly, and why.
    """

    climbed: tuple[Climbed, ...]
    optima: dict[str, PowerLaw]
    loss: LossLaw | None
    values: dict[str, Interval]
    predicted: Interval | None
    held_out: tuple[HeldOut, ...]
    held_out_optima: tuple[HeldOutOptimum, ...]
    target: RunSpec
    spent_flops: float
    target_flops: float
    published: tuple[tuple[PublishedLaw, float], ...]
    untold: tuple[str, ...] = field(default=())


def extrapolate(ladder: Ladder, space: Space, trials: Sequence[Trial], output_dir: str) -> Extrapolation:
    """Return what the finished trials of a ladder say of its target.

    Args:
        output_dir: of the target's run.

    Raises:
        ScalingError: trials are missing, the best of a rung is at an edge, or a law of the rate or batch can't be told;
            holds a sentence for each rung.
    """
    climbed = _climbed(ladder, trials)
    untold = list(_rounded(climbed))
    optima: dict[str, PowerLaw] = {}
    values: dict[str, Interval] = {}
    target = ladder.target
    for axis, name in enumerate(ladder.names):
        if ladder.base_rung is not None:
            values[name] = _at(climbed[0], axis)
            continue
        optima[name] = fit_power_law(_points(climbed, axis))
        values[name] = optima[name].predict(target.parameters, target.tokens)
    spec = _target_spec(ladder, space, values, output_dir)
    tokens = spec.tokens_per_step * spec.train.num_steps
    runs = [each.run for each in climbed]
    loss: LossLaw | None = None
    predicted: Interval | None = None
    held_out: tuple[HeldOut, ...] = ()
    try:
        loss = fit_loss(runs)
        predicted = loss.predict(target.parameters, target.tokens)
    except ScalingError as error:
        untold.append(f"no loss is predicted: {error}")
    held_out_optima: tuple[HeldOutOptimum, ...] = ()
    if ladder.held_out is not None:
        try:
            held_out = tuple(hold_out(runs, ladder.held_out))
        except ScalingError as error:
            untold.append(f"the loss of the largest rung is not tested, which takes one rung more: {error}")
        try:
            held_out_optima = tuple(_held_out_optima(ladder, climbed))
        except ScalingError as error:
            untold.append(f"the optimum of the largest rung is not tested, which takes one rung more: {error}")
    flops = target.flops_per_token * tokens
    scale = Scale(
        target.parameters, target.parameters_without_embeddings, tokens, target.layer_flops_per_token * tokens
    )
    return Extrapolation(
        climbed,
        optima,
        loss,
        values,
        predicted,
        held_out,
        held_out_optima,
        spec,
        sum(trial.flops for trial in trials),
        flops,
        tuple((law, law.at(scale)) for law in PUBLISHED),
        tuple(untold),
    )


def _climbed(ladder: Ladder, trials: Sequence[Trial]) -> tuple[Climbed, ...]:
    found, problems = [], []
    keys = [FIELDS[name] for name in ladder.names]
    for rung in ladder.rungs:
        mine = tuple(trial for trial in trials if trial.rung == rung.name)
        running = sum(trial.state == "running" for trial in mine)
        try:
            if running or not mine:
                has = f"has {counted(running, 'trial')} running" if running else "has no trial yet"
                raise ScalingError(f"{has}; run `trimaran tune` again to go on")
            found.append(_climb(rung, mine, keys if ladder.base_rung in (None, rung.name) else None))
        except ScalingError as error:
            problems.append(f"rung {rung.name}: {error}")
    if problems:
        raise ScalingError("\n".join(problems))
    return tuple(found)


def _climb(rung: Rung, trials: tuple[Trial, ...], keys: Sequence[str] | None) -> Climbed:
    complete = [trial for trial in trials if trial.state == "complete" and trial.objectives is not None]
    optimum = None
    if keys is not None:
        optimum = optimum_of(keys, trials)
        loss = optimum.loss.value
    elif complete and complete[0].objectives:
        loss = complete[0].objectives[0]
    else:
        raise ScalingError(f"its trial has no loss: {trials[0].error or trials[0].state}")
    return Climbed(rung, trials, optimum, Run(rung.parameters, rung.tokens, loss))


def _rounded(climbed: Sequence[Climbed]) -> Iterator[str]:
    """Yield a sentence for each rung whose whole steps are far from the tokens that were asked for."""
    for each in climbed:
        asked = each.run.tokens
        furthest = max(
            (trial.tokens for trial in each.trials if trial.state == "complete"), key=lambda n: abs(n - asked)
        )
        if abs(furthest / asked - 1) > _MOST_ROUNDED:
            yield (
                f"the laws hold but roughly: rung {each.rung.name} has a trial of {furthest:,} tokens where "
                f"{asked:,.0f} were asked for, because its steps are few; raise tokens_per_parameter or lower the batch"
            )


def _at(climbed: Climbed, axis: int) -> Interval:
    assert climbed.optimum is not None, f"rung {climbed.rung.name} was searched"
    return climbed.optimum.at[axis]


def _points(climbed: Sequence[Climbed], axis: int) -> list[tuple[float, float, float]]:
    return [(each.run.parameters, each.run.tokens, _at(each, axis).value) for each in climbed]


def _held_out_optima(ladder: Ladder, climbed: Sequence[Climbed]) -> Iterator[HeldOutOptimum]:
    if ladder.base_rung is not None:
        return
    others = [each for each in climbed if each.rung.parameters != ladder.held_out]
    for axis, name in enumerate(ladder.names):
        law = fit_power_law(_points(others, axis))
        for each in climbed:
            if each.rung.parameters == ladder.held_out:
                predicted = law.predict(each.run.parameters, each.run.tokens)
                yield HeldOutOptimum(each.rung.name, name, _at(each, axis), predicted)


def _target_spec(ladder: Ladder, space: Space, values: dict[str, Interval], output_dir: str) -> RunSpec:
    """Return the run of the target: a batch is a whole number of what its ranks take at once, the nearest one.

    Raises SpecError where the base spec does not go with the target.
    """
    best: dict[str, Any] = {}
    if "rate" in values:
        best[FIELDS["rate"]] = float(f"{values['rate'].value:.6g}")
    if "batch" in values:
        train, parallel = space.base.get("train", {}), space.base.get("parallel") or {}
        unit = int(train.get("micro_batch_size", 1)) * int(parallel.get("dp", 1))
        best[FIELDS["batch"]] = max(1, round(values["batch"].value / unit)) * unit
    part = Part(TARGET, {**ladder.target.fields, **best}, 1, ladder.target.tokens)
    return space.spec_of({}, part, {"train.output_dir": output_dir})


def write_extrapolation(found: Extrapolation, folder: Path) -> Path:
    """Write target.yaml and ladder.json into the folder of the study; return the path of the first."""
    head = (
        f"# The target of the ladder in {folder}, with the values that it found.\n"
        f"#     trimaran train {folder / TARGET_FILE}\n"
    )
    write_text(folder / TARGET_FILE, head + dump_spec(found.target))
    write_text(folder / RESULT_FILE, json.dumps(as_json(found), indent=2) + "\n")
    return folder / TARGET_FILE


def as_json(found: Extrapolation) -> dict[str, Any]:
    """Return the numbers for other programs."""

    def bounds(interval: Interval | None) -> list[float] | None:
        return None if interval is None else [interval.value, interval.low, interval.high]

    return {
        "intervals": "each as [value, low, high] of 95%",
        "rungs": [
            {
                "name": each.rung.name,
                "parameters": each.rung.parameters,
                "tokens": each.run.tokens,
                "loss": each.run.loss if each.optimum is None else bounds(each.optimum.loss),
                "best": None if each.optimum is None else [bounds(at) for at in each.optimum.at],
                "trials": len(each.trials),
            }
            for each in found.climbed
        ],
        "loss_law": found.loss
        and {"form": found.loss.form, **{name: bounds(each) for name, each in found.loss.constants.items()}},
        "laws": {
            name: {"factor": bounds(law.factor), "exponents": [bounds(each) for each in law.exponents]}
            for name, law in found.optima.items()
        },
        "target": {
            "parameters": found.target.transformer.num_parameters(),
            "tokens": found.target.tokens_per_step * found.target.train.num_steps,
            "loss": bounds(found.predicted),
            **{name: bounds(each) for name, each in found.values.items()},
            "flops": found.target_flops,
        },
        "spent_flops": found.spent_flops,
        "held_out": [
            {"loss": each.run.loss, "predicted": bounds(each.predicted), "error": each.error} for each in found.held_out
        ],
        "held_out_optima": [
            {
                "rung": each.rung,
                "of": each.name,
                "measured": bounds(each.measured),
                "predicted": bounds(each.predicted),
                "factor": each.factor,
            }
            for each in found.held_out_optima
        ],
        "published": [
            {
                "name": law.name,
                "of": law.quantity,
                "formula": law.formula,
                "source": law.source,
                "read_in": law.read_in,
                "at_target": value,
            }
            for law, value in found.published
        ],
        "untold": list(found.untold),
    }


def rows_of(found: Extrapolation) -> list[tuple[str, str]]:
    """Return (name, words) rows about the target and how far its prediction can be trusted."""
    target, seq_len = found.target, found.target.train.seq_len
    tokens = target.tokens_per_step * target.train.num_steps
    rows = [
        ("target", f"{target.transformer.num_parameters():,} parameters, {tokens:,} tokens"),
        *((_WORDS[name], _of_target(name, each, seq_len)) for name, each in found.values.items()),
    ]
    if found.predicted is not None:
        rows.append(("held-out loss", f"{found.predicted} nats a token"))
    if found.loss is not None:
        constants = ", ".join(f"{name} {each}" for name, each in found.loss.constants.items())
        rows.append((f"law of the loss, {found.loss.form}", constants))
    for name, law in found.optima.items():
        powers = ", ".join(f"{symbol}^{each}" for symbol, each in zip("ND", law.exponents, strict=False))
        rows.append((f"law of the {name}", f"{law.factor} x {powers}"))
    for held in found.held_out:
        share = f"predicted {held.predicted}, measured {held.run.loss:.4g}: {held.error:+.2%}"
        ratio = f", {held.run.ratio:g} tokens a parameter" if len(found.held_out) > 1 else ""
        rows.append((f"held-out rung, {held.run.parameters:,} parameters{ratio}", share))
    for each in found.held_out_optima:
        words = f"predicted {each.predicted}, measured {each.measured}: a factor {each.factor:.2f}"
        rows.append((f"{_WORDS[each.name]} of the held-out rung {each.rung}", words))
    for published, value in found.published:
        shown = f"{value:.3g}" if published.quantity == "rate" else f"{value / seq_len:.3g} sequences"
        rows.append((f"{published.name}, {_WORDS[published.quantity]}", f"{shown} by {published.formula}"))
    times = found.target_flops / found.spent_flops if found.spent_flops else math.inf
    rows.append(("compute spent", f"{found.spent_flops:.3g} FLOP"))
    rows.append(("compute to come", f"{found.target_flops:.3g} FLOP, {times:.3g} times what was spent"))
    return rows


_WORDS: Final = {"rate": "learning rate", "batch": "batch"}


def _of_target(name: str, value: Interval, seq_len: int) -> str:
    if name == "rate":
        return str(value)
    return f"{value} sequences of {seq_len} tokens"
