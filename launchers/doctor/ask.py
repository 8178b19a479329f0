"""Asking other programs, none of which may hold up or end the one that asks."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

Status = Literal["ok", "missing", "trouble", "broken"]
ANSWER_S: Final = 10.0
_GONE_S: Final = 1.0


@dataclass(frozen=True)
class Finding:
    """Something that this machine has or lacks.

    Attributes:
        found: what is there, for people.
        effect: what that changes for a run, one phrase.
        status: ok; missing, where only some runs need it; trouble, where it is there and does not work; broken, where
            no run can do without it.
    """

    group: str
    name: str
    found: str
    effect: str = ""
    status: Status = "ok"


@dataclass(frozen=True)
class Answer:
    """What a program has printed; `problem` says why there is no answer."""

    text: str = ""
    problem: str = ""


def ask(words: Sequence[str], limit_s: float = ANSWER_S) -> Answer:
    """Run a program and return what it prints, within a time.

    A program that waits for a driver or a controller may not end by any signal, so it is not waited for.
    """
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Answer(problem=f"{words[0]} can't be started: {error.strerror}")
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GONE_S)
            return Answer(problem=f"{words[0]} has not answered within {limit_s:g} s")
        output.seek(0)
        text = output.read(1 << 16).decode(errors="replace").strip()
    if code:
        last = text.splitlines()[-1] if text else "without a message"
        return Answer(text, f"{words[0]} ended with code {code}: {last}")
    return Answer(text)
