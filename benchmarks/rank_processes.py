"""The processes of a benchmark: ranks that torchrun starts; the last line that rank 0 prints is the result, JSON."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_TIMEOUT_S = 900
_MOST_SHOWN = 4000
# In torchrun's report of the first rank that failed; its own exit code is 1.
_RANKS_CODE = re.compile(r"exitcode +: (-?\d+)")


class RanksFailed(RuntimeError):
    """The processes failed; the message has the end of their output. exit_code: that of the rank, None for no end."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def result_of_ranks(script: str, arguments: Sequence[str], world_size: int, threads: int) -> dict[str, Any]:
    """Run a script in `world_size` processes of `threads` threads each; return the result.

    Raises:
        RanksFailed: they failed, or took longer than fifteen minutes.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command = [sys.executable, *(torchrun if world_size > 1 else []), script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise RanksFailed(f"it did not end within {_TIMEOUT_S} s", None) from error
    if done.returncode:
        of_rank = _RANKS_CODE.search(done.stderr)
        raise RanksFailed(done.stderr[-_MOST_SHOWN:], int(of_rank[1]) if of_rank else done.returncode)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))
