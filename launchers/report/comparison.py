"""One self-contained HTML page that sets runs beside each other: their curves, their figures, and what differs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trimaran.launchers.report.curves import PEAK_MEMORY, Clock, events, losses, over_steps, step_points
from trimaran.launchers.report.page import figures, flatten, layout_words, progress, unit_of_loss
from trimaran.launchers.report.phases import run_phases
from trimaran.runtime.pages.charts import COLORS, Look, Series
from trimaran.runtime.pages.html import document, folded, grid, notice, section, write_page
from trimaran.runtime.pages.run_folder import Run, read_run
from trimaran.runtime.plan.brief import duration
from trimaran.runtime.spec.run import flat_fields

_TECHNICAL = ("train.output_dir",)  # differs between any two runs


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write a page that compares run folders, of which any file may be missing; return its path.

    Raises:
        ValueError: a folder does not exist, or fewer than two or more than eight are given.
    """
    if not 2 <= len(run_dirs) <= len(COLORS):
        raise ValueError(f"a comparison has 2 to {len(COLORS)} runs; got {len(run_dirs)}")
    if missing := [str(folder) for folder in run_dirs if not folder.is_dir()]:
        raise ValueError(f"run folder {missing[0]!r} does not exist; name the train.output_dir of a run")
    return write_page(path, render_comparison([read_run(folder) for folder in run_dirs], run_dirs))


def render_comparison(runs: Sequence[Run], run_dirs: Sequence[Path]) -> str:
    """Return the page; runs whose folders have one name are told apart by their paths."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in run_dirs]
    clocks = [Clock(run) for run in runs]
    parts = [
        notice(
            "problem", [f"{name}: {text}" for name, run in zip(names, runs, strict=True) for text in run.notes.problems]
        ),
        _figures(names, runs),
        _losses(names, clocks),
        _curves(names, clocks),
        _spec(names, runs),
    ]
    headline = f"{len(runs)} runs: {escape(', '.join(names))} · trimaran report"
    return document("Comparison", headline, parts)


def _figures(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Return the figures side by side; what a run does not have is empty."""
    columns = [
        {"Steps": progress(run), "Layout": layout_words(run.spec), **dict(figures(run))}
        | {f"Time in {phase}": duration(seconds) for phase, seconds in run_phases(run) if phase != "steps"}
        for run in runs
    ]
    shown = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, "") for column in columns)) for name in shown]
    return section("Final figures", grid(("", *names), rows))


def _losses(names: Sequence[str], clocks: Sequence[Clock]) -> str:
    lines = [
        (clock, line)
        for name, clock, color in zip(names, clocks, COLORS, strict=False)
        for line in losses(clock.run, color, name)
        if line.points
    ]
    marks = [
        (clock, mark)
        for name, clock, color in zip(names, clocks, COLORS, strict=False)
        for mark in events(clock.run, color, name)
    ]
    units = dict.fromkeys(unit_of_loss(clock.run) for clock in clocks if clock.run.steps)
    label = ", or ".join(units) or "loss"
    mixed = "" if len(units) < 2 else '<p class="soft">The losses of these runs are not of one kind.</p>'
    return section("Loss", mixed, over_steps("loss", Look("step", label), lines, marks))


def _curves(names: Sequence[str], clocks: Sequence[Clock]) -> str:
    columns = {
        "tokens_per_second": "throughput, tokens per second",
        "lr": "learning rate",
        "grad_norm": "gradient norm, before clipping",
        "peak_memory_bytes": PEAK_MEMORY,
        "reward": "reward of the rollout",
        "accuracy": "accuracy",
    }
    parts = []
    for column, label in columns.items():
        lines = [
            (clock, Series(points, name, color, "-", width=1.2))
            for name, clock, color in zip(names, clocks, COLORS, strict=False)
            if (points := step_points(clock.run, column))
        ]
        if lines:
            parts.append(over_steps(column, Look("step", label, zero=column == "tokens_per_second"), lines))
    return section("Speed and health", f'<div class="row">{"".join(parts)}</div>') if parts else ""


def _spec(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Return the fields in which the specs differ, and what the runs trained on and where, if that differs."""
    parts = []
    kinds = (("spec", "spec.yaml"), ("manifest", "data_manifest.json"), ("machine", "machine.json"))
    for kind, file in kinds:
        of_kind = _fields if kind == "spec" else flatten
        columns = {
            name: dict(of_kind(found)) for name, run in zip(names, runs, strict=True) if (found := getattr(run, kind))
        }
        fields = dict.fromkeys(name for column in columns.values() for name in column)
        rows = [
            (name, *(column.get(name, "") for column in columns.values()))
            for name in fields
            if name not in _TECHNICAL and len({column.get(name) for column in columns.values()}) > 1
        ]
        unknown = [name for name in names if name not in columns]
        table = f'<p class="soft">Not known of {escape(", ".join(unknown))}.</p>' if unknown else ""
        if len(columns) > 1:
            table += grid(("field", *columns), rows) if rows else "<p>No difference.</p>"
        parts.append(table if kind == "spec" else folded(f"Differences of {file} ({len(rows):,})", table))
    return section("What differs in the specs", *parts)


def _fields(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the paths of a spec's fields, such as parallel.tp, and their values as YAML has them."""
    for path, value in flat_fields(spec).items():
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
