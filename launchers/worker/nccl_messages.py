"""What torch and NCCL say of a rank that has lost a peer: the consequence of a failure, never its cause. No torch.

Where a collective fails in the background, torch's watchdog thread ends the process by SIGABRT. The rank then leaves no
failure record; what the watchdog has written to its standard error says why.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trimaran.runtime.files import open_regular

_LOST_PEER = (
    # the kernel's words, in messages of gloo, NCCL and the store
    "Connection reset",
    "Connection closed",
    "Connection refused",
    "Broken pipe",
    "not connected",
    # our own, of shared memory
    "is gone",
    " lost rank ",
    # NCCL's, and torch's about NCCL
    "remote process exited or there was a network error",
    "remote process exiting prematurely",
    "NCCL communicator was aborted on rank",
    "Watchdog caught collective operation timeout",
    "retrieving ncclUniqueId from",
    # the store's, after the end of rank 0
    "ailed to recv, got 0 bytes",
    "Connection was likely closed",
)
_TIMED_OUT = re.compile(
    r"Watchdog caught collective operation timeout: WorkNCCL\(.*?OpType=(\w+).*?Timeout\(ms\)=(\d+)"
)
_ENDED = re.compile(
    r"(?:\[PG[^\]]*?\((?P<group>\w+)\) Rank \d+\] )?(?:Process group|NCCL) watchdog thread terminated with exception: "
    r"(?P<why>(?:.*\n?){1,4})"
)
_HANGS = re.compile(r"ProcessGroupNCCL's watchdog got stuck for (\d+) seconds")
_LAST_ERROR = re.compile(r"Last error:\s*\n?(.+)")
_TAIL_BYTES = 1 << 18  # stack traces follow the message


@dataclass(frozen=True)
class WatchdogEnd:
    """Why torch's watchdog has ended a rank: a sentence, and whether another rank's failure is behind it."""

    message: str
    is_consequence: bool


def tells_of_lost_peer(message: str) -> bool:
    """Return whether an error's message says only that a peer is gone or did not come."""
    return any(words in message for words in _LOST_PEER)


def watchdog_end(output: str) -> WatchdogEnd | None:
    """Return why the watchdog has ended a rank with this output; None where it has not."""
    ended, timed_out, hangs = _ENDED.search(output), _TIMED_OUT.search(output), _HANGS.search(output)
    why = "" if ended is None else ended["why"]
    if timed_out is not None and (ended is None or _TIMED_OUT.search(why)):
        name = None if ended is None else ended["group"]
        group = "" if name is None else f" of its {name.replace('default_pg', 'world')} group"
        return WatchdogEnd(
            f"NCCL's watchdog ended it: {timed_out[1]}{group} did not end within {int(timed_out[2]) / 1000:g} s, for "
            "another rank did not take part or the network failed",
            is_consequence=True,
        )
    if ended is not None:
        last = _LAST_ERROR.search(why)
        what = " ".join((last[1] if last is not None else why.partition("\n")[0]).split())
        if tells_of_lost_peer(why):
            return WatchdogEnd(f"NCCL's watchdog ended it, for it has lost a peer or the network: {what}", True)
        return WatchdogEnd(f"NCCL's watchdog ended it: {what}", is_consequence=False)
    if hangs is not None:
        return WatchdogEnd(f"NCCL's watchdog ended it: a call of CUDA or NCCL did not return in {hangs[1]} s", False)
    return None


def watchdog_end_in(file: Path) -> WatchdogEnd | None:
    """Return `watchdog_end` of a rank's standard error; None where there is no such file."""
    with suppress(OSError), open_regular(file) as stream:
        stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        return watchdog_end(stream.read().decode(errors="replace"))
    return None
