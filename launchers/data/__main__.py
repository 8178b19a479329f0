"""`python -m trimaran.launchers.data CREDENTIALS`: a worker that prepares data, and its supervisor.

Launchers start the supervisor, once for each worker: as a process of this machine, by srun or by mpirun.
"""

import argparse
import os
import sys
from pathlib import Path

from trimaran.launchers.data.supervisor import supervise
from trimaran.runtime.data.files import DataError
from trimaran.runtime.processes import exit_with_parent, set_process_name


def main() -> int:
    """Run the supervisor, or the worker where there is a board; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trimaran.launchers.data", description=__doc__)
    parser.add_argument("credentials", type=Path, help="file of the run's address, certificate and key")
    parser.add_argument("--timeout-s", type=float, required=True, help="the most seconds of one document")
    parser.add_argument("--memory-bytes", type=int, help="the most memory of a worker")
    parser.add_argument("--parent", type=int, help="number of the process that starts this one, with which it ends")
    parser.add_argument("--board", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    exit_with_parent(options.parent)
    if options.board is None:
        set_process_name("trimaran-watch")
        return supervise(sys.argv[1:], options.timeout_s)
    set_process_name("trimaran-data")
    return work(options.credentials, options.board, options.memory_bytes)


def work(credentials: Path, board: Path, memory_bytes: int | None) -> int:
    """Be a worker until the run ends."""
    from trimaran.runtime.data.engine.cluster import Credentials, serve

    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        os.environ.setdefault(name, "1" if name != "TOKENIZERS_PARALLELISM" else "false")
    try:
        # What a killed worker leaves there goes with the supervisor's folder.
        serve(Credentials.read(credentials), board.parent, board, memory_bytes)
    except DataError as error:
        print(error, file=sys.stderr)
        return 0  # the run has ended, and nobody needs a new worker
    return 0


if __name__ == "__main__":
    sys.exit(main())
