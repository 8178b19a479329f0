"""The journal of answered requests: an evaluation that was interrupted goes on from them. Only appended to. No torch.

A line is a JSON list: the key of a request, and its answer. A key is the sha256 of the request and of what answers it,
so that answers of other weights are never taken. A last line that was cut short is taken off.
"""

import hashlib
import json
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from trimaran.runtime.evaluate.engine.requests import Continuation, Likelihood, LikelihoodScore
from trimaran.runtime.files import check_regular, naming, parse_json

_BATCH: Final = 256
_BATCH_S: Final = 1.0
Answer = LikelihoodScore | str


class Answers:
    """The answers in a file and those of this process; a context manager that writes what is left at its end.

    Args:
        path: the file, None to keep nothing.
        identity: what answers: weights, their dtype, and whatever else changes a score beyond rounding.

    Raises:
        OSError: the file can't be read or written; the error names it.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self._path, self._identity = path, identity.encode()
        self._known: dict[str, Answer] = {}
        self._waiting: list[str] = []
        self._written_at = time.monotonic()
        if path is not None and path.exists():
            self._read(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.write()

    @property
    def number(self) -> int:
        """How many answers are known."""
        return len(self._known)

    def key(self, request: Likelihood | Continuation) -> str:
        """Return what a request's answer is known by."""
        digest = hashlib.sha256(self._identity)
        parts: Sequence[tuple[int, ...]] = (request.context,)
        if isinstance(request, Likelihood):
            parts = (request.context, request.continuation)
        else:
            digest.update(repr((request.stop_strings, request.sampling)).encode())
        for ids in parts:
            digest.update(f"|{len(ids)}|".encode())
            digest.update(array("q", ids).tobytes())
        return digest.hexdigest()[:32]

    def get(self, key: str) -> Answer | None:
        """Return a known answer."""
        return self._known.get(key)

    def put(self, key: str, answer: Answer) -> None:
        """Take an answer; it is written with those of the last second."""
        self._known[key] = answer
        if self._path is None:
            return
        value = answer if isinstance(answer, str) else [answer.log_likelihood, answer.is_greedy]
        self._waiting.append(json.dumps([key, value]))
        if len(self._waiting) >= _BATCH or time.monotonic() - self._written_at > _BATCH_S:
            self.write()

    def write(self) -> None:
        """Append the answers that wait."""
        if self._path is not None and self._waiting:
            text = "".join(f"{line}\n" for line in self._waiting)
            with naming(self._path), self._path.open("ab") as file:
                file.write(text.encode())
            self._waiting.clear()
        self._written_at = time.monotonic()

    def _read(self, path: Path) -> None:
        with naming(path), check_regular(path).open("r+b") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                found = _parsed(line)
                if found is not None:
                    self._known[found[0]] = found[1]
            file.truncate(end)


def _parsed(line: bytes) -> tuple[str, Answer] | None:
    """Return the key and the answer of a line; None for one that is damaged, whose request is asked again."""
    try:
        value: Any = parse_json(line)
    except ValueError:
        return None
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        return None
    key, answer = value
    if isinstance(answer, str):
        return key, answer
    is_score = isinstance(answer, list) and len(answer) == 2 and isinstance(answer[1], bool)
    if not is_score or not isinstance(answer[0], float):
        return None
    return key, LikelihoodScore(answer[0], answer[1])
