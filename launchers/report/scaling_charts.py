"""The picture of a fitted law of the loss: IsoFLOP curves, and the best size over compute with its band."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trimaran.launchers.report.plan_charts import BLUE, ORANGE, RED, standalone
from trimaran.runtime.plan.scaling.figures import Run
from trimaran.runtime.plan.scaling.isoflops import IsoFlop, compute_of
from trimaran.runtime.plan.scaling.laws import LossFormula
from trimaran.runtime.plan.scaling.optima import PowerLaw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 80


def scaling_picture(
    runs: Sequence[Run], far_off: Sequence[Run], curves: Sequence[IsoFlop], law: LossFormula, line: PowerLaw | None
) -> str:
    """Return IsoFLOP curves beside the frontier.

    Args:
        far_off: outliers among the runs.
        line: the best size over compute; None where too few curves have a lowest point.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, runs, far_off, curves)
    _frontier(right, runs, curves, law, line)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.grid(color="#e3e7ee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return standalone(figure)


def _curves(axes: "Axes", runs: Sequence[Run], far_off: Sequence[Run], curves: Sequence[IsoFlop]) -> None:
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.linspace(0.0, 0.9, max(1, len(curves))))
    for curve, color in zip(curves, colors, strict=True):
        sizes = [run.parameters for run in curve.runs]
        losses = [run.loss for run in curve.runs]
        axes.plot(sizes, losses, linestyle="", marker="o", markersize=3, color=color, label=f"{curve.flops:.2g} FLOP")
        if curve.best is not None:
            near = [value for (value,) in curve.best.near]
            over = np.geomspace(min(near), max(near), _POINTS)
            axes.plot(over, [curve.best.curve(float(size)) for size in over], color=color, linewidth=1.2)
            axes.plot([curve.size.value], [curve.best.loss.value], marker="x", color=RED, linestyle="", markersize=6)
    if not curves:
        axes.plot([run.parameters for run in runs], [run.loss for run in runs], linestyle="", marker="o", color=BLUE)
    if far_off:
        axes.plot(
            [run.parameters for run in far_off], [run.loss for run in far_off], linestyle="", marker="s",
            markerfacecolor="none", color=ORANGE, label="outliers",
        )  # fmt: skip
    axes.set_xlabel("parameters")
    axes.set_ylabel("loss")
    axes.set_title("runs of one compute, and where their parabola is lowest", loc="left", fontsize="medium")
    if curves or far_off:
        axes.legend(frameon=False, fontsize="x-small")


def _frontier(
    axes: "Axes", runs: Sequence[Run], curves: Sequence[IsoFlop], law: LossFormula, line: PowerLaw | None
) -> None:
    computes = [compute_of(run) for run in runs]
    over = np.geomspace(min(computes), 10 * max(computes), _POINTS)
    axes.plot(over, [law.best(float(each))[0] for each in over], color=BLUE, label="by the law of the loss")
    bent = [curve for curve in curves if curve.best is not None]
    for curve in bent:
        size = curve.size
        axes.errorbar(
            [curve.flops], [size.value], yerr=[[size.value - size.low], [size.high - size.value]], color=RED, fmt="x",
            capsize=2,
        )  # fmt: skip
    if line is not None:
        found = [line.predict(float(each), float(each)) for each in over]
        axes.plot(over, [each.value for each in found], color=ORANGE, label="by the lowest points")
        lows, highs = [each.low for each in found], [each.high for each in found]
        axes.fill_between(over, lows, highs, color=ORANGE, alpha=0.15, label="95% of one more point")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP")
    axes.set_ylabel("best number of parameters")
    axes.set_title("frontier", loc="left", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")
