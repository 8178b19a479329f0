"""Starting the sinks that logging.sinks names, and finding their runs again when a run is resumed."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from trimaran.runtime.files import naming, read_json, write_text
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.sinks.feeder import reason_of
from trimaran.runtime.train.sinks.mlflow import start_mlflow
from trimaran.runtime.train.sinks.protocol import Sink, SinkRun
from trimaran.runtime.train.sinks.trackio import start_trackio
from trimaran.runtime.train.sinks.wandb import start_wandb

IDENTITIES: Final = "sinks.json"
"""In the run folder: by which each sink knows the run."""
_Start = Callable[[SinkRun, Any], Sink]
_STARTS: Final[Mapping[str, _Start]] = MappingProxyType(
    {"wandb": start_wandb, "mlflow": start_mlflow, "trackio": start_trackio}
)
_REMEDIES: Final = MappingProxyType(
    {
        "wandb": "`wandb login` once, or set logging.sinks.wandb.mode to offline",
        "mlflow": "look at logging.sinks.mlflow.tracking_uri",
        "trackio": "look at logging.sinks.trackio",
    }
)
_PACKAGES: Final = MappingProxyType(
    {
        "tensorboard": ("tensorboard",),
        "wandb": ("wandb",),
        "mlflow": ("mlflow", "sqlalchemy", "alembic"),
        "trackio": ("trackio",),
    }
)


class SinkError(ValueError):
    """A sink that the spec names can't start."""


def sinks_of(spec: RunSpec) -> list[str]:
    """Return the names of the sinks that logging.sinks turns on."""
    section = spec.logging.sinks
    return [] if section is None else [name for name in _PACKAGES if getattr(section, name)]


def check_packages(spec: RunSpec) -> None:
    """Raise SinkError where a package of a sink is not installed. Imports none of them."""
    for name in sinks_of(spec):
        missing = [package for package in _PACKAGES[name] if find_spec(package) is None]
        if missing:
            install = "pip install tensorboard" if name == "tensorboard" else f"pip install 'trimaran[{name}]'"
            raise SinkError(
                f"logging.sinks names {name}, and {' and '.join(missing)} is not installed: {install}, or take it out"
            )


def start_sinks(spec: RunSpec, step: int) -> dict[str, Sink]:
    """Start the sinks of the spec but TensorBoard, which `metrics` starts; by their names.

    Args:
        step: steps finished: where there are some, each sink goes on in the run that it has of an earlier start.

    Raises:
        SinkError: one can't start.
    """
    folder, config = Path(spec.train.output_dir), spec.model_dump(mode="json")
    known = _identities(folder) if step else {}
    started: dict[str, Sink] = {}
    for name in sinks_of(spec):
        if name not in _STARTS:
            continue
        run = SinkRun(folder, known.get(name), step, config)
        try:
            started[name] = _STARTS[name](run, getattr(spec.logging.sinks, name))
        except Exception as error:
            for sink in started.values():
                with suppress(Exception):
                    sink.close(failed=True)
            raise SinkError(
                f"logging.sinks: {name} can't start: {reason_of(error)}; {_REMEDIES[name]}, or take it out"
            ) from error
    if started:
        identities = {**known, **{name: sink.identity for name, sink in started.items()}}
        write_text(folder / IDENTITIES, json.dumps(identities))
    return started


def _identities(folder: Path) -> dict[str, str]:
    path = folder / IDENTITIES
    try:
        with naming(path):
            found = read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SinkError(f"{path} is damaged ({error}); remove it to have new runs of the sinks") from error
    if not isinstance(found, dict):
        raise SinkError(f"{path} holds no names of sinks; remove it to have new runs of the sinks")
    return {str(name): str(identity) for name, identity in found.items()}
