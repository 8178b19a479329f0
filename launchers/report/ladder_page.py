"""The sections of a search's page about its ladder: the target, the best of each rung, and the laws over them."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from trimaran.runtime.pages.charts import Band, Look, Series, colors, plot
from trimaran.runtime.pages.html import section, table
from trimaran.runtime.plan.scaling.figures import Interval
from trimaran.runtime.plan.scaling.published import Scale
from trimaran.runtime.tune.extrapolate import Climbed, Extrapolation, rows_of
from trimaran.runtime.tune.ladder import FIELDS, Ladder

_CURVE_POINTS: Final = 60
_LOSS: Final = "held-out loss (nats a token)"
_UNITS: Final = {"rate": "optimizer.lr", "batch": "train.global_batch_size (sequences)"}


def ladder_sections(ladder: Ladder, result: Extrapolation) -> Iterator[str]:
    """Yield the target, the parabolas of the rungs, the laws over them, and the law of the loss."""
    yield section("The target", table(rows_of(result)))
    for axis in range(len(ladder.names)):
        yield _parabolas(ladder, result, axis)
    for axis in range(len(ladder.names)):
        yield _optima(ladder, result, axis)
    yield _loss(ladder, result)


def _parabolas(ladder: Ladder, result: Extrapolation, axis: int) -> str:
    """Draw how far the loss of each rung lies above its lowest one: in the losses themselves no bend would be seen."""
    searched = [each for each in result.climbed if each.optimum is not None]
    key = FIELDS[ladder.names[axis]]
    series = []
    for color, each in zip(colors(len(searched)), searched, strict=True):
        assert each.optimum is not None, "it was searched"
        at, lowest = each.optimum.at, each.optimum.loss.value
        near = [point[axis] for point in each.optimum.near]
        best: dict[float, float] = {}
        for trial in each.trials:
            value = float(str(trial.values[key]))
            if trial.state == "complete" and trial.objectives is not None and min(near) <= value <= max(near):
                best[value] = min(best.get(value, trial.objectives[0]), trial.objectives[0])
        values = [other.value for other in at]
        curve = [
            (x, each.optimum.curve(*values[:axis], x, *values[axis + 1 :]) - lowest)
            for x in _between(min(near), max(near))
        ]
        ends = [(max(at[axis].low, min(near)), min(at[axis].high, max(near)))]
        series += [
            Series([(x, loss - lowest) for x, loss in sorted(best.items())], "", color, alpha=0.5),
            Series(curve, each.rung.name, color, "-"),
            Series([(at[axis].value, 0.0)], "", color, marker="*", sideways=ends),
        ]
    caption = "dots: the best trial at a value; lines: parabolas; stars: their lowest points and the 95% interval"
    look = Look(_UNITS[ladder.names[axis]], "loss above the rung's lowest (nats a token)", caption, "x")
    return section(f"Best {ladder.names[axis]} of each rung", plot(f"parabolas-{axis}", look, series))


def _optima(ladder: Ladder, result: Extrapolation, axis: int) -> str:
    """Draw the best values over the parameters, the law through them with its band, and published laws."""
    name = ladder.names[axis]
    law = result.optima.get(name)
    if law is None:
        return ""
    searched = [(each, each.optimum.at[axis]) for each in result.climbed if each.optimum is not None]
    series, bands = _law(ladder, searched, law.predict, result.values[name])
    unit = 1 if name == "rate" else result.target.train.seq_len
    dashes = iter((":", "--", "-."))
    for published, at_target in result.published:
        if published.quantity == name:
            alike = [each for each in result.climbed if each.rung.ratio == ladder.target.ratio]
            points = [(each.run.parameters, published.at(_scale(each)) / unit) for each in alike]
            points.append((ladder.target.parameters, at_target / unit))
            series.append(Series(points, published.name, "slate", next(dashes)))
    grey = f"grey: published laws at {ladder.target.ratio:g} tokens a parameter"
    look = Look("parameters", _UNITS[name], f"band: where 95% of such optima lie; {grey}", "xy")
    return section(f"The law of the {name}", plot(f"law-{name}", look, series, bands))


def _scale(climbed: Climbed) -> Scale:
    rung, tokens = climbed.rung, climbed.run.tokens
    return Scale(rung.parameters, rung.parameters_without_embeddings, tokens, rung.layer_flops_per_token * tokens)


def _loss(ladder: Ladder, result: Extrapolation) -> str:
    """Draw the losses of the rungs over their parameters, the law with its band, and the target."""
    rows = [(each.rung.name, _words(each)) for each in result.climbed]
    if result.loss is None or result.predicted is None:
        return section("The rungs", table(rows))
    losses = [(each, Interval(each.run.loss, each.run.loss, each.run.loss)) for each in result.climbed]
    series, bands = _law(ladder, losses, result.loss.predict, result.predicted)
    caption = f"{result.loss.form}; band: where 95% of such runs lie"
    look = Look("parameters", _LOSS, caption, "x")
    return section("The law of the loss", plot("law-loss", look, series, bands), table(rows))


def _law(
    ladder: Ladder, points: Sequence[tuple[Climbed, Interval]], predict: Any, target: Interval
) -> tuple[list[Series], list[Band]]:
    """Return a law over the parameters at each ratio of tokens to them, its band at the target's, and what it is about.

    Args:
        points: of the rungs.
        predict: the law's interval at parameters and tokens.
    """
    ratios = sorted({each.rung.ratio for each, _ in points})
    sizes = _between(min(each.run.parameters for each, _ in points), ladder.target.parameters)
    series, bands = [], []
    for color, ratio in zip(["blue"] if len(ratios) == 1 else colors(len(ratios)), ratios, strict=True):
        at = [predict(size, ratio * size) for size in sizes]
        curve = [(size, each.value) for size, each in zip(sizes, at, strict=True)]
        series.append(Series(curve, f"law at {ratio:g} tokens a parameter", color, "-"))
        if ratio == ladder.target.ratio:
            bands.append(Band([(size, each.low, each.high) for size, each in zip(sizes, at, strict=True)]))
        for is_held, marker in ((False, "o"), (True, "D")):
            some = [
                (c, v) for c, v in points if c.rung.ratio == ratio and (c.rung.parameters == ladder.held_out) == is_held
            ]
            own = "orange" if is_held and len(ratios) == 1 else color
            label = ("held-out rung" if is_held else "rungs") if ratio == ratios[-1] else ""
            places = [(float(c.run.parameters), value.value) for c, value in some]
            bounds = [(value.low, value.high) for _, value in some]
            series.append(Series(places, label, own, marker=marker, bounds=bounds))
    end = [(float(ladder.target.parameters), target.value)]
    series.append(Series(end, "target, predicted", "red", marker="*", bounds=[(target.low, target.high)]))
    return series, bands


def _words(climbed: Climbed) -> str:
    run, flops = climbed.run, climbed.rung.flops_per_token * climbed.run.tokens
    return (
        f"{run.parameters:,.0f} parameters, {run.tokens:,.0f} tokens, {flops:.3g} FLOP each, "
        f"loss {climbed.optimum.loss if climbed.optimum is not None else run.loss}"
    )


def _between(low: float, high: float) -> list[float]:
    return [low * (high / low) ** (step / _CURVE_POINTS) for step in range(_CURVE_POINTS + 1)]
