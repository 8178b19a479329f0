"""One self-contained HTML page about a run: what it learned, how fast, and where its time and memory went.

Text from the run folder is escaped. The page is made from these files of the folder:

    spec.yaml           the resolved run spec
    metrics.jsonl       one row for each step, evaluation, start and save
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
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path
from typing import Any, Final

from trimaran.launchers.report.curves import PEAK_MEMORY, Clock, events, losses, over_steps, step_points
from trimaran.launchers.report.phases import phases_section
from trimaran.launchers.report.plan_rows import PlanRows, plan_rows
from trimaran.launchers.report.ranks import Grid, memory_bars, peak_bars, rank_map
from trimaran.launchers.report.timeline import timeline_section
from trimaran.models.fields import counted
from trimaran.runtime.evaluate.results import stderr_name
from trimaran.runtime.pages.charts import COLORS, Look, Series, plot
from trimaran.runtime.pages.html import document, folded, grid, notice, section, table, write_page
from trimaran.runtime.pages.run_folder import Run, finite_points, is_finite, nested, number, read_run
from trimaran.runtime.plan.brief import size

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
# What most readers want of data_manifest.json: its rows by the names that `flatten` gives them.
_DATA_ROWS: Final = {
    "source, named": "sources",
    "source, quickstart, corpus": "corpus",
    "corpus, files": "files",
    "corpus, documents": "documents",
    "corpus, bytes": "text",
    "tokenizer, vocab size": "vocabulary",
    "splits, train, tokens": "tokens to train on",
    "splits, held out, tokens": "tokens held out",
}


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Write ``path``, or ``run_dir/report.html``, from what the run folder holds and return where it is.

    An older report is replaced in one rename. The folder must exist; any file of it may be missing.

    Raises:
        ValueError: ``run_dir`` is not a folder.
    """
    if not run_dir.is_dir():
        raise ValueError(f"run folder {str(run_dir)!r} does not exist; name the train.output_dir of a run")
    return write_page(path or run_dir / "report.html", _render(read_run(run_dir)))


def _render(run: Run) -> str:
    """Return the page; what most readers want first comes first."""
    headline = f"{escape(progress(run))} · layout {escape(layout_words(run.spec))} · trimaran report"
    steps = [milliseconds / 1e3 for _, milliseconds in finite_points(run.steps, "step_time_ms")]
    planned = None if run.plan is None else plan_rows(run.plan, run.memory, run.timeline, steps)
    sections = [
        _loss(run),
        _beside_the_loss(run),
        _scores(run),
        _speed(run),
        phases_section(run),
        timeline_section(run),
        _memory(run, planned),
        _plan(planned),
        _sample(run),
        _summary(run),
        _facts(run),
        _spec(run),
    ]
    problems, missing = notice("problem", run.notes.problems), notice("missing", run.notes.missing)
    return document(run.name, headline, [problems, _cards(run), *sections, missing])


def _cards(run: Run) -> str:
    known = dict(figures(run))
    if run.steps and is_finite(tokens := run.steps[-1].get("tokens_seen")):
        known["Tokens seen"] = _short(float(tokens or 0))
    shown = ("Final loss", "Held-out loss", "Held-out perplexity", "Tokens/s, median", "Tokens seen", "Time in steps")
    cards = "".join(
        f'<div class="card"><b>{escape(known[name])}</b><span>{name}</span></div>' for name in shown if name in known
    )
    return f'<div class="cards">{cards}</div>' if cards else ""


def _summary(run: Run) -> str:
    starts = [
        f"{datetime.fromtimestamp(row['started_at'] or 0, UTC):%Y-%m-%d %H:%M} UTC at step {row['step']:,}"
        for row in run.times
        if is_finite(row.get("started_at"))
    ]
    rows = [("Steps", progress(run)), ("Layout", layout_words(run.spec)), *figures(run)]
    return section("Summary", table([*rows, *([("Started", "; ".join(starts))] if starts else [])]))


