"""Reading a run folder without trusting it: a missing or broken file becomes a sentence, never an exception."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimaran.runtime.files import parse_json, read_json, read_text
from trimaran.runtime.train.metrics import Row, read_metrics

ERROR_FILE = "error.json"
"""In a rank's folder of a start: why it has failed."""


@dataclass(frozen=True)
class Notes:
    """Sentences about what could not be shown: what went wrong, and what simply is not there."""

    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What was found in a run folder.

    Attributes:
        spec: spec.yaml as plain data, not validated: a report of a run by an older version must still open.
        steps: training rows, by step.
        evaluations: evaluation rows, by step.
        scores: rows of scores of tasks, by step.
        times: rows of starts, saves and evaluations, by step.
    """

    name: str
    spec_text: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Row] = ()
    evaluations: Sequence[Row] = ()
    scores: Sequence[Row] = ()
    times: Sequence[Row] = ()
    timeline: Mapping[str, Any] | None = None
    sample: str | None = None
    manifest: Mapping[str, Any] | None = None
    machine: Mapping[str, Any] | None = None
    plan: Mapping[str, Any] | None = None
    memory: Mapping[str, Any] | None = None
    notes: Notes = field(default_factory=Notes)


def read_run(run_dir: Path) -> Run:
    """Return what the folder holds, with a note for everything that is missing or broken."""
    notes = Notes()
    spec_text = _read_text(run_dir / "spec.yaml", notes, "the settings and the layout of the run are unknown")
    rows = _read_rows(run_dir / "metrics.jsonl", notes)
    failure = last_failure(run_dir)
    if failure is not None:
        notes.problems.append(f"The newest start has failed: {failure}")
    steps = [row for row in rows if "loss" in row]
    diverged = [row["step"] for row in steps if not is_finite(row["loss"])]
    if diverged:
        notes.problems.append(
            f"The loss is not a number at {len(diverged):,} of {len(steps):,} steps, first at step {diverged[0]}."
        )
    return Run(
        name=run_dir.resolve().name,
        spec_text=spec_text or "",
        spec=_parse_spec(spec_text, notes),
        steps=steps,
        evaluations=[row for row in rows if "held_out_loss" in row],
        scores=[row for row in rows if any("/" in name for name in row)],
        times=[row for row in rows if any(name in row for name in ("started_at", "save_s", "evaluation_s"))],
        timeline=_read_json(run_dir / "timeline.json", notes, "no pipeline timeline; logging.timeline records one"),
        sample=_read_text(run_dir / "sample.txt", notes, "no generated text to show (BERT and XLNet write none)"),
        manifest=_read_json(run_dir / "data_manifest.json", notes, "the counts of the training data are unknown"),
        machine=_read_json(run_dir / "machine.json", notes, "the machine that trained is unknown"),
        plan=_read_json(run_dir / "plan.json", notes, "what was planned is unknown"),
        memory=_read_json(
            run_dir / "memory.json",
            notes,
            "what the ranks held is unknown until a run ends (those that learn from rewards do not write it)",
        ),
        notes=notes,
    )


def last_failure(run: Path) -> str | None:
    """Return which rank made a run's newest start fail, and why; None where none has said so."""
    starts: list[tuple[float, Path]] = []
    for folder in run.glob("logs/*-*"):
        with suppress(OSError):  # one that is just removed
            if folder.is_dir():
                starts.append((folder.stat().st_mtime, folder))
    found: list[tuple[bool, float, str]] = []
    for file in sorted(max(starts)[1].glob(f"rank-*/{ERROR_FILE}")) if starts else []:
        with suppress(OSError, ValueError, KeyError, TypeError):  # one that a full disk has cut
            record = read_json(file)
            text = f"rank {record['rank']} ({record['where']}): {record['message']}"
            found.append((bool(record.get("secondary")), float(record.get("seconds", 0.0)), text))
    return min(found)[2] if found else None


def _read_text(path: Path, notes: Notes, consequence: str) -> str | None:
    try:
        return read_text(path, errors="replace")
    except FileNotFoundError:
        notes.missing.append(f"{path.name} is missing: {consequence}.")
    except OSError as error:
        notes.problems.append(f"{path.name} cannot be read ({error.strerror}): {consequence}.")
    return None


def _read_json(path: Path, notes: Notes, consequence: str) -> Mapping[str, Any] | None:
    text = _read_text(path, notes, consequence)
    if text is None:
        return None
    try:
        found = parse_json(text)
    except ValueError as error:
        notes.problems.append(f"{path.name} is not JSON ({error}): {consequence}.")
        return None
    if isinstance(found, dict):
        return found
    notes.problems.append(f"{path.name} is not a JSON object: {consequence}.")
    return None


def _read_rows(path: Path, notes: Notes) -> list[Row]:
    try:
        return read_metrics(path)
    except FileNotFoundError:
        notes.missing.append(f"{path.name} is missing: no step has been logged.")
    except (OSError, ValueError) as error:
        notes.problems.append(f"{path.name} cannot be read: {error}.")
    return []


def _parse_spec(text: str | None, notes: Notes) -> Mapping[str, Any]:
    # here because the command line should answer --help before a YAML parser is loaded
    from trimaran.runtime.spec.yaml_text import read_yaml

    read = read_yaml(text or "", "spec.yaml")
    notes.problems.extend(f"{error}: the layout of the run is unknown." for error in read.errors)
    return read.value if isinstance(read.value, dict) and not read.errors else {}


def is_finite(value: object) -> bool:
    """Whether ``value`` is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: object, form: str) -> str:
    """Return a number of a file in a format, or what it is instead."""
    if value is None:
        return "unknown"
    return format(value, form) if is_finite(value) else "not a number" if value != math.inf else "infinite"


def nested(data: Mapping[str, Any], section: str, name: str) -> object:
    """Return a value of a section, None where there is none."""
    found = data.get(section)
    return found.get(name) if isinstance(found, dict) else None


def finite_points(rows: Sequence[Row], column: str) -> list[tuple[float, float]]:
    """Return (step, value) of the rows whose value is a finite number."""
    return [
        (float(row["step"] or 0), float(value))
        for row in rows
        if (value := row.get(column)) is not None and math.isfinite(value)
    ]
