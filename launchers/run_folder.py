"""Finding a run and its checkpoint where a user names them. Imports no torch."""

import json
from pathlib import Path

from trimaran.launchers.terminal import say

_FILES = ("spec.yaml", "submitted.yaml", "metrics.jsonl", "slurm.json", "checkpoints")
_SPECS = ("spec.yaml", "submitted.yaml")


def require_run(run: Path) -> None:
    """Raise ValueError where a folder has nothing of a run."""
    if not any((run / name).exists() for name in _FILES):
        is_there = "has none of its files" if run.is_dir() else "does not exist"
        raise ValueError(f"{run} is no run folder: it {is_there}; give the train.output_dir of a run")


def spec_of(named: Path, overrides: list[str]) -> tuple[Path, list[str]]:
    """Return the spec file and the overrides where a spec file is named, or the folder of a run, which is gone on with.

    Raises:
        ValueError: the folder is of no run.
        SpecError: its spec can't be read.
    """
    if not named.is_dir():
        return named, overrides
    file = next((named / name for name in _SPECS if (named / name).is_file()), None)
    if file is None:
        here = named.absolute()
        run = next((each.parent for each in (here, *here.parents) if each.name == "checkpoints"), None)
        fix = f"did you mean its run, {run}?" if run else "give a spec file, or the train.output_dir of a run"
        raise ValueError(f"{named} is a folder without a {_SPECS[0]}, so there is no run to go on with; {fix}")
    from trimaran.runtime.spec import load_spec

    output = Path(load_spec(file).train.output_dir)
    if output.resolve() == named.resolve():
        return file, overrides
    say(f"{file} names {output}, and the run goes on where it lies now, in {named}", style="yellow")
    return file, [f"train.output_dir={json.dumps(str(named.resolve()))}", *overrides]


def find_checkpoint(run: Path) -> Path:
    """Return the newest complete checkpoint of a run folder, or `run` itself if it is a checkpoint folder.

    Raises:
        ValueError: the run has no complete checkpoint.
    """
    from trimaran.runtime.checkpoint.folder import newest_checkpoint

    found = newest_checkpoint(run)
    if found is None:
        raise ValueError(f"{run} has no whole checkpoint; give the folder of a run that `trimaran train` has made")
    return found
