"""The steps of `trimaran twin`: a request from the command line, the twin's folder, and the spec of its training."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from trimaran.launchers.before_start import check_writable
from trimaran.launchers.terminal import log_to_terminal, say
from trimaran.runtime.folder_lock import FolderLock
from trimaran.runtime.twin.build import build_twin, model_spec
from trimaran.runtime.twin.record import TWIN, TwinRecord
from trimaran.runtime.twin.request import SUFFIXES, TwinRequest
from trimaran.runtime.twin.train_spec import write_train_spec


def request_of(sources: Sequence[str], options: Mapping[str, object]) -> TwinRequest:
    """Return what the command line asks for; options change what a YAML file says.

    Raises:
        ValueError: an option is missing or wrong.
    """
    if len(sources) == 1 and Path(sources[0]).suffix in SUFFIXES:
        return TwinRequest.load(Path(sources[0]), options)
    for name, what in (("author", "the author's name"), ("output", "the run folder of the twin")):
        if name not in options:
            raise ValueError(f"--{name} is missing; give {what}")
    return TwinRequest.of({"sources": list(sources), **options}, "trimaran twin")


def build_step(request: TwinRequest) -> TwinRecord:
    """Make the twin's folder, which nobody else makes meanwhile."""
    check_writable("--output", Path(request.output))
    log_to_terminal()
    logging.getLogger("bm25s").propagate = False  # it tells every step of an index
    with FolderLock.of_run(Path(request.output), "trimaran twin build", os.environ):
        record = build_twin(request, say)
    say(f"twin: {Path(request.output) / TWIN}")
    return record


def spec_of_training(output: Path) -> Path:
    """Write the run spec of a twin that is built, and return its path."""
    record = TwinRecord.read(output / TWIN)
    base = None
    if record.decision.method == "adapter":
        assert record.model is not None, "an adapter is of a model"
        base = model_spec(record.model)[1]
    return write_train_spec(output, record, base)
