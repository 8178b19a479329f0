"""`trimaran schedules --trace`: timelines of simulated schedules and of a run, as one file for Perfetto."""

import json
from collections.abc import Mapping
from pathlib import Path

from trimaran.launchers.terminal import say
from trimaran.runtime.files import read_json, write_text
from trimaran.runtime.pipeline.simulate import Span, simulate
from trimaran.runtime.pipeline.trace import chrome_trace, spans_of
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.pipeline import costs_of, schedule_of


def write_trace(path: Path, specs: Mapping[str, RunSpec], run: Path | None) -> None:
    """Write what each schedule of `specs` does by simulation, after what `run` has measured.

    Raises:
        ValueError: the path does not end in .json, or the run has no timeline that can be read.
    """
    if path.suffix != ".json":
        raise ValueError(f"--trace must end in .json; got {path}")
    timelines = {} if run is None else {f"{run.resolve().name}, measured": _measured(run)}
    for name, spec in specs.items():
        timelines[f"{Path(name).name}, simulated"] = simulate(schedule_of(spec), costs_of(spec)).spans
    write_text(path, json.dumps(chrome_trace(timelines)))
    say(f"trace of {len(timelines)} timelines in {path}: open it at ui.perfetto.dev or chrome://tracing")


def _measured(run: Path) -> list[Span]:
    file = run / "timeline.json"
    try:
        found = read_json(file)
        return spans_of(found["measured"], int(found["num_ranks"]))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: logging.timeline records one, when a run ends") from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no timeline: {type(error).__name__}, {error}") from None
