"""Weights & Biases, online or offline. The one file that uses the package wandb (pip install 'trimaran[wandb]')."""

import secrets
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from trimaran.runtime.spec.sections.sinks import WandbSink
from trimaran.runtime.train.sinks.protocol import Sink, SinkRun


class _Wandb:
    """A run of wandb, whose steps are ours."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._first = int(run.step)  # of a resumed run, the step after its last one

    @property
    def identity(self) -> str:
        return str(self._run.id)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._first:  # steps that come again are there already, and wandb can't go back
            self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def start_wandb(run: SinkRun, options: WandbSink) -> Sink:
    """Start a run of wandb; its own files are in RUN/wandb. A run that is resumed has the id that it had."""
    wandb: Any = import_module("wandb")
    settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True)
    return _Wandb(
        wandb.init(
            project=options.project,
            entity=options.entity,
            name=options.name or run.name,
            id=run.identity or secrets.token_hex(4),
            resume="allow",
            mode=options.mode,
            dir=str(run.folder),
            config=dict(run.config),
            settings=settings,
        )
    )
