"""What Linux knows of this process and of others of this host, from /proc and by prctl. Imports no torch."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from trimaran.runtime.files import read_text

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # linux/prctl.h


def exit_with_parent(parent: int | None = None) -> None:
    """Make the kernel send SIGTERM to this process when its parent dies; a rank, whose launcher it is, saves then.

    Args:
        parent: its process number, as the parent told it; without it, a death before this call is not noticed.
    """
    parent = os.getppid() if parent is None else parent
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def set_process_name(name: str) -> None:
    """Set the name that `top` and `ps -o comm` show."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def _prctl(option: int, value: int | bytes) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def this_machine() -> str:
    """Return a name of this kernel's boot and this process's namespace of process numbers; "" where it has none."""
    try:
        boot = read_text(Path("/proc/sys/kernel/random/boot_id")).strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_of(pid: int) -> str:
    """Return when a process of this host started, in the kernel's clock ticks; "" where it has ended."""
    fields = _stat_of(pid)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def is_stopped(pid: int) -> bool:
    """Return whether a process of this host is stopped, by SIGSTOP or a debugger."""
    return _stat_of(pid)[:1] in (["T"], ["t"])


def children_of(pid: int) -> list[int]:
    """Return the living child processes of a process of this host."""
    names = [name for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir("/proc") else []
    return [int(name) for name in names if (stat := _stat_of(int(name)))[1:2] == [str(pid)] and stat[0] not in "ZX"]


def _stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on, none where there is no such process."""
    try:
        return read_text(Path(f"/proc/{pid}/stat"), errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def cgroup_values(*names: str) -> list[list[str]]:
    """Return the words of files such as `cpu.max` of each control group that this process is in, outermost last.

    Groups that lack one of the files are left out. A container sees its own group as the root.
    """
    try:
        lines = read_text(Path("/proc/self/cgroup")).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or names[0].partition(".")[0] in controllers.split(","):
            top = Path("/sys/fs/cgroup", controllers)
            group = top / path.lstrip("/")
            for folder in (each for each in (group, *group.parents) if each.is_relative_to(top)):
                with suppress(OSError):
                    texts = [read_text(folder / name) for name in names]
                    found.append(" ".join(texts).split())
    return found


def usable_cores() -> int:
    """Return the cores that this process may use: those of its mask, or fewer where a control group has a quota."""
    cores = len(cores_of_mask())
    return max(1, min(cores, quota_of_cores() or cores))


def cores_of_mask() -> set[int]:
    """Return the numbers of the cores that this process's mask has; of a system without masks, of all."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def quota_of_cores() -> int | None:
    """Return how many cores' time the control groups of this process may use, rounded up; None for all."""
    of_versions = [*cgroup_values("cpu.max"), *cgroup_values("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    quotas = [-(-int(quota) // int(period)) for quota, period in of_versions if quota.isdigit() and int(period)]
    return min(quotas, default=None)


def free_memory_bytes() -> int | None:
    """Return the bytes of memory that processes here may still take; None where the kernel does not tell.

    What files take up in the page cache counts as free, of the host and of a control group that has a limit.
    """
    try:
        lines = read_text(Path("/proc/meminfo")).splitlines()
    except OSError:
        return None
    found = [int(words[1]) * 1024 for line in lines if (words := line.split())[:1] == ["MemAvailable:"]]
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for most, used, *stat in (group for pair in names for group in cgroup_values(*pair, "memory.stat")):
        files = dict(zip(stat[::2], stat[1::2], strict=True)).get("inactive_file", "0")
        if most.isdigit():
            found.append(max(0, int(most) - int(used) + int(files)))
    return min(found, default=None)
