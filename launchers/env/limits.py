"""Limits of the process and of the machine, as login shells, containers and batch steps set them. Imports no torch.

A soft limit that its owner may raise is raised; one that is too low for a run is refused before anything starts, and
one that may end a run later is told.
"""

import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trimaran.runtime.processes import cgroup_values
from trimaran.runtime.spec import RunSpec

SHARED_MEMORY = Path("/dev/shm")
_OPEN_FILES, _OPEN_FILES_OF_A_PEER = 64, 2  # measured: 2 ranks hang with 24 and run with 48
_THREADS_OF_A_RANK = 4
_STACK_BYTES = 8 << 20
_IMPORT_BYTES = 2 << 30  # of address space, for torch alone: with 1 GB a rank fails, with 3 GB it runs
_STATE_BYTES = 12  # of a checkpoint, for each parameter: the weight and both moments
_PAGE = 4096
_SEMAPHORES, _SEMAPHORES_OF_A_RANK = 8, 2  # of multiprocessing, a page each
_UNLIMITED = resource.RLIM_INFINITY


class LimitError(ValueError):
    """A limit is too low for the run; the message names it and how it is raised."""


def raise_soft_limits() -> None:
    """Raise the soft limits of open files, processes, locked memory and the stack as far as this user may."""
    for number in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK):
        _raise(number, lambda soft, hard: hard)
    # Threads get a stack of this size; unlimited would give them a smaller one.
    _raise(resource.RLIMIT_STACK, lambda soft, hard: soft if _at_least(soft, _STACK_BYTES) else _lower(hard))


def check_limits(spec: RunSpec, ranks: int) -> list[str]:
    """Check what `ranks` ranks on this machine need; return warnings about what may end them later.

    Raises:
        LimitError: they can't run.
    """
    problems = [*_low_limits(spec), *low_cgroup(ranks), *low_shared_memory(ranks)]
    if problems:
        raise LimitError("; ".join(problems))
    warnings = []
    seconds = _soft(resource.RLIMIT_CPU)
    if seconds != _UNLIMITED:
        warnings.append(f"the kernel kills a process after {seconds} s of CPU time (ulimit -t): ulimit -t unlimited")
    locked = _soft(resource.RLIMIT_MEMLOCK)
    if locked != _UNLIMITED and spec.launcher.device != "cpu" and Path("/sys/class/infiniband").is_dir():
        warnings.append(
            f"a process may lock {locked} bytes of memory (ulimit -l), and InfiniBand needs more: ulimit -l unlimited"
        )
    return warnings


def _low_limits(spec: RunSpec) -> list[str]:
    problems = []
    files, needed = _soft(resource.RLIMIT_NOFILE), _OPEN_FILES + _OPEN_FILES_OF_A_PEER * spec.world_size
    if not _at_least(files, needed):
        problems.append(
            f"a process may open {files} files (ulimit -n), and one of {spec.world_size} ranks needs {needed}: "
            "ulimit -n 65536, or --ulimit nofile=65536 of a container"
        )
    for number, flag in ((resource.RLIMIT_AS, "-v"), (resource.RLIMIT_DATA, "-d")):
        room = _soft(number)
        if not _at_least(room, _IMPORT_BYTES) or (spec.launcher.device == "cuda" and room != _UNLIMITED):
            problems.append(
                f"a process may use {room / 2**30:.1f} GiB of memory (ulimit {flag}), and importing torch takes "
                f"{_IMPORT_BYTES >> 30} (on a GPU without a bound): ulimit {flag} unlimited"
            )
    file_bytes = _soft(resource.RLIMIT_FSIZE)
    state = spec.transformer.num_parameters() * _STATE_BYTES // spec.world_size
    if not _at_least(file_bytes, state):
        problems.append(
            f"a file may have {file_bytes} bytes (ulimit -f), and a rank's part of a checkpoint takes about {state}: "
            "ulimit -f unlimited"
        )
    return problems


def low_cgroup(ranks: int) -> list[str]:
    """Say why so many ranks may not be started."""
    needed = ranks * _THREADS_OF_A_RANK
    return [
        f"this container or job may have {most} processes and threads and has {now}, and {ranks} ranks need at least "
        + f"{needed} more: raise pids.max (--pids-limit of a container, TasksMax of systemd)"
        for most, now in cgroup_values("pids.max", "pids.current")
        if most.isdigit() and int(most) - int(now) < needed
    ]


def low_shared_memory(ranks: int) -> list[str]:
    """Say why multiprocessing can't make its semaphores, which the C library keeps in /dev/shm."""
    fix = "docker run --shm-size 1g; in Kubernetes an emptyDir of medium Memory; or mount -o remount,rw,size=1g"
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return [f"{SHARED_MEMORY} can't be used: {error.strerror}; mount a tmpfs there ({fix})"]
    if room.f_flag & os.ST_RDONLY or not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        return [f"{SHARED_MEMORY} is read-only, and the ranks share semaphores there; make it writable ({fix})"]
    needed, free = (_SEMAPHORES + _SEMAPHORES_OF_A_RANK * ranks) * _PAGE, room.f_bavail * room.f_frsize
    if free < needed:
        return [f"{SHARED_MEMORY} has {free} bytes left, and {ranks} ranks take at least {needed}; enlarge it ({fix})"]
    return []


def _soft(number: int) -> int:
    return resource.getrlimit(number)[0]


def _at_least(limit: int, needed: int) -> bool:
    return limit == _UNLIMITED or limit >= needed


def _lower(hard: int) -> int:
    return _STACK_BYTES if _at_least(hard, _STACK_BYTES) else hard


def _raise(number: int, choose: Callable[[int, int], int]) -> None:
    soft, hard = resource.getrlimit(number)
    with suppress(ValueError, OSError):  # the kernel's own bound (fs.nr_open) may be lower
        resource.setrlimit(number, (choose(soft, hard), hard))
