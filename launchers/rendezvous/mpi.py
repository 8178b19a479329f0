"""Starts by MPI: mpi4py knows rank and size and broadcasts rank 0's address; training itself makes no MPI call."""

import contextlib
import importlib.metadata
import os
import socket
from typing import Any

from trimaran.launchers.env.rank_env import RankEnv, RankEnvError

_ANSWER_S = 5.0  # for mpirun to answer a rank that is about to exit


class MPIWorld:
    """The COMM_WORLD of mpi4py: all ranks that MPI started. The constructor initialises MPI.

    Raises:
        RankEnvError: mpi4py finds no MPI library, or the library's rank and size are not the launcher's.
    """

    def __init__(self, rank_env: RankEnv) -> None:
        # MPI_Finalize waits for all ranks: after a failure it would wait for a dead one.
        import mpi4py

        mpi4py.rc.finalize = False
        _shorten_addresses()
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise RankEnvError(
                f"MPI started this process, and mpi4py can't load an MPI library: {error}; pip install mpich, "
                "or load a module"
            ) from error
        self._mpi: Any = MPI
        self._world = MPI.COMM_WORLD
        found = (self._world.Get_rank(), self._world.Get_size())
        if found != (rank_env.rank, rank_env.world_size):
            library = MPI.Get_library_version().split("\n")[0]
            raise RankEnvError(
                f"the launcher says rank {rank_env.rank} of {rank_env.world_size}, and MPI ({library}) says rank "
                f"{found[0]} of {found[1]}: mpirun or srun belongs to another MPI than the one that mpi4py loads; use "
                "the mpirun of that library, or srun --mpi=pmi2"
            )

    def broadcast(self, text: str) -> str:
        """Return rank 0's text. Every rank must call it."""
        return str(self._world.bcast(text, root=0))

    def all_gather(self, text: str) -> list[str]:
        """Return every rank's text, in rank order. Every rank must call it."""
        return list(self._world.allgather(text))

    def finalize(self) -> None:
        """Finalize MPI, so that mpirun takes the exit of this process for a success.

        Every rank must call it, once the run has succeeded on all of them.
        """
        self._mpi.Finalize()
        _finalize_hydra()


def _shorten_addresses() -> None:
    """Let the MPICH of the Python wheel reach its peers by libfabric's TCP when Slurm starts the ranks.

    Its default, UCX, sends Slurm addresses in messages that can pass the 1,024 bytes which Slurm's pmi2 plugin reads at
    once ("value not properly terminated in client request"): then a rank aborts and the others wait for ever. An
    address of libfabric takes 67 bytes. Ranks of one node talk through it as well, because MPI's shared memory would
    stay behind in /dev/shm after a failure. Training itself makes no MPI call, so its speed is the same.
    """
    by_slurm = "PMI_FD" in os.environ and "HYDI_CONTROL_FD" not in os.environ
    if by_slurm and any(importlib.metadata.distributions(name="mpich")):
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
        os.environ.setdefault("FI_PROVIDER", "tcp")
        os.environ.setdefault("MPIR_CVAR_NOLOCAL", "1")


def _finalize_hydra() -> None:
    """Say to MPICH's mpirun that this rank is about to exit.

    MPICH itself says so in a handler of the C library's exit, which ranks don't run (`exit_process`). Unless a rank has
    said so, mpirun takes its exit for a failure, kills the ranks that still run and may exit with 9.
    """
    if "HYDI_CONTROL_FD" not in os.environ:  # another MPI's mpirun, or srun
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(os.environ["PMI_FD"]))) as pmi:
        if pmi.family == socket.AF_UNIX:
            pmi.settimeout(_ANSWER_S)
            pmi.sendall(b"cmd=finalize\n")
            pmi.recv(1024)
