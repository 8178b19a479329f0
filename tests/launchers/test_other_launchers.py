"""Ranks that torchrun and mpirun start by themselves, and runs on two hosts, give the local launcher's losses.

Failures are told at once, and starts that don't fit are refused.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import counting
from tests.launchers import hosts
from tests.launchers.forked import fork_server
from tests.launchers.runs import LEAVE_S, RAISE_AT_STEP_6, Hold, fault, losses, make_workplace, ranks_in, torchrun_port

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
SECTIONS: dict[str, dict[str, Any]] = {"parallel": {"tp": 2, "pp": 2}, "train": {"num_steps": 8, "eval_interval": 0}}
WORKER = ["-m", "trimaran.launchers.worker", "spec.yaml"]
LONGEST_S = 250


def python() -> str:
    """The program that stands for the interpreter: it has what it is given forked."""
    return str(fork_server().shim)


def train() -> list[str]:
    return [python(), "-m", "trimaran.launchers.cli.app", "train", "spec.yaml"]


def torchrun(*options: str) -> list[str]:
    return [python(), "-m", "torch.distributed.run", *options, *WORKER]


def mpirun(ranks: int) -> list[str]:
    return [str(BIN / "mpirun"), "-n", str(ranks), *train()]


WAYS: dict[str, Callable[[], list[str]]] = {
    "torchrun": lambda: torchrun("--nproc-per-node", "4"),
    "mpirun": lambda: mpirun(4),
}
# As a user starts them, each with two ranks and a process that starts these.
COLD = {
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", *WORKER],
    "launcher-mpi": [sys.executable, "-m", "trimaran.launchers.cli.app", "train", "spec.yaml", "--launcher", "mpi"],
}


@contextmanager
def running(
    command: list[str], folder: Path, name: str = "agent", **environment: str
) -> Iterator["subprocess.Popen[str]"]:
    """A command while the block runs; what it prints goes to NAME.out and NAME.err."""
    with (folder / f"{name}.out").open("w") as out, (folder / f"{name}.err").open("w") as err:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=out,
            stderr=err,
            text=True,
            env={**os.environ, **torchrun_port(), **environment},
            stdin=subprocess.DEVNULL,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for rank in ranks_in(folder):
            with suppress(psutil.Error):
                rank.kill()


def run(command: list[str], folder: Path, **environment: str) -> tuple[int, str]:
    """Run a command to its end; return its exit code and error output."""
    with running(command, folder, **environment) as process:
        code = process.wait(LONGEST_S)
    return code, (folder / "agent.err").read_text()


def wait_for(what: str, process: "subprocess.Popen[str]", hold: Hold) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not hold.reached:
        assert process.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    workplace = make_workplace(tmp_path_factory.mktemp("local"), **SECTIONS)
    assert workplace.train().code == 0
    return losses(workplace)


@pytest.mark.parametrize("way", COLD)
def test_losses_are_those_of_the_local_launcher(way: str, tmp_path: Path) -> None:
    sections = SECTIONS | {"parallel": {"tp": 2}}
    local = make_workplace(tmp_path / "local", **sections)
    assert local.train().code == 0
    counting.record("cold start", f"{way} and two ranks", 3)
    workplace = make_workplace(tmp_path / way, **sections)
    code, err = run(COLD[way], workplace.folder)
    assert code == 0, err
    assert losses(workplace) == losses(local)
    assert (workplace.run / "report.html").exists()
    assert sorted(path.name for path in next((workplace.run / "logs").glob("*-*")).iterdir()) == ["rank-0", "rank-1"]


def test_mpirun_lets_ranks_exit_one_after_the_other(tmp_path: Path) -> None:
    """A rank that has finished is no failure to mpirun, which would kill the others."""
    late = """
        import time
        import trimaran.launchers.worker.process as process
        exit_process = process.exit_process
        def exit_later(code):
            time.sleep(1)
            open("late", "w").close()
            exit_process(code)
        process.exit_process = exit_later
        """
    make_workplace(tmp_path, parallel={"tp": 2}, train={"num_steps": 1, "eval_interval": 0})
    counting.record("cold start", "mpirun and two ranks", 2)
    command = [str(BIN / "mpirun"), "-n", "2", sys.executable, *WORKER]
    code, err = run(command, tmp_path, **fault(tmp_path, late, rank=0))
    assert code == 0, err
    assert (tmp_path / "late").exists()


# --- two hosts


def on_two_hosts(way: str, here: hosts.Host, first: hosts.Host) -> list[str]:
    """The command of one of the hosts; they meet at the first."""
    if way == "torchrun":
        # By itself torchrun looks for its own address among those of the host's name, which namespaces share.
        where = [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"{first.address}:29400",
            "--rdzv-conf",
            f"is_host={int(here == first)}",
        ]
        where += ["--local-addr", here.address]
        return [*here.prefix, *torchrun("--nnodes", "2", "--nproc-per-node", "2", *where)]
    return [*here.prefix, *train(), "--set", "launcher.nodes=2", "--set", f"launcher.rendezvous={first.address}:29400"]


@pytest.mark.skipif(hosts.why_not() is not None, reason=hosts.why_not() or "")
@pytest.mark.parametrize("way", ["torchrun", "spec"])
def test_two_hosts_give_the_losses_of_the_local_launcher(way: str, expected: list[Any], tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, **SECTIONS, launcher={"start_timeout_s": 90.0})
    with (
        hosts.two_hosts() as (first, second),
        running(on_two_hosts(way, second, first), tmp_path, "second") as other,
        running(on_two_hosts(way, first, first), tmp_path) as process,
    ):
        codes = process.wait(LONGEST_S), other.wait(LONGEST_S)
    assert codes == (0, 0), (tmp_path / "agent.err").read_text() + (tmp_path / "second.err").read_text()
    assert losses(workplace) == expected


@pytest.mark.skipif(hosts.why_not() is not None, reason=hosts.why_not() or "")
def test_a_host_that_does_not_come_is_told_with_the_address(tmp_path: Path) -> None:
    make_workplace(tmp_path, **SECTIONS, launcher={"start_timeout_s": 3.0})
    with hosts.two_hosts() as (first, second):
        code, err = run(on_two_hosts("spec", second, first), tmp_path)
    assert code == 2
    assert f"the store of the nodes (launcher.rendezvous) at {first.address}:29400 did not answer within 3 s" in err


# --- failures


@pytest.mark.parametrize("way", ["torchrun", "mpirun"])
def test_a_rank_that_fails_is_named_and_ends_all(way: str, tmp_path: Path) -> None:
    make_workplace(tmp_path, **SECTIONS, launcher={"timeout_s": 100_000})  # nobody waits for the one that has failed
    code, err = run(WAYS[way](), tmp_path, **fault(tmp_path, RAISE_AT_STEP_6, rank=3))
    assert code != 0
    said = next(line for line in err.splitlines() if line.startswith("error:"))
    assert "pp 1, dp 0, cp 0, tp 1) failed at step 6: KeyError: 'made to fail'" in said
    assert ranks_in(tmp_path) == []


def test_torchrun_starts_the_ranks_anew_after_one_was_killed(expected: list[Any], tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, **SECTIONS)
    hold = Hold(tmp_path, 6)
    command = torchrun("--max-restarts", "1", "--nproc-per-node", "4")
    with running(command, tmp_path, **hold.environment) as process:
        wait_for("the step to be killed in", process, hold)
        ranks_in(tmp_path)[2].kill()
        hold.release()
        code = process.wait(LONGEST_S)
    err = (tmp_path / "agent.err").read_text()
    assert code == 0, err
    assert "error: rank 2 (host " in err
    assert "resuming at step 4" in (tmp_path / "agent.out").read_text()
    assert losses(workplace) == expected


def test_no_rank_outlives_an_agent_that_was_killed(tmp_path: Path) -> None:
    make_workplace(tmp_path, **SECTIONS)
    hold = Hold(tmp_path, 6)
    with running(WAYS["torchrun"](), tmp_path, **hold.environment) as process:
        wait_for("the step to be killed in", process, hold)
        ranks = ranks_in(tmp_path)
        process.kill()
        assert psutil.wait_procs(ranks, timeout=LEAVE_S)[1] == []
    assert len(ranks) == 4


# --- starts that don't fit


@pytest.mark.parametrize("way", ["torchrun", "mpirun"])
def test_a_number_of_ranks_that_is_not_the_layouts_is_refused(way: str, tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, **SECTIONS)
    code, err = run([word if word != "4" else "3" for word in WAYS[way]()], tmp_path)
    assert code != 0
    assert "!= WORLD_SIZE 3" in err
    assert not workplace.run.exists()


def test_ranks_with_different_specs_are_refused_and_listed(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, **SECTIONS)
    code, err = run([*mpirun(3), ":", "-n", "1", *train(), "--set", "seed=7"], tmp_path)
    assert code != 0
    assert "the ranks must all have the same run and code, and differ in" in err
    assert re.search(r"spec: \w{12} on ranks 0-2 \(host .*\), \w{12} on rank 3 \(host ", err), err
    assert not workplace.checkpoints.exists()


def test_a_port_in_use_is_told_with_its_address(tmp_path: Path) -> None:
    make_workplace(tmp_path, **SECTIONS)
    place = {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    code, err = run([python(), *WORKER, "--set", "launcher.start_timeout_s=1"], tmp_path, **place)
    assert code == 1
    assert "at 127.0.0.1:1 did not answer within 1 s" in err
