"""Rows on their way to the sinks: each sink has a thread, so that none holds up the training or another one."""

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from trimaran.runtime.train.sinks.protocol import Sink

_MOST_ROWS: Final = 10_000
"""That wait for one sink: some megabytes."""
_CLOSE_S: Final = 60.0
_Row: TypeAlias = tuple[int, Mapping[str, float]]


class Feeder:
    """Hands rows to one sink, in a thread.

    What the sink raises is told once; it gets no more rows then. Rows that come while too many wait are left out, which
    is told with their number. metrics.jsonl has them all.
    """

    def __init__(self, name: str, sink: Sink, say: Callable[[str], None], *, most_rows: int = _MOST_ROWS) -> None:
        self._name, self._sink, self._say = name, sink, say
        self._rows: queue.Queue[_Row | None] = queue.Queue(most_rows)
        self._failed, self._has_error, self._left_out = False, False, 0
        self._thread = threading.Thread(target=self._feed, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Have a row written; never waits."""
        try:
            self._rows.put_nowait((step, values))
        except queue.Full:
            if not self._left_out and not self._has_error:
                self._say(f"{self._name} is too slow: rows are left out there; metrics.jsonl has every row")
            self._left_out += 1

    def close(self, *, failed: bool, patience_s: float = _CLOSE_S) -> None:
        """Wait until all rows are written, and end the sink's run; `failed` is how the training ended."""
        self._failed = failed
        try:
            self._rows.put(None, timeout=patience_s)
            self._thread.join(patience_s)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._say(f"{self._name} has not taken its last rows within {patience_s:g} s; metrics.jsonl has every row")
        elif self._left_out and not self._has_error:
            self._say(f"{self._left_out:,} rows were left out of {self._name}; metrics.jsonl has every row")

    def _feed(self) -> None:
        while (row := self._rows.get()) is not None:
            if not self._has_error:
                self._try(lambda row=row: self._sink.add(*row))  # type: ignore[misc]
        self._try(lambda: self._sink.close(failed=self._failed))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a tracker does, training goes on
            if not self._has_error:
                self._has_error = True
                self._say(
                    f"{self._name} failed ({reason_of(error)}) and gets no more rows; training goes on, and "
                    "metrics.jsonl has every row"
                )


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error says, its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
