"""rollouts.jsonl of a run folder: every sampled answer with its rewards, a JSON record a line. Only appended to."""

import json
import os
from pathlib import Path
from typing import Any, Final

from trimaran.runtime.files import check_regular, naming, parse_json

FILE: Final = "rollouts.jsonl"


class Journal:
    """The file of one start of a run; on one rank alone.

    Args:
        folder: of the run.
        rollout: that will be written next; what an earlier start wrote from there on is cut off.

    Raises:
        ValueError: a line before that is damaged.
        OSError: the file can't be read or written; the error names it.
    """

    def __init__(self, folder: Path, rollout: int) -> None:
        self._path = folder / FILE
        if self._path.exists():
            self._cut(rollout)

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append the records of a rollout, each with its number as `rollout`; they are on the disk afterwards."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with naming(self._path), self._path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def _cut(self, rollout: int) -> None:
        """Take off the lines from `rollout` on, and a last one that was cut short."""
        with naming(self._path), check_regular(self._path).open("r+b") as file:
            end = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                if _rollout_of(line, f"{self._path}, line {number}") >= rollout:
                    break
                end += len(line)
            file.truncate(end)


def _rollout_of(line: bytes, where: str) -> int:
    try:
        return int(parse_json(line)["rollout"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no record of a rollout ({error}); remove the file to resume the run") from error
