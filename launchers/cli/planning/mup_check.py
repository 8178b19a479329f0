"""`trimaran coordinate-check`: whether activations, or the best rate, stay as a model grows wider: table and picture.

Imports no torch before the options are valid.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trimaran.launchers.cli.common.console import SpecPath, errors_as_sentences, path
from trimaran.launchers.terminal import new_table, print_table, say, writing_output
from trimaran.launchers.worker.process import threads_per_rank
from trimaran.runtime.spec import RunSpec, load_spec

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from trimaran.runtime.data.prepare import PreparedData
    from trimaran.runtime.mesh import Mesh
    from trimaran.runtime.train.checks.mup_check import ActivationSizes, Growth
    from trimaran.runtime.train.checks.rate_check import RateCurves

_PANEL_INCHES = (5.2, 4.2)
_COLORS = {"embedding": "#6b7280", "final_norm": "#f59e0b", "logits": "#dc2626"}
_ATTENTION_COLOR, _LAYER_COLOR = "#2563eb", "#15803d"


def coordinate_check(
    spec_path: SpecPath,
    widths: Annotated[
        str, typer.Option(help="Values of hidden_size, everything else in proportion.")
    ] = "64,128,256,512",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps at every width, all on one global batch.")] = 4,
    grow: Annotated[
        Literal["heads", "head_dim"], typer.Option(help="Whether the heads grow in number, or each in width.")
    ] = "heads",
    data: Annotated[bool, typer.Option("--data", help="Train on the spec's text instead of random tokens.")] = False,
    rates: Annotated[
        str, typer.Option(help="Compare the losses of whole runs of the spec at these rates and every width instead.")
    ] = "",
    picture: Annotated[
        Path | None, typer.Option(parser=path, help="Draw what is measured into this .svg or .png file.")
    ] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Change a field; may be repeated.")
    ] = [],  # noqa: B006
) -> None:
    """Train a few steps at several widths and show how the width changes the size of each module's output, beside init
    normal."""
    with errors_as_sentences():
        numbers = _read_widths(widths)
        if picture is not None and picture.suffix not in (".svg", ".png"):
            raise ValueError(f"--picture must end in .svg or .png; got {picture}")
        spec = load_spec(spec_path, overrides)
        if rates:
            curves = _measure_rates(spec, numbers, _read_rates(rates), grow)
            _show_rates(curves)
            if picture is not None:
                draw_rates(curves, picture)
                say(f"losses drawn in {picture}")
            return
        found = _measure(spec, numbers, steps, grow, on_text=data)
        _show(found, steps)
        if picture is not None:
            draw(found, picture)
            say(f"sizes drawn in {picture}")


def _read_widths(text: str) -> list[int]:
    try:
        widths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        widths = []
    if len(widths) < 2 or widths[0] < 1:
        raise ValueError(
            f"--widths must be two or more whole numbers with commas between them, such as 64,128,256; got {text!r}"
        )
    return widths


def _read_rates(text: str) -> list[float]:
    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        rates = []
    if len(rates) < 3 or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(
            f"--rates must be three or more numbers above 0 with commas between them, such as 1e-3,2e-3,4e-3; "
            f"got {text!r}"
        )
    return rates


def _text_of(single: RunSpec) -> "PreparedData":
    from trimaran.launchers.data.prepare import prepare_spec
    from trimaran.launchers.data.workers import WorkerOptions, local_workers

    if single.finetune is not None:
        raise ValueError(
            "this check trains on text, and the spec finetunes on examples; leave the section finetune out"
        )
    _, text = prepare_spec(single, local_workers(WorkerOptions.of_spec(single)) if single.data.has_recipe else None)
    return text


@contextmanager
def _alone(spec: RunSpec) -> Iterator[tuple["Mesh", "torch.device"]]:
    """Yield the mesh of this one process, and its device."""
    import torch

    from trimaran.launchers.rendezvous.store import single_process
    from trimaran.launchers.worker.device import choose_device
    from trimaran.launchers.worker.process_group import join_world, leave_world

    torch.set_num_threads(threads_per_rank(spec, 1))
    device = choose_device(spec.launcher.device, 0, 1)
    mesh = join_world(spec, device, single_process())
    try:
        yield mesh, device
    finally:
        leave_world(mesh)


def _measure(
    spec: RunSpec, widths: list[int], num_steps: int, growth: "Growth", *, on_text: bool
) -> "dict[str, ActivationSizes]":
    """Return the sizes by init: the spec's, and normal too if the spec's is another."""
    from trimaran.runtime.train.checks import mup_check
    from trimaran.runtime.train.train_context import TrainingDiverged

    single = mup_check.spec_at_width(spec, spec.transformer.hidden_size, growth)
    make_batches: mup_check.MakeBatches = mup_check.random_batches
    if on_text:
        make_batches = mup_check.batches_of_text(single, _text_of(single))
    found: dict[str, mup_check.ActivationSizes] = {}
    with _alone(single) as (mesh, device):
        try:
            for each in (spec, mup_check.plain_spec(spec)):
                if each.transformer.init not in found:
                    found[each.transformer.init] = mup_check.measure(
                        each, widths, num_steps, growth, make_batches, mesh, device
                    )
        except TrainingDiverged as error:
            raise ValueError(
                f"{error}; a check needs no better rate than one that all widths bear: --set optimizer.lr=RATE"
            ) from error
    return found


def _measure_rates(spec: RunSpec, widths: list[int], rates: list[float], growth: "Growth") -> "dict[str, RateCurves]":
    """Return the losses by init: the spec's, and normal too if the spec's is another."""
    from trimaran.runtime.train.checks import mup_check
    from trimaran.runtime.train.checks.rate_check import RateCurves, losses_over_rates

    single = mup_check.spec_at_width(spec, spec.transformer.hidden_size, growth)
    text = _text_of(single)
    found: dict[str, RateCurves] = {}
    with _alone(single) as (mesh, device):
        for each in (spec, mup_check.plain_spec(spec)):
            init = each.transformer.init
            if init not in found:
                found[init] = losses_over_rates(
                    each, widths, rates, growth, text, mesh, device,
                    lambda width, rate, loss, init=init: say(  # type: ignore[misc]
                        f"{init}, width {width}, rate {rate:g}: held-out loss {loss:.4f}"
                    ),
                )  # fmt: skip
    return found


def _show_rates(found: "dict[str, RateCurves]") -> None:
    """Print the losses of each init as a table, and by what factor its best rate moves."""
    for init, curves in found.items():
        table = new_table(f"held-out loss, init {init}", *(f"{rate:g}" for rate in curves.rates))
        for width, losses in zip(curves.widths, curves.losses, strict=True):
            best = min(losses)
            table.add_row(
                f"width {width}", *(f"{loss:.4f}{' *' if loss == best else ''}" if loss < math.inf else "diverged"
                for loss in losses)
            )  # fmt: skip
        print_table(table)
    with writing_output():
        for init, curves in found.items():
            first, last = curves.widths[0], curves.widths[-1]
            ends = f"{curves.best(first):g} at width {first}, {curves.best(last):g} at width {last}"
            print(f"{init}: the best rate is {ends}: times {curves.shift:.3g}")
            for width in curves.edges():
                print(f"  at width {width} it is at the edge of --rates; give more of them")


def draw_rates(found: "dict[str, RateCurves]", path: Path) -> None:
    """Draw the held-out loss over the rate: a panel for each init, a line for each width, its lowest point marked.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (_PANEL_INCHES[0] * len(found), _PANEL_INCHES[1])
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (init, curves) in zip(panels, found.items(), strict=True):
        for number, (width, losses) in enumerate(zip(curves.widths, curves.losses, strict=True)):
            color = colormaps["viridis"](0.9 * number / len(curves.widths))
            points = [(rate, loss) for rate, loss in zip(curves.rates, losses, strict=True) if loss < math.inf]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=f"width {width}")
                axes.plot(curves.best(width), min(losses), "*", color=color, markersize=13)
        axes.set_xscale("log", base=2)
        axes.set_xticks(curves.rates, [f"{rate:g}" for rate in curves.rates], rotation=30)
        axes.set_xlabel("optimizer.lr")
        axes.set_title(f"init {init}", fontsize=10)
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=7, frameon=False)
    panels[0].set_ylabel("held-out loss")
    figure.savefig(path, dpi=150)