def progress(run: Run) -> str:
    """Return how far a run is."""
    planned = nested(run.spec, "train", "num_steps")
    if not run.steps:
        return "no step has finished yet"
    done = int(run.steps[-1]["step"] or 0)
    return f"{done:,} of {counted(planned, 'step')}" if isinstance(planned, int) else counted(done, "step")


def layout_words(spec: Mapping[str, Any]) -> str:
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


def _loss_form(loss: object) -> str:
    """Return the format of a loss: four decimal places, and of one so small that these are zeros its first digits."""
    return ".4f" if not isinstance(loss, int | float) or loss == 0 or abs(loss) >= 0.01 else ".3g"


def figures(run: Run) -> list[tuple[str, str]]:
    """Return the figures of the run as (name, text), those that are known."""
    found: list[tuple[str, str]] = []
    if run.steps:
        last = run.steps[-1]
        found = [
            ("Final loss", number(last["loss"], _loss_form(last["loss"]))),
            ("Tokens seen", number(last.get("tokens_seen"), ",.0f")),
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
        found.append(("Held-out loss", number(last["held_out_loss"], _loss_form(last["held_out_loss"]))))
        if "held_out_perplexity" in last:
            found.append(("Held-out perplexity", number(last["held_out_perplexity"], ",.2f")))
        if "held_out_accuracy" in last:
            found.append(("Held-out accuracy", number(last["held_out_accuracy"], ".1%")))
    return found


def _loss(run: Run) -> str:
    if not run.steps and not run.evaluations:
        return section("Loss", "<p>No step has finished yet, so there is nothing to draw.</p>")
    clock, look = Clock(run), Look("step", unit_of_loss(run))
    lines, marks = [(clock, each) for each in losses(run, "blue")], [(clock, each) for each in events(run)]
    return section("Loss", over_steps("loss", look, lines, marks))


def unit_of_loss(run: Run) -> str:
    """Return what the loss of a run is."""
    if _has(run, "reward"):
        return "loss of the policy"
    return "loss per example" if _has(run, "accuracy") else "cross entropy, nats per token"


def _has(run: Run, column: str) -> bool:
    return any(column in row for row in run.steps)


def _beside_the_loss(run: Run) -> str:
    """Return pictures of what a run that learns from rewards, or compares answers, tells beside its loss."""
    rewarded, clock = _has(run, "reward"), Clock(run)
    parts = []
    for label, names in (_REWARDED if rewarded else _COMPARED).items():
        lines = [
            Series(points, f"{name}{suffix}", color, "--" if suffix else "-", width=width, dots=bool(suffix))
            for (column, name), color in zip(names.items(), COLORS, strict=False)
            for rows, prefix, suffix, width in (
                (run.steps, "", "", 1.0),
                (run.evaluations, "held_out_", ", held-out", 1.8),
            )
            if (points := finite_points(rows, prefix + column))
        ]
        if lines:
            parts.append(over_steps(next(iter(names)), Look("step", label), [(clock, each) for each in lines]))
    title = "Learning from rewards" if rewarded else "Comparisons of answers"
    return section(title, f'<div class="row">{"".join(parts)}</div>') if parts else ""


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
    for place, (metric, of_task) in enumerate(by_metric.items()):
        lines = [
            Series(
                [(x, y) for x, y, _ in points], task, color, "-", dots=True,
                bounds=[(y - spread, y + spread) for _, y, spread in points] if any(each[2] for each in points) else (),
            )
            for (task, points), color in zip(of_task.items(), COLORS, strict=False)
        ]  # fmt: skip
        parts.append(plot(f"scores-{place}", Look("step", metric), lines))
        if further := len(of_task) - len(lines):
            parts.append(f'<p class="soft">Not drawn: {counted(further, "further task")}, in metrics.jsonl.</p>')
    return section("Scores of tasks, with 95% intervals", *parts) if parts else ""


def _speed(run: Run) -> str:
    if not run.steps:
        return ""
    clock = Clock(run)
    charts = [
        ("throughput, tokens per second", "tokens_per_second", True),
        ("gradient norm, before clipping", "grad_norm", False),
        ("learning rate", "lr", True),
        (PEAK_MEMORY, "peak_memory_bytes", False),
    ]
    parts = []
    for label, column, zero in charts:
        points = step_points(run, column)
        if points or column != "peak_memory_bytes":  # of earlier versions it is not known
            parts.append(over_steps(column, Look("step", label, zero=zero), [(clock, Series(points, line="-"))]))
    return section("Speed and health", f'<div class="row">\n{"".join(parts)}\n</div>')


def _memory(run: Run, planned: PlanRows | None) -> str:
    """Return what ranks hold, planned and measured, and where they live."""
    parts = []
    if planned is not None and planned.brief is not None and planned.brief.memory:
        brief = planned.brief
        parts.append(memory_bars(brief.memory, brief.rank_bytes, brief.place, planned.peaks))
    peaks = (run.memory or {}).get("peak_by_rank")
    if isinstance(peaks, list) and peaks and all(map(is_finite, peaks)):
        parts.append(peak_bars(peaks, (run.memory or {}).get("peak_is")))
    ranks = _grid_of(run.spec)
    if ranks is not None and ranks.ranks > 1:
        parts.append(rank_map(ranks))
    return section("Memory and places of the ranks", *parts) if parts else ""


def _plan(found: PlanRows | None) -> str:
    """Return what was planned beside what was measured, "" where nothing was planned."""
    if found is None:
        return ""
    title = "Planned and measured"
    if found.problem:
        return section(title, f"<p>plan.json cannot be shown: {escape(found.problem)}.</p>")
    parts = [f'<p class="soft">{escape(sentence)}</p>' for sentence in found.sentences]
    tables = (("memory of the fullest pipeline rank", found.memory), ("time of a step", found.times))
    parts += [grid((name, "planned", "measured"), rows) for name, rows in tables if rows]
    return section(title, *parts)


def _grid_of(spec: Mapping[str, Any]) -> Grid | None:
    """Return where the ranks live, by the spec; None where it has no layout."""
    parallel, nodes = spec.get("parallel"), nested(spec, "launcher", "nodes")
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
    more = f'<p class="soft">Left out: {counted(rest, "further character")}, in sample.txt.</p>' if rest else ""
    return section("Text the model wrote", f"<pre>{escape(shown)}</pre>", more)


def _facts(run: Run) -> str:
    parts = []
    if run.manifest:
        rows = flatten(run.manifest)
        most = [(_DATA_ROWS[name], value) for name, value in rows if name in _DATA_ROWS]
        parts.append(section("Training data", table(most), folded("All of data_manifest.json", table(rows))))
    if run.machine:
        parts.append(section("Machine", table(flatten(run.machine))))
    return "\n".join(parts)


def _spec(run: Run) -> str:
    if not run.spec_text:
        return ""
    return f"<section>{folded('Resolved run spec', f'<pre>{escape(run.spec_text)}</pre>')}</section>"


def _short(value: float) -> str:
    """Return a large count in three or four digits, such as 19.66 M."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.4g} {letter}"
    return f"{value:,.0f}"


def flatten(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as ("outer, inner", text) rows; a list of records is counted, not printed."""
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows += flatten(value, f"{name}, ")
        elif isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
            rows.append((name, f"{len(value):,} listed"))
        elif isinstance(value, list):
            rows.append((name, ", ".join(map(str, value))))
        elif name.endswith(" bytes") and isinstance(value, int):
            rows.append((name.removesuffix(" bytes"), size(value)))
        else:
            rows.append((name, f"{value:,}" if type(value) is int else "unknown" if value is None else str(value)))
    return rows
