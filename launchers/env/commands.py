"""Commands of other packages that this machine may have."""

import shutil
import sys
from pathlib import Path


def find_mpirun() -> str:
    """Return the path of mpirun.

    Raises:
        ValueError: there is none.
    """
    near_python = f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin"
    mpirun = shutil.which("mpirun", path=near_python) or shutil.which("mpirun")
    if mpirun is None:
        raise ValueError(
            "mpirun is not on this machine's PATH; load a module of an MPI, or pip install mpich, "
            "or use --launcher local"
        )
    return mpirun