def _show(found: "dict[str, ActivationSizes]", num_steps: int) -> None:
    print_table(table_of(found, num_steps))
    for init, sizes in found.items():
        slopes = {module: sizes.slope(module, num_steps) for module in sizes.sizes}
        known = {module: slope for module, slope in slopes.items() if math.isfinite(slope)}
        if known:
            worst = max(known, key=lambda module: abs(known[module]))
            with writing_output():
                print(f"{init}: after {num_steps} steps the slope farthest from 0 is {known[worst]:+.2f}, of {worst}")


def table_of(found: "dict[str, ActivationSizes]", num_steps: int) -> "Table":
    """Return the table of the slopes of log(size) over log(width), before the first step and after the last.

    It has one row for each module.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("slope over the width", no_wrap=True)
    for init in found:
        table.add_column(f"{init}, step 0", justify="right")
        table.add_column(f"step {num_steps}", justify="right")
    for module in next(iter(found.values())).sizes:
        slopes = [sizes.slope(module, step) for sizes in found.values() for step in (0, num_steps)]
        table.add_row(module, *("-" if math.isnan(slope) else f"{slope:+.2f}" for slope in slopes))
    return table


def _color(module: str, depth: float) -> tuple[str, float]:
    """Return (color, opacity) of a module's lines; blocks get darker with their depth in [0, 1]."""
    if module in _COLORS:
        return _COLORS[module], 1.0
    return _ATTENTION_COLOR if module.endswith("attention") else _LAYER_COLOR, 0.35 + 0.65 * depth


def draw(found: "dict[str, ActivationSizes]", path: Path) -> None:
    """Draw the mean absolute output over the width: a panel for each init, a line for each module.

    Lines are dotted at the start and solid after the last step.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(_PANEL_INCHES[0] * len(found) + 1.6, _PANEL_INCHES[1]), facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (init, sizes) in zip(panels, found.items(), strict=True):
        for number, (module, by_step) in enumerate(sizes.sizes.items()):
            color, paleness = _color(module, number / len(sizes.sizes))
            axes.plot(sizes.widths, by_step[0], color=color, alpha=paleness, linestyle=":", linewidth=1)
            axes.plot(
                sizes.widths,
                by_step[-1],
                color=color,
                alpha=paleness,
                marker="o",
                markersize=3,
                linewidth=1.5,
                label=module,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes.widths, [str(width) for width in sizes.widths])
        axes.set_xlabel("hidden_size")
        axes.set_title(f"init {init}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean absolute output; dotted: at the start")
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
