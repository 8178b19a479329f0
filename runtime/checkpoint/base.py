"""Which weights adapters were trained beside: the record in their checkpoint, and where those weights are now."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimaran.runtime.checkpoint.folder import list_checkpoints, step_of
from trimaran.runtime.checkpoint.manifest import CheckpointError
from trimaran.runtime.checkpoint.reshard import Checkpoint

_KEY = "base"


@dataclass(frozen=True)
class Base:
    """Frozen weights.

    Args:
        source: checkpoint.init_from of the run that trained the adapters, as it was given.
        folder: the checkpoint, as an absolute path.
        sha256: of what it holds (`Checkpoint.digest`).
    """

    source: str
    folder: str
    sha256: str

    def as_state(self) -> dict[str, Any]:
        """Return what a checkpoint's state has of it."""
        return {_KEY: asdict(self)}


def base_of(checkpoint: Checkpoint) -> Base | None:
    """Return the base of a checkpoint of adapters, None for one that holds whole weights.

    Raises:
        CheckpointError: the record can't be read.
    """
    raw = checkpoint.state.get(_KEY)
    if raw is None:
        return None
    try:
        found = Base(**raw)
    except TypeError:
        found = None
    if found is None or not all(isinstance(value, str) for value in asdict(found).values()):
        raise CheckpointError(f"{checkpoint.path} does not say which weights its adapters belong to: {raw!r}")
    return found


def new_base(source: str, path: Path, digest: str) -> Base:
    """Return the record of the checkpoint at `path`, which `source` names."""
    return Base(source, str(path.resolve()), digest)


def find_base(base: Base, given: str | None = None) -> Path:
    """Return the checkpoint folder that holds the weights of `base`. Reads manifests alone.

    Args:
        given: where a spec says that they are, a run or a checkpoint; None or the recorded source: where they were.

    Raises:
        CheckpointError: they are not there, or what is there has other weights.
    """
    recorded = Path(base.folder)
    if given is None or given == base.source:
        places = [recorded, *_checkpoints(Path(base.source))]
    else:
        places = _checkpoints(Path(given))
    for place in places:
        if place.is_dir() and Checkpoint.open(place, verify=False).digest == base.sha256:
            return place
    if any(place.is_dir() for place in places):
        where = given or base.source
        raise CheckpointError(
            f"the adapters were trained beside the weights of {recorded}, and {where} holds other weights (sha256 "
            f"{base.sha256[:12]} is not there); put those back, or for training set checkpoint.init_from to a folder "
            "with a copy of them"
        )
    raise CheckpointError(
        f"the adapters were trained beside the weights of {recorded}, which are no longer there; put that checkpoint "
        "back, or for training set checkpoint.init_from to a folder with a copy of it"
    )


def _checkpoints(source: Path) -> list[Path]:
    """Return the checkpoints of a run folder, the newest first, or the one that `source` is."""
    if step_of(source) is not None:
        return [source]
    return list_checkpoints(source / "checkpoints")[::-1]
