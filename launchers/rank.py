"""The first thing a rank process runs, before the seconds that torch takes to import: tie the rank to its launcher, and leave word of a failure.

`python -m trimaran.launchers.rank TASK.json LAUNCHER_PID`, under torchrun's environment.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Errors whose message is a sentence for the user; the name of any other class is part of what went wrong.
_SENTENCES = (ValueError, OSError, RuntimeError)
# What a rank says when a peer has left: the consequence of a failure, never its cause.
_PEER_LEFT = ("Connection reset", "Connection closed", "Connection refused", "Broken pipe", "not connected", "is gone", " lost rank ")


def main() -> None:
    """Entry point of a rank process."""
    follow_launcher(int(sys.argv[2]))
    # Until the train loop takes over, nothing is worth saving: Ctrl-C ends the rank without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from trimaran.launchers.worker import read_task, run_task

        exit_code = run_task(read_task(Path(sys.argv[1])))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the launcher must learn of it
        record_failure(error)
        # Not sys.exit: leaving the groups in order would wait for peers that wait for this rank.
        _leave(1)
    _leave(exit_code)


def follow_launcher(launcher_pid: int) -> None:
    """If the launcher is killed, the ranks must not live on as orphans: ask the kernel for SIGTERM then, which lets them save and leave."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher_pid:  # it was killed before we could ask
        os._exit(1)


def record_failure(error: BaseException) -> None:
    """Write why this rank failed to the file that torchrun's agent names, and the traceback to a file beside it."""
    text = str(error).strip()
    is_sentence = bool(text) and isinstance(error, _SENTENCES)
    message = text if is_sentence else f"{type(error).__name__}: {text}"
    now = time.time()
    record = {
        "message": message,
        "timestamp": int(now),  # torch's own field, too coarse to tell which rank was first
        "time": now,
        "secondary": isinstance(error, RuntimeError | OSError) and any(words in text for words in _PEER_LEFT),
    }
    try:
        file = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        details = file.with_name("traceback.txt")
        details.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        if not is_sentence:
            record["details"] = str(details)
        file.write_text(json.dumps(record), encoding="utf-8")
    except (OSError, KeyError):  # a full disk, for one
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr)


def _leave(exit_code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    main()
