"""One self-contained HTML page about a run: what it learned, how fast, and where its pipeline waited.

The file is complete: styles, charts as SVG, no script and no address to fetch from, which a content security policy
forbids too. Text from the run folder is escaped. The page is made from these files of the folder:

    spec.yaml           the resolved run spec
    metrics.jsonl       one row for each step
    data_manifest.json  counts of the data preparation
    timeline.json       the pipeline's last step, measured and simulated
    sample.txt          text the model wrote
    machine.json        `describe_machine` of the machine that trained
    plan.json           what was planned before it began, and memory.json: what its ranks held

Each of them may be missing; the page says which one and why it matters.
"""

import math
import statistics
from collections.abc import Mapping
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from trimaran.launchers.report.charts import (
    BLUE,
    COLORS,
    ORANGE,
    PALE_BLUE,
    Grid,
    Line,
    chart,
    embed,
    map_chart,
    memory_chart,
    plain,
    smooth,
)
from trimaran.launchers.report.folder import Run, finite_points, is_finite, read_run
from trimaran.launchers.report.html import document, grid, notice, section, table, write_page
from trimaran.launchers.report.plan_rows import plan_rows
from trimaran.runtime.evaluate.results import stderr_name
from trimaran.runtime.pipeline.draw import timeline_svg
from trimaran.runtime.pipeline.trace import spans_of

