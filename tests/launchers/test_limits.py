"""Limits of the process and the machine: raised where that is allowed, refused by name where they are too low."""

import os
import resource
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trimaran.launchers.env import limits
from trimaran.launchers.env.limits import LimitError, check_limits, raise_soft_limits
from trimaran.launchers.local import fork_server, torch_elastic
from trimaran.launchers.local.fork_server import _short_temporary_folder
from trimaran.runtime import processes
from trimaran.runtime.processes import children_of, quota_of_cores, usable_cores
from trimaran.runtime.spec import RunSpec, parse_spec

UNLIMITED = resource.RLIM_INFINITY


def spec_of(parallel: dict[str, int], device: str = "auto") -> RunSpec:
    return parse_spec(
        {
            "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4},
            "optimizer": {"lr": 1e-3},
            "train": {"num_steps": 1, "global_batch_size": 64, "micro_batch_size": 1, "seq_len": 16},
            "parallel": parallel,
            "launcher": {"device": device},
        }
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the machine allows: everything, unless a test changes it."""
    allowed: dict[str, Any] = {"limits": {}, "cgroup": [], "room": (0, 1 << 20), "writable": True}
    names = ("NOFILE", "NPROC", "MEMLOCK", "STACK", "AS", "DATA", "FSIZE", "CPU")
    numbers = {getattr(resource, f"RLIMIT_{name}"): name for name in names}
    monkeypatch.setattr(
        resource, "getrlimit", lambda number: allowed["limits"].get(numbers[number], (UNLIMITED, UNLIMITED))
    )
    monkeypatch.setattr(
        resource, "setrlimit", lambda number, pair: allowed["limits"].__setitem__(numbers[number], pair)
    )
    monkeypatch.setattr(limits, "cgroup_values", lambda *names: allowed["cgroup"])
    monkeypatch.setattr(
        os,
        "statvfs",
        lambda path: SimpleNamespace(f_flag=allowed["room"][0], f_bavail=allowed["room"][1], f_frsize=4096),
    )
    monkeypatch.setattr(os, "access", lambda path, mode: allowed["writable"])
    return allowed


def test_soft_limits_are_raised_as_far_as_the_user_may(machine: dict[str, Any]) -> None:
    machine["limits"] = {
        "NOFILE": (1024, 4096),
        "NPROC": (100, 200),
        "MEMLOCK": (65536, UNLIMITED),
        "STACK": (4096, -1),
    }
    raise_soft_limits()
    assert machine["limits"] == {
        "NOFILE": (4096, 4096), "NPROC": (200, 200), "MEMLOCK": (UNLIMITED, UNLIMITED), "STACK": (8 << 20, UNLIMITED),
    }  # fmt: skip
    assert check_limits(spec_of({"tp": 4, "dp": 8}), 32) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"limits": {"NOFILE": (64, 64)}},
            r"may open 64 files \(ulimit -n\), and one of 8 ranks needs 80: ulimit -n 65536",
        ),
        ({"limits": {"AS": (2**30, 2**30)}}, r"may use 1.0 GiB of memory \(ulimit -v\)"),
        ({"limits": {"DATA": (2**30, 2**30)}}, r"may use 1.0 GiB of memory \(ulimit -d\)"),
        ({"limits": {"FSIZE": (1024, 1024)}}, r"a file may have 1024 bytes \(ulimit -f\), and a rank's part"),
        ({"cgroup": [["max", "3"], ["40", "20"]]}, "may have 40 processes and threads and has 20, and 8 ranks need at"),
        ({"room": (0, 1)}, r"/dev/shm has 4096 bytes left, and 8 ranks take at least 98304; enlarge it \(docker"),
        ({"room": (os.ST_RDONLY, 9999)}, "/dev/shm is read-only, and the ranks share semaphores there"),
        ({"writable": False}, "/dev/shm is read-only"),
    ],
)
def test_a_limit_that_is_too_low_is_named_with_its_remedy(
    changes: dict[str, Any], words: str, machine: dict[str, Any]
) -> None:
    machine |= changes
    with pytest.raises(LimitError, match=words):
        check_limits(spec_of({"tp": 2, "dp": 4}), 8)


def test_what_may_end_a_run_later_is_told(machine: dict[str, Any]) -> None:
    machine["limits"] = {"CPU": (1800, 1800)}
    (warning,) = check_limits(spec_of({}), 1)
    assert warning == "the kernel kills a process after 1800 s of CPU time (ulimit -t): ulimit -t unlimited"


def test_a_gpu_needs_an_unbounded_address_space(machine: dict[str, Any]) -> None:
    machine["limits"] = {"AS": (2**36, 2**36)}
    assert check_limits(spec_of({}), 1) == []
    with pytest.raises(LimitError, match="on a GPU without a bound"):
        check_limits(spec_of({}, "cuda"), 1)


@pytest.mark.parametrize(
    ("values", "cores"),
    [
        ({}, None),
        ({"cpu.max": [["max", "100000"]]}, None),
        ({"cpu.max": [["max", "100000"], ["150000", "100000"]]}, 2),  # of the group above
        ({"cpu.cfs_quota_us": [["-1", "100000"]]}, None),
        ({"cpu.cfs_quota_us": [["400000", "100000"]]}, 4),
    ],
)
def test_a_containers_share_of_the_cpu_time_counts(
    values: dict[str, list[list[str]]], cores: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "cgroup_values", lambda *names: values.get(names[0], []))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert quota_of_cores() == cores
    assert usable_cores() == (cores or 64)


def test_a_long_tmpdir_is_left_alone_by_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("scratch-of-job-" * 6)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(fork_server, "_SHORT_FOLDERS", ("/no/such/folder", "/tmp"))
    with _short_temporary_folder():
        assert tempfile.gettempdir() == "/tmp"
    assert tempfile.gettempdir() == str(long)
    monkeypatch.setattr(fork_server, "_SHORT_FOLDERS", ("/no/such/folder",))
    words = rf"TMPDIR .* has {len(str(long))} characters, a socket there can have a TMPDIR of at most 75, and /no/such"
    with pytest.raises(ValueError, match=words), _short_temporary_folder():
        pass


def test_no_rank_outlives_an_agent_that_a_second_signal_has_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rank does not act on SIGTERM."""
    command = ["sh", "-c", "trap '' TERM; sleep 100 & echo; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server, torch_elastic._quiet():
        assert server.stdout is not None
        server.stdout.readline()
        monkeypatch.setattr(fork_server.forkserver._forkserver, "_forkserver_pid", server.pid)
        monkeypatch.setattr(torch_elastic, "_SHUTDOWN_S", 0.2)
        assert len(children_of(server.pid)) == 1
        with pytest.raises(InterruptedError), torch_elastic._no_rank_left():
            raise InterruptedError
        assert children_of(server.pid) == []
