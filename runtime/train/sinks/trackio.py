"""Trackio, in a local database or a Space. The one file that uses the package (pip install 'trimaran[trackio]')."""

import io
import secrets
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from trimaran.runtime.spec.sections.sinks import TrackioSink
from trimaran.runtime.train.sinks.protocol import Sink, SinkRun


class _Trackio:
    """A run of Trackio."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @property
    def identity(self) -> str:
        return str(self._run.name)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()


def start_trackio(run: SinkRun, options: TrackioSink) -> Sink:
    """Start a run of Trackio, or go on in the one that it has, which Trackio finds by its name."""
    trackio: Any = import_module("trackio")
    name = run.identity or f"{options.name or run.name}-{secrets.token_hex(2)}"
    with redirect_stdout(io.StringIO()):  # instructions for its dashboard, of six lines
        started = trackio.init(
            project=options.project,
            name=name,
            space_id=options.space,
            config=dict(run.config),
            resume="never" if run.identity is None else "allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
    return _Trackio(started)
