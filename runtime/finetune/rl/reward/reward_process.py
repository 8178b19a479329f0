"""Code in a process of its own, which answers one call after the other and is ended where it takes too long."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Final

from trimaran.runtime.files import parse_json

_MODULE: Final = "trimaran.runtime.finetune.rl.reward.reward_code"
_START_S: Final = 60.0  # to import the file
_MOST_BYTES: Final = 1 << 16  # of an answer


class RewardProcess:
    """A function of a Python file, called in a process that is started at the first call.

    The process has no part in the ranks' communication, and what it prints goes to the standard error. It is no
    sandbox: the code may do what its user may.

    Args:
        function: its name in the file.
        timeout_s: longest that one call may take.
        name: of the function in errors; "" for both names.
        mend: what to do where it takes longer.
    """

    def __init__(
        self, file: Path, function: str, timeout_s: float, *, name: str = "", mend: str = "make it quicker"
    ) -> None:
        self._file, self._function, self._timeout_s = file, function, timeout_s
        self._name, self._mend = name or f"{function} of {file}", mend
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def call(self, arguments: list[Any]) -> Any:
        """Return the function's value for JSON arguments.

        Raises:
            ValueError: the code fails, ends or takes too long; the process is then ended.
        """
        try:
            if self._process is None:
                self._start()
            return self._exchange(arguments, self._timeout_s, f"finetune.rl.reward_timeout_s ({self._timeout_s:g})")
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """End the process and all that it has started."""
        process, self._process, self._read = self._process, None, b""
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _start(self) -> None:
        command = [sys.executable, "-P", "-m", _MODULE]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
        )
        first = [os.getpid(), str(self._file.resolve()), self._function]
        self._exchange(first, _START_S, f"the {_START_S:g} seconds to be imported")

    def _exchange(self, message: list[Any], timeout_s: float, bound: str) -> Any:
        """Send a line and return the value of the answer's."""
        assert self._process is not None, "it was started"
        assert self._process.stdin is not None, "a pipe"
        assert self._process.stdout is not None, "a pipe"
        deadline = time.monotonic() + timeout_s
        content = json.dumps(message).encode() + b"\n"
        os.set_blocking(self._process.stdin.fileno(), False)
        while content:
            self._wait(self._process.stdin, deadline, bound, to_write=True)
            try:
                content = content[os.write(self._process.stdin.fileno(), content) :]
            except BrokenPipeError:
                raise self._ended() from None
        while b"\n" not in self._read:
            self._wait(self._process.stdout, deadline, bound, to_write=False)
            part = os.read(self._process.stdout.fileno(), _MOST_BYTES)
            if not part:
                raise self._ended()
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        answer = parse_json(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["value"]

    def _wait(self, pipe: IO[bytes], deadline: float, bound: str, *, to_write: bool) -> None:
        left = max(0.0, deadline - time.monotonic())
        ready = select.select([] if to_write else [pipe], [pipe] if to_write else [], [], left)
        if not any(ready):
            raise ValueError(f"{self._name} takes longer than {bound}; {self._mend}, or allow more")

    def _ended(self) -> ValueError:
        assert self._process is not None
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return ValueError(f"the process of {self._name} has ended {how}")
