"""Looks at the machine: processors, memory, limits, disk, network."""

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from trimaran.launchers.before_start import check_writable
from trimaran.launchers.doctor.ask import Finding
from trimaran.launchers.env.limits import SHARED_MEMORY, low_cgroup, low_shared_memory
from trimaran.launchers.env.network import interfaces
from trimaran.launchers.terminal import sentence
from trimaran.runtime.processes import cgroup_values, free_memory_bytes, usable_cores

_GROUP = "machine"
_RANKS = 8  # of a usual run on one machine
_LITTLE_SHARED, _LITTLE_DISK = 256 << 20, 5 << 30
_OPEN_FILES, _OPEN_FILES_OF_A_PEER = 64, 2  # as limits.py has them


def looks_at_machine(output: Path) -> Iterator[Finding]:
    """Yield what the machine has for the ranks of a run whose folder is below `output`."""
    looks: dict[str, Callable[[], Finding]] = {
        "CPU cores": _cores, "memory": _memory, str(SHARED_MEMORY): _shared_memory, "open files": _open_files,
        "processes": _processes, "disk": partial(_disk, output), "network": _interfaces,
    }  # fmt: skip
    for name, look in looks.items():
        try:
            yield look()
        except OSError as error:  # a sandbox without /proc, a file system that doesn't answer
            yield Finding(_GROUP, name, "can't be told", sentence(error), "trouble")


def _cores() -> Finding:
    usable, whole = usable_cores(), os.cpu_count() or 0
    found = f"{usable} of {whole}" + (", by affinity or the quota of a container or job" if usable < whole else "")
    return Finding(_GROUP, "CPU cores", found, f"CPU ranks share {usable}; launcher.threads_per_rank")


def _memory() -> Finding:
    total, free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), free_memory_bytes()
    limits = [int(most) for (most,) in cgroup_values("memory.max") if most.isdigit()]
    found = f"{_size(total)}, of which how much is free can't be told"
    if free is not None:
        found = f"{_size(free)} free of {_size(total)}"
    if limits and min(limits) < total:
        found += f"; the container or job may use {_size(min(limits))}"
    return Finding(_GROUP, "memory", found, "trimaran check SPEC plans what a rank takes")


def _shared_memory() -> Finding:
    problems = low_shared_memory(_RANKS)
    if problems:
        return Finding(_GROUP, str(SHARED_MEMORY), "can't be used", problems[0], "broken")
    room = os.statvfs(SHARED_MEMORY)
    free, whole = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    found = f"{_size(free)} free of {_size(whole)}"
    if free < _LITTLE_SHARED:
        return Finding(_GROUP, str(SHARED_MEMORY), found, "little: tensors of CPU ranks go through gloo", "trouble")
    return Finding(_GROUP, str(SHARED_MEMORY), found, "CPU ranks exchange tensors there")


def _open_files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return Finding(_GROUP, "open files", "unlimited")
    most = (hard - _OPEN_FILES) // _OPEN_FILES_OF_A_PEER
    found, effect = f"{hard:,} a process", f"enough for {max(most, 0):,} ranks"
    if most < 1:
        return Finding(_GROUP, "open files", found, "too few for a rank: ulimit -n 65536", "broken")
    return Finding(_GROUP, "open files", found, effect)


def _processes() -> Finding:
    problems = low_cgroup(_RANKS)
    if problems:
        return Finding(_GROUP, "processes", "few", problems[0], "trouble")
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    return Finding(_GROUP, "processes", "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,} of this user")


def _disk(output: Path) -> Finding:
    name = "disk"
    try:
        check_writable("the folder", output)
    except ValueError as error:
        return Finding(_GROUP, name, f"{output} can't be written", str(error), "broken")
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{_size(free)} free for {output}"
    if free < _LITTLE_DISK:
        return Finding(_GROUP, name, found, "little: a checkpoint has 12 bytes a parameter, two are kept", "trouble")
    return Finding(_GROUP, name, found, f"checkpoints of up to {free / 24 / 1e9:,.2g} billion parameters, two of them")


def _interfaces() -> Finding:
    found = [f"{name} {address.ip}" for name, address in interfaces().items() if not address.ip.is_loopback]
    if not found:
        return Finding(_GROUP, "network", "loopback alone", "runs of one machine only", "missing")
    return Finding(_GROUP, "network", ", ".join(found), "nodes meet by one of these: launcher.interface")


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