_INTERVAL = 1.96  # standard errors of half a 95% interval
_MOST_SAMPLE_CHARACTERS = 20_000
# Label of a picture's axis -> names of its lines by their columns of metrics.jsonl, or with held_out_ before these.
_COMPARED = {
    "accuracy": {"accuracy": "accuracy"},
    "rewards": {"chosen_reward": "chosen reward", "rejected_reward": "rejected reward"},
    "margin": {"margin": "margin"},
    "divergence from the reference, nats": {"kl": "kl"},
}
_REWARDED = {
    "reward": {"reward": "of the rollout", "reward_std": "deviation of its answers"},
    "divergence, nats a token": {"kl": "from the reference", "old_kl": "from before the rollout"},
    "entropy, nats a token": {"entropy": "entropy"},
    "share of tokens that are clipped": {"clip_share": "clipped"},
    "tokens of an answer": {"answer_tokens": "tokens"},
    "share of answers without an end": {"cut_share": "cut"},
    "loss of the values": {"value_loss": "loss"},
}
_TIMELINES = {"measured": "As it ran", "simulated": "Simulated"}  # key in timeline.json -> title of the picture


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from what the run folder holds and return its path.

    An older report is replaced in one rename. The folder must exist; any file of it may be missing.

    Raises:
        ValueError: ``run_dir`` is not a folder.
    """
    if not run_dir.is_dir():
        raise ValueError(f"run folder {str(run_dir)!r} does not exist; name the train.output_dir of a run")
    return write_page(run_dir / "report.html", _render(read_run(run_dir)))


def _render(run: Run) -> str:
    """Return the page; what most readers want first comes first."""
    headline = f"{escape(_progress(run))} · layout {escape(_layout(run.spec))} · trimaran report"
    sections = [
        _loss(run),
        _beside_the_loss(run),
        _scores(run),
        _speed(run),
        _pipeline(run),
        _plan(run),
        _sample(run),
        _summary(run),
        _facts(run),
        _spec(run),
    ]
    problems, missing = notice("problem", run.notes.problems), notice("missing", run.notes.missing)
    return document(run.name, headline, [problems, _cards(run), *sections, missing])


def _cards(run: Run) -> str:
    figures = dict(_figures(run))
    if run.steps and is_finite(tokens := run.steps[-1].get("tokens_seen")):
        figures["Tokens seen"] = _short(float(tokens or 0))
    shown = ("Final loss", "Held-out loss", "Held-out perplexity", "Tokens/s, median", "Tokens seen", "Time in steps")
    cards = "".join(
        f'<div class="card"><b>{escape(figures[name])}</b><span>{name}</span></div>'
        for name in shown
        if name in figures
    )
    return f'<div class="cards">{cards}</div>' if cards else ""


def _summary(run: Run) -> str:
    rows = [("Steps", _progress(run)), ("Layout", _layout(run.spec)), *_figures(run)]
    return section("Summary", table(rows))


def _progress(run: Run) -> str:
    planned = _nested(run.spec, "train", "num_steps")
    if not run.steps:
        return "no step has finished yet"
    done = int(run.steps[-1]["step"] or 0)
    return f"{done:,} of {planned:,} steps" if isinstance(planned, int) else f"{done:,} steps"


def _layout(spec: Mapping[str, Any]) -> str:
    """Return "tp 2 × pp 2 × dp 2 = 8 ranks, 1f1b" from the parallel section; axes of size 1 are left out."""
    parallel = spec.get("parallel")
    if not isinstance(parallel, dict):
        return "unknown" if not spec else "1 rank"
    sizes = {
        axis: size
        for axis in ("tp", "pp", "dp", "cp", "ep")
        if isinstance(size := parallel.get(axis, 1), int) and size > 1
    }
    ranks = math.prod(sizes.values())
    text = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
    text = f"{text} = {ranks} ranks" if sizes else "1 rank"
    if sizes.get("pp"):
        text += f", {parallel.get('schedule_file') or parallel.get('schedule', '1f1b')}"
    if parallel.get("virtual_stages", 1) != 1:
        text += f" with {parallel['virtual_stages']} virtual stages"
    return text + (", sequence parallel" if parallel.get("sequence_parallel") else "")


def _figures(run: Run) -> list[tuple[str, str]]:
    """Return the figures of the run as (name, text), those that are known."""
    found: list[tuple[str, str]] = []
    if run.steps:
        last = run.steps[-1]
        found = [
            ("Final loss", _number(last["loss"], ".4f")),
            ("Tokens seen", _number(last.get("tokens_seen"), ",.0f")),
        ]
        if speeds := [y for _, y in finite_points(run.steps, "tokens_per_second")]:
            found.append(("Tokens/s, median", f"{statistics.median(speeds):,.0f}"))
        if shares := [y for _, y in finite_points(run.steps, "mfu")]:
            peak = (run.machine or {}).get("mfu_peak")
            found.append(("MFU, median", f"{statistics.median(shares):.1%}" + f" of {peak}" * bool(peak)))
        if times_ms := [y for _, y in finite_points(run.steps, "step_time_ms")]:
            found.append(("Step time, median", f"{statistics.median(times_ms):,.1f} ms"))
            # evaluation and checkpoints between the steps are not in the rows, hence the name
            found.append(("Time in steps", str(timedelta(seconds=round(sum(times_ms) / 1000)))))
    if run.evaluations:
        last = run.evaluations[-1]
        found.append(("Held-out loss", _number(last["held_out_loss"], ".4f")))
        if "held_out_perplexity" in last:
            found.append(("Held-out perplexity", _number(last["held_out_perplexity"], ",.2f")))
        if "held_out_accuracy" in last:
            found.append(("Held-out accuracy", _number(last["held_out_accuracy"], ".1%")))
    return found


def _loss(run: Run) -> str:
    if not run.steps and not run.evaluations:
        return section("Loss", "<p>No step has finished yet, so there is nothing to draw.</p>")
    points = finite_points(run.steps, "loss")
    lines = [Line(points, "training", PALE_BLUE if len(points) > 50 else BLUE)]
    if len(points) > 50:
        lines.append(Line(smooth(points), "training, smoothed", BLUE, width=1.8))
    lines.append(Line(finite_points(run.evaluations, "held_out_loss"), "held-out", ORANGE, width=1.8, dots=True))
    lost = [float(row["step"] or 0) for row in run.steps if not is_finite(row["loss"])]
    return section("Loss", chart("loss", _unit_of_loss(run), lines, size=(10.4, 3.7), lost=lost))


def _unit_of_loss(run: Run) -> str:
    if _has(run, "reward"):
        return "loss of the policy"
    return "loss per example" if _has(run, "accuracy") else "cross entropy, nats per token"


def _has(run: Run, column: str) -> bool:
    return any(column in row for row in run.steps)


def _beside_the_loss(run: Run) -> str:
    """Return pictures of what a run that learns from rewards, or compares answers, tells beside its loss."""
    rewarded = _has(run, "reward")
    parts = []
    for label, names in (_REWARDED if rewarded else _COMPARED).items():
        lines = [
            Line(points, f"{name}{suffix}", color, width=width, dots=bool(suffix))
            for (column, name), color in zip(names.items(), (BLUE, ORANGE), strict=False)
            for rows, prefix, suffix, width in (
                (run.steps, "", "", 1.0),
                (run.evaluations, "held_out_", ", held-out", 1.8),
            )
            if (points := finite_points(rows, prefix + column))
        ]
        if lines:
            parts.append(chart(next(iter(names)), label, lines, size=(5.0, 2.6)))
    return section("Learning from rewards" if rewarded else "Comparisons of answers", *parts) if parts else ""


def _scores(run: Run) -> str:
    """Return a picture of each metric of the evaluated tasks over the steps, a line for each task."""
    by_metric: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for row in run.scores:
        for name, value in row.items():
            task, slash, metric = name.rpartition("/")
            if slash and not metric.partition(",")[0].endswith("_stderr") and value is not None and is_finite(value):
                error = row.get(stderr_name(name))
                spread = _INTERVAL * error if error is not None and is_finite(error) else 0.0
                by_metric.setdefault(metric, {}).setdefault(task, []).append((row["step"] or 0, value, spread))
    parts = []
    for number, (metric, of_task) in enumerate(by_metric.items()):
        lines = [
            Line(
                [(x, y) for x, y, _ in points], plain(task), color, dots=True, errors=[error for _, _, error in points]
            )
            for (task, points), color in zip(of_task.items(), COLORS, strict=False)
        ]
        parts.append(chart(f"scores-{number}", plain(metric), lines, size=(10.4, 3.2)))
        if further := len(of_task) - len(lines):
            parts.append(f'<p class="soft">{further:,} further tasks are in metrics.jsonl.</p>')
    return section("Scores of tasks, with 95% intervals", *parts) if parts else ""


def _speed(run: Run) -> str:
    if not run.steps:
        return ""
    charts = [
        ("Throughput", "tokens per second", "tokens_per_second", True),
        ("Gradient norm", "before clipping", "grad_norm", False),
        ("Learning rate", "learning rate", "lr", True),
    ]
    parts = []
    for title, label, column, from_zero in charts:
        line = Line(finite_points(run.steps, column), label, BLUE)
        drawn = chart(column, label, [line], size=(5.0, 2.6), from_zero=from_zero)
        parts.append(f"<div>\n<h2>{title}</h2>\n{drawn}\n</div>")
    return f'<section class="row">\n{"".join(parts)}\n</section>'


def _pipeline(run: Run) -> str:
    """Return the timeline as it ran above the simulated one, or what is wrong with the file."""
    if run.timeline is None:
        return ""
    title = "Pipeline timeline of the last step"
    try:
        shares = ", ".join(
            f"{_number(run.timeline.get(f'bubble_{key}'), '.1%')} {key}" for key in ("measured", "simulated")
        )
        ranks = int(run.timeline["num_ranks"])
        pictures = [
            embed(timeline_svg(spans_of(run.timeline[key], ranks), name), key) for key, name in _TIMELINES.items()
        ]
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        return section(
            title, f"<p>timeline.json cannot be drawn: {escape(type(error).__name__)}, {escape(str(error))}.</p>"
        )
    meaning = (
        f"{ranks} pipeline ranks. Bubble, the share of the step in which a rank waits, averaged over ranks: {shares}."
    )
    return section(title, f'<p class="soft">{escape(meaning)}</p>', *pictures)


def _plan(run: Run) -> str:
    """Return what was planned beside what was measured, "" where nothing was planned."""
    if run.plan is None:
        return ""
    steps = [milliseconds / 1e3 for _, milliseconds in finite_points(run.steps, "step_time_ms")]
    found, title = plan_rows(run.plan, run.memory, run.timeline, steps), "Planned and measured"
    if found.problem:
        return section(title, f"<p>plan.json cannot be shown: {escape(found.problem)}.</p>")
    parts = [f'<p class="soft">{escape(sentence)}</p>' for sentence in found.sentences]
    tables = (("memory of the fullest pipeline rank", found.memory), ("time of a step", found.times))
    parts += [grid((name, "planned", "measured"), rows) for name, rows in tables if rows]
    if found.brief is not None and found.brief.memory:
        brief = found.brief
        parts.append(memory_chart("memory", brief.memory, brief.rank_bytes, brief.place, found.peaks))
    ranks = _grid_of(run.spec)
    if ranks is not None and ranks.ranks > 1:
        parts.append(map_chart("map", ranks))
    return section(title, *parts)


def _grid_of(spec: Mapping[str, Any]) -> Grid | None:
    """Return where the ranks live, by the spec; None where it has no layout."""
    parallel, nodes = spec.get("parallel"), _nested(spec, "launcher", "nodes")
    nodes = 1 if nodes is None else nodes
    if not isinstance(parallel, dict):
        return None
    whole = Grid.of(parallel, 1)
    share = whole.ranks // nodes if whole is not None and isinstance(nodes, int) and nodes > 0 else 0
    return Grid.of(parallel, share)


def _sample(run: Run) -> str:
    if run.sample is None:
        return ""
    shown = run.sample[:_MOST_SAMPLE_CHARACTERS]
    rest = len(run.sample) - len(shown)
    more = f'<p class="soft">{rest:,} further characters are in sample.txt.</p>' if rest else ""
    return section("Text the model wrote", f"<pre>{escape(shown)}</pre>", more)


def _facts(run: Run) -> str:
    tables = [("Training data", run.manifest), ("Machine", run.machine)]
    return "\n".join(section(title, table(_flatten(found))) for title, found in tables if found)


def _spec(run: Run) -> str:
    if not run.spec_text:
        return ""
    title = "<summary>Resolved run spec</summary>"
    return f"<section><details>{title}\n<pre>{escape(run.spec_text)}</pre></details></section>"


def _number(value: object, form: str) -> str:
    if value is None:
        return "unknown"
    return format(value, form) if is_finite(value) else "not a number" if value != math.inf else "infinite"


def _bytes(count: int) -> str:
    return (
        f"{count / 2**30:,.2f} GiB"
        if count >= 2**30
        else f"{count / 2**20:,.2f} MiB"
        if count >= 2**20
        else f"{count:,} bytes"
    )


def _short(value: float) -> str:
    """Return a large count in three or four digits, such as 19.66 M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:,.0f}"


def _nested(data: Mapping[str, Any], section: str, name: str) -> object:
    found = data.get(section)
    return found.get(name) if isinstance(found, dict) else None


def _flatten(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as ("outer, inner", text) rows; a list of records is counted, not printed."""
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows += _flatten(value, f"{name}, ")
        elif isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
            rows.append((name, f"{len(value):,} listed"))
        elif isinstance(value, list):
            rows.append((name, ", ".join(map(str, value))))
        elif name.endswith(" bytes") and isinstance(value, int):
            rows.append((name.removesuffix(" bytes"), _bytes(value)))
        else:
            rows.append((name, f"{value:,}" if type(value) is int else "unknown" if value is None else str(value)))
    return rows
