"""MLflow, on a server or in a file. The one file that uses the package mlflow (pip install 'trimaran[mlflow]')."""

import logging
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from trimaran.runtime.spec.run import flat_fields
from trimaran.runtime.spec.sections.sinks import MlflowSink
from trimaran.runtime.train.sinks.protocol import Sink, SinkRun

_MOST_PARAMS: Final = 100
"""Of one request, by MLflow's API."""
_LONGEST: Final = 500
"""Characters of one, which every version of the API takes."""


class _Mlflow:
    """A run of MLflow. The client is used, not the module's functions, which keep a run for each thread."""

    def __init__(self, client: Any, entities: Any, identity: str) -> None:
        self._client, self._entities, self._identity = client, entities, identity

    @property
    def identity(self) -> str:
        return self._identity

    def add(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1e3)
        metrics = [self._entities.Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._identity, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._identity, "FAILED" if failed else "FINISHED")


def start_mlflow(run: SinkRun, options: MlflowSink) -> Sink:
    """Start a run of MLflow, or go on in the one that it has. The spec's fields are its parameters."""
    tracking: Any = import_module("mlflow.tracking")
    entities: Any = import_module("mlflow.entities")
    for name in ("mlflow", "alembic"):  # which tell at length of the tables that they make
        logging.getLogger(name).setLevel(logging.WARNING)
    client = tracking.MlflowClient(tracking_uri=options.tracking_uri)
    if run.identity is not None:
        client.update_run(run.identity, status="RUNNING")
        return _Mlflow(client, entities, run.identity)
    found = client.get_experiment_by_name(options.experiment)
    experiment = client.create_experiment(options.experiment) if found is None else found.experiment_id
    identity = str(client.create_run(experiment, run_name=options.name or run.name).info.run_id)
    params = [entities.Param(name, str(value)[:_LONGEST]) for name, value in flat_fields(dict(run.config)).items()]
    for first in range(0, len(params), _MOST_PARAMS):
        client.log_batch(identity, params=params[first : first + _MOST_PARAMS])
    return _Mlflow(client, entities, identity)
