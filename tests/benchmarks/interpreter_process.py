"""A process in Triton's interpreter with benchmarks/kernels.py loaded: a fork of it runs that once a request.

A request is a line of standard input, JSON: {"arguments": [...], "output": file, "errors": file, "wrong": an op to
falsify or ""}; the answer is the exit status. Loading torch and the kernels takes longer than most of these runs.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def load_main() -> Callable[[], int]:
    """Return the main function of benchmarks/kernels.py."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the latter for `falsify`
    from tests.benchmarks.scripts import load_script

    main: Callable[[], int] = load_script("kernels").main
    return main


def falsify(op: str) -> None:
    """Let Triton's kernel of a memory-bound op return one percent too much."""
    from kernel_bench import cases

    right = cases.MEMORY_OPS[op]

    def wrong(kernels: Any, x: Any) -> Any:
        return right.run(kernels, x) * (1.01 if kernels.name == "triton" else 1.0)

    cases.MEMORY_OPS[op] = dataclasses.replace(right, run=wrong)


def serve() -> None:
    """Answer every request until the end of standard input."""
    main = load_main()
    from tests.kernels import interpreter

    interpreter.speed_up()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            for stream, file in ((1, "output"), (2, "errors")):
                os.dup2(os.open(request[file], os.O_WRONLY | os.O_CREAT), stream)
            if request["wrong"]:
                falsify(request["wrong"])
            sys.argv = ["benchmarks/kernels.py", *request["arguments"]]
            sys.exit(main())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
