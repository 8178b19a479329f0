"""Start all ranks on this machine by mpirun."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from trimaran.launchers.env.commands import find_mpirun
from trimaran.launchers.env.exit_codes import exit_code_of
from trimaran.runtime.processes import exit_with_parent
from trimaran.runtime.spec import RunSpec


def run_by_mpirun(spec: RunSpec, spec_path: Path, overrides: list[str]) -> int:
    """Run the ranks by mpirun and return its exit code.

    On several machines, call `mpirun -n N --host ... trimaran train SPEC` yourself.

    Raises:
        ValueError: there is no mpirun.
    """
    mpirun = find_mpirun()
    words = [word for override in overrides for word in ("--set", override)]
    rank = [sys.executable, "-m", "trimaran.launchers.worker", str(spec_path), *words, "--launcher", "mpi"]
    command = [mpirun, "-n", str(spec.world_size), *rank]
    with_us = partial(exit_with_parent, os.getpid())
    return exit_code_of(subprocess.run(command, check=False, preexec_fn=with_us).returncode)
