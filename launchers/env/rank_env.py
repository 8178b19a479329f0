"""`read_env`: this process's rank and its start, from the environment variables of its launcher. Imports no torch.

There are four kinds of start: torchrun's agent (or anything else that sets RANK, WORLD_SIZE and MASTER_ADDR), MPI
(mpirun, or srun with an MPI plugin), a Slurm step, and a single process.
"""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["torchrun", "mpi", "slurm", "single"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What the process managers of MPI set, by the name of (rank, size, local rank, local size); PMIx tells the rank alone.
_MPI = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


class RankEnvError(ValueError):
    """The environment contradicts itself or is incomplete; the message says which variables and what to do."""


@dataclass(frozen=True)
class RankEnv:
    """The rank of a process among those that were started with it.

    Args:
        launcher: the program that started it.
        rank, world_size: among all processes of the start.
        local_rank, local_world_size: among those of its node.
        node: the node's name in its scheduler, where one host may be several nodes.
        start: a name that no other start has, neither an earlier one nor one at the same time: another job, another
            step of the job, a requeued job, a restart of torchrun's agents.
    """

    launcher: Kind
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    start: str

    @property
    def size_name(self) -> str:
        """Name of the variable that has the world size, for messages."""
        names = {"torchrun": "WORLD_SIZE", "slurm": "SLURM_STEP_NUM_TASKS", "mpi": "MPI's world size (PMI_SIZE)"}
        return names.get(self.launcher, "world size")

    def __post_init__(self) -> None:
        pairs = (("rank", self.rank, self.world_size), ("local rank", self.local_rank, self.local_world_size))
        for name, index, size in pairs:
            if not 0 <= index < size:
                raise RankEnvError(f"the environment of {self.launcher} says {name} {index} of {size}")
        if self.local_world_size > self.world_size:
            raise RankEnvError(
                f"the environment of {self.launcher} says {self.local_world_size} ranks on this node "
                f"and {self.world_size} in all"
            )


def read_env(environment: Mapping[str, str], launcher: Literal["auto"] | Kind = "auto") -> RankEnv:
    """Return the rank of this process.

    Args:
        launcher: whose variables to read; "auto" takes torchrun's before MPI's before Slurm's, because the variables of
            an outer launcher remain in the environment of the processes that an inner one starts.

    Raises:
        RankEnvError: variables are missing, are not numbers, or two launchers disagree about the number of ranks.
    """
    kind = detect(environment) if launcher == "auto" else launcher
    return {"torchrun": _torchrun, "mpi": _mpi, "slurm": _slurm, "single": _single}[kind](environment)


def detect(environment: Mapping[str, str]) -> Kind:
    """Return which launcher started this process."""
    # WORLD_SIZE or MASTER_ADDR alone may be left over in a user's shell.
    if "RANK" in environment and ("MASTER_ADDR" in environment or "WORLD_SIZE" in environment):
        return "torchrun"
    if any(_size(environment, size) > 1 for _, size, _, _ in _MPI):
        return "mpi"
    # A shell that srun has started has the variables of srun's MPI plugin too, and is one process of one.
    of_plugin = "PMIX_RANK" in environment or any(size in environment for _, size, _, _ in _MPI)
    if in_slurm_step(environment):
        return "mpi" if of_plugin and _number(environment, "SLURM_STEP_NUM_TASKS") > 1 else "slurm"
    return "mpi" if _size(environment, "PMIX_RANK") > 0 else "single"


def is_rank(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher has started this process as one of several ranks; if so, it must start none itself."""
    kind = detect(environment)
    if kind == "slurm":
        return _number(environment, "SLURM_STEP_NUM_TASKS") > 1
    return kind != "single"


def _size(environment: Mapping[str, str], name: str) -> int:
    """Return a number of the environment, 0 where there is none of that name."""
    return _number(environment, name) if name in environment else 0


def in_slurm_step(environment: Mapping[str, str]) -> bool:
    """Return whether srun started this process as one of a step's tasks.

    A batch script, and the shell of `salloc`, have SLURM_PROCID too and are no such task.
    """
    step = environment.get("SLURM_STEP_ID", "")
    # Steps that Slurm makes by itself (batch, extern, interactive) have numbers at the end of 32 bits.
    return bool(re.fullmatch("[0-9]{1,10}", step)) and int(step) < 0xFFFFFF00 and "SLURM_PROCID" in environment


def node_name(environment: Mapping[str, str]) -> str:
    """Return the name of this node: Slurm's, or the host's."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def _torchrun(environment: Mapping[str, str]) -> RankEnv:
    missing = [name for name in _TORCHRUN if name not in environment]
    if missing:
        raise RankEnvError(
            f"RANK is set, as torchrun does, but not {', '.join(missing)}; start the ranks by torchrun, or unset RANK "
            "for a single process"
        )
    rank, world_size, local_rank, local_world_size = (_number(environment, name) for name in _TORCHRUN[:4])
    run = re.sub(
        r"[^\w-]", "_", environment.get("TORCHELASTIC_RUN_ID", "none")
    )  # the user's --rdzv-id; it becomes part of a path
    start = f"{run}-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return RankEnv("torchrun", rank, world_size, local_rank, local_world_size, node_name(environment), start)


def _mpi(environment: Mapping[str, str]) -> RankEnv:
    node = node_name(environment)
    start = _slurm_start(environment) if "SLURM_JOB_ID" in environment else "mpi"
    for names in _MPI:
        if names[1] not in environment:
            continue
        rank, world_size = (_number(environment, name) for name in names[:2])
        _check_mpi_size(environment, world_size)
        if names[2] in environment:
            local_rank, local_world_size = (_number(environment, name) for name in names[2:])
            return RankEnv("mpi", rank, world_size, local_rank, local_world_size, node, start)
        if in_slurm_step(environment):  # srun --mpi=pmi2, whose plugin leaves the rank on the node to Slurm
            return RankEnv("mpi", rank, world_size, *_slurm_local(environment), node, start)
        raise RankEnvError(
            f"{names[1]} is set, as mpirun does, but not {names[2]}; start the ranks by MPICH's or Open MPI's mpirun, "
            "or by srun"
        )
    if in_slurm_step(environment):  # srun --mpi=pmix
        return RankEnv(
            "mpi",
            _number(environment, "SLURM_PROCID"),
            _number(environment, "SLURM_STEP_NUM_TASKS"),
            *_slurm_local(environment),
            node,
            start,
        )
    seen = f"PMIX_RANK is {environment['PMIX_RANK']}, but " if "PMIX_RANK" in environment else ""
    raise RankEnvError(
        f"{seen}no variable says how many ranks an MPI launcher has started (PMI_SIZE, OMPI_COMM_WORLD_SIZE); start "
        "them with mpirun -n N, or srun --mpi=pmi2; for a run that MPI has not started, unset PMIX_RANK or pass "
        "--launcher local"
    )


def _slurm(environment: Mapping[str, str]) -> RankEnv:
    if not in_slurm_step(environment):
        raise RankEnvError("this process is no task of a Slurm step (SLURM_STEP_ID is not set); start it by srun")
    rank, world_size = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
    return RankEnv(
        "slurm", rank, world_size, *_slurm_local(environment), node_name(environment), _slurm_start(environment)
    )


def _check_mpi_size(environment: Mapping[str, str], world_size: int) -> None:
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS") if in_slurm_step(environment) else 1
    if world_size < tasks:  # more are right: mpirun in a Slurm job starts a proxy a node, and each starts several ranks
        raise RankEnvError(
            f"MPI says {world_size} ranks and this Slurm step has {tasks} tasks; start it with srun --mpi=pmi2 "
            "(srun --mpi=list names the plugins), and an MPI library that understands it"
        )


def _single(environment: Mapping[str, str]) -> RankEnv:
    # A rank that wrongly believes to be the only one would train a whole model beside the others.
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS") if in_slurm_step(environment) else 1
    if tasks > 1:
        raise RankEnvError(f"this Slurm step has {tasks} tasks, and each would run alone; set launcher.kind to slurm")
    return RankEnv("single", 0, 1, 0, 1, node_name(environment), "single")


def _slurm_local(environment: Mapping[str, str]) -> tuple[int, int]:
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environment, "SLURM_NODEID")
    if node >= len(tasks):
        raise RankEnvError(f"SLURM_NODEID is {node}, and SLURM_STEP_TASKS_PER_NODE names {len(tasks)} nodes")
    return _number(environment, "SLURM_LOCALID"), tasks[node]


def _slurm_start(environment: Mapping[str, str]) -> str:
    parts = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return "-".join(environment.get(name, "0") for name in parts)


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node from Slurm's short form, such as "4(x2),3".

    Raises:
        RankEnvError: the text has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part.strip())
        if found is None:
            raise RankEnvError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, not numbers of tasks such as 4(x2),3")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise RankEnvError(
            f"{name} is not set, though its neighbours are; the environment was changed after the launcher made it"
        )
    if not re.fullmatch(r"\d{1,9}", text.strip()):
        raise RankEnvError(f"{name} is {text!r}, not a number")
    return int(text)
