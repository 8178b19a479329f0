"""TensorBoard. The one file that uses the package tensorboard, which is always installed."""

import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any


class TensorBoard:
    """Scalars in one event file, with tensorboard's own writer: torch.utils.tensorboard takes seconds to import."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Open an event file; readers drop older scalars from ``purge_step`` on, which a resumed run writes again."""
        # import_module keeps protobuf and numpy out of processes that log nothing; tensorboard has no types either way
        self._events: Any = import_module("tensorboard.compat.proto.event_pb2")
        self._summaries: Any = import_module("tensorboard.compat.proto.summary_pb2")
        self._writer: Any = import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter(
            str(folder), flush_secs=10
        )
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=purge_step, session_log=start))

    @property
    def identity(self) -> str:
        """The name of the folder: a later start adds a file to it."""
        return "tensorboard"

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values."""
        scalars = [self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.add_event(
            self._events.Event(wall_time=time.time(), step=step, summary=self._summaries.Summary(value=scalars))
        )

    def close(self, *, failed: bool) -> None:
        """Flush and close the file."""
        self._writer.close()
