"""Ranks that torchrun and mpirun start by themselves, and runs on two hosts, give the local launcher's losses.

Failures are told at once, and starts that don't fit are refused.
"""

import os
import re
import subprocess
import sys
import textwrap
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
from tests.launchers.runs import (
    LEAVE_S,
    RAISE_AT_STEP_6,
    Command,
    Hold,
    Workplace,
    fault,
    hold_in_step,
    losses,
    make_workplace,
    ranks_in,
    torchrun_port,
)
from tests.session import made_once, session_folder

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
SECTIONS: dict[str, dict[str, Any]] = {"parallel": {"tp": 2, "pp": 2}, "train": {"num_steps": 8, "eval_interval": 0}}
WORKER = ["-m", "trimaran.launchers.worker", "spec.yaml"]
TWO_RANKS = SECTIONS | {"parallel": {"tp": 2}}
LONGEST_S = 250


def python() -> str:
    """The program that stands for the interpreter: it has what it is given forked."""
    return str(fork_server().shim)


def train() -> list[str]:
    return [python(), "-m", "trimaran.launchers.cli.app", "train", "spec.yaml"]


def torchrun(*options: str) -> list[str]:
    return [python(), "-m", "torch.distributed.run", *options, *WORKER]


def mpirun(ranks: int) -> list[str]:
    """The command that has the ranks start cold: MPI does not always initialise in a forked process."""
    counting.record("cold start", "ranks of mpirun", ranks)
    return [str(BIN / "mpirun"), "-n", str(ranks), sys.executable, *WORKER]


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


def wait_for(what: str, process: "subprocess.Popen[str]", happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not happened():
        assert process.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def losses_of_local_launcher(ranks: int) -> list[Any]:
    sections = TWO_RANKS if ranks == 2 else SECTIONS
    workplace = make_workplace(session_folder() / f"local-{ranks}", **sections)
    assert workplace.train().code == 0
    return losses(workplace)


@pytest.fixture(scope="module")
def expected_of_two() -> list[Any]:
    return made_once(losses_of_local_launcher, 2)


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    return made_once(losses_of_local_launcher, 4)


def assert_same_run(workplace: Workplace, others: list[Any]) -> None:
    assert losses(workplace) == others
    assert (workplace.run / "report.html").exists()
    ranks = sorted(path.name for path in next((workplace.run / "logs").glob("*-*")).iterdir())
    assert ranks == ["rank-0", "rank-1"]


def test_torchrun_gives_the_losses_of_the_local_launcher(expected_of_two: list[Any], tmp_path: Path) -> None:
    """Started as a user starts it."""
    workplace = make_workplace(tmp_path, **TWO_RANKS)
    counting.record("cold start", "torchrun and two ranks", 3)
    code, err = run([str(BIN / "torchrun"), "--nproc-per-node", "2", *WORKER], tmp_path)
    assert code == 0, err
    assert_same_run(workplace, expected_of_two)


def test_mpirun_gives_the_losses_of_the_local_launcher(expected_of_two: list[Any], tmp_path: Path) -> None:
    """By `--launcher mpi`. A rank that exits before the others is no failure to mpirun, which would kill them."""
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
    workplace = make_workplace(tmp_path, **TWO_RANKS)
    counting.record("cold start", "two ranks of --launcher mpi", 2)
    code, err = run([*train(), "--launcher", "mpi"], tmp_path, **fault(tmp_path, late, rank=0))
    assert code == 0, err
    assert (tmp_path / "late").exists()
    assert_same_run(workplace, expected_of_two)


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
    workplace = make_workplace(tmp_path, **SECTIONS, launcher={"start_timeout_s": 200.0})
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
        waiting, told = run(on_two_hosts("spec", first, first), tmp_path)
    assert (code, waiting) == (2, 1)
    assert "error: the 2 nodes have not met within 3 s" in told
    assert "Traceback" not in told
    assert f"the store of the nodes (launcher.rendezvous) at {first.address}:29400 did not answer within 3 s" in err


# --- failures


@pytest.mark.parametrize("way", ["torchrun", "mpirun"])
def test_a_rank_that_fails_is_named_and_ends_all(way: str, tmp_path: Path) -> None:
    make_workplace(tmp_path, **TWO_RANKS, launcher={"timeout_s": 100_000})  # nobody waits for the one that has failed
    command = torchrun("--nproc-per-node", "2") if way == "torchrun" else mpirun(2)
    code, err = run(command, tmp_path, **fault(tmp_path, RAISE_AT_STEP_6, rank=1))
    assert code != 0
    said = next(line for line in err.splitlines() if line.startswith("error:"))
    assert "pp 0, dp 0, cp 0, tp 1) failed at step 6: KeyError: 'made to fail'" in said
    assert ranks_in(tmp_path) == []


def test_torchrun_starts_the_ranks_anew_after_one_was_killed(expected: list[Any], tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, **SECTIONS)
    hold = Hold(tmp_path, 6)
    command = torchrun("--max-restarts", "1", "--nproc-per-node", "4")
    with running(command, tmp_path, **hold.environment) as process:
        wait_for("the step to be killed in", process, lambda: hold.reached)
        ranks_in(tmp_path)[2].kill()
        hold.release()
        code = process.wait(LONGEST_S)
    err = (tmp_path / "agent.err").read_text()
    assert code == 0, err
    assert "error: rank 2 (host " in err
    assert "resuming at step 4" in (tmp_path / "agent.out").read_text()
    assert losses(workplace) == expected


def test_no_rank_outlives_an_agent_that_was_killed_however_long_its_step_takes(tmp_path: Path) -> None:
    make_workplace(tmp_path, **SECTIONS)
    environment, reached = hold_in_step(tmp_path)
    with running(torchrun("--nproc-per-node", "4"), tmp_path, **environment) as process:
        wait_for("the step to be killed in", process, reached.exists)
        ranks = ranks_in(tmp_path)
        process.kill()
        assert psutil.wait_procs(ranks, timeout=LEAVE_S)[1] == []
    assert len(ranks) == 4


def test_mpirun_does_not_outlive_the_command_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "mpirun").write_text("#!/bin/sh\necho $$ > new && mv new pid\nexec sleep 999\n")
    (tmp_path / "mpirun").chmod(0o755)
    code = f"""
        from pathlib import Path
        from types import SimpleNamespace
        from trimaran.launchers.local import mpirun

        mpirun.find_mpirun = lambda: {str(tmp_path / "mpirun")!r}
        mpirun.run_by_mpirun(SimpleNamespace(world_size=2), Path("spec.yaml"), [])
        """
    with Command.start(tmp_path, [textwrap.dedent(code)], kind="-c") as command:
        command.wait_until((tmp_path / "pid").exists)
        started = psutil.Process(int((tmp_path / "pid").read_text()))
        command.process.kill()
        assert psutil.wait_procs([started], timeout=LEAVE_S)[1] == []


# --- starts that don't fit


@pytest.mark.parametrize("way", ["torchrun", "mpirun"])
def test_a_number_of_ranks_that_is_not_the_layouts_is_refused(way: str, tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, **SECTIONS)
    forked = [str(BIN / "mpirun"), "-n", "3", *train()]  # refused before MPI is initialised
    code, err = run(torchrun("--nproc-per-node", "3") if way == "torchrun" else forked, tmp_path)
    assert code != 0
    assert ("!= WORLD_SIZE 3" if way == "torchrun" else "!= MPI's world size (PMI_SIZE) 3") in err
    assert way == "torchrun" or "Traceback" not in err  # torchrun prints its own
    assert not workplace.run.exists()


def test_ranks_with_different_specs_are_refused_and_listed(tmp_path: Path) -> None:
    """Two agents of one run, which give their ranks different seeds."""
    workplace = make_workplace(tmp_path, **SECTIONS, launcher={"start_timeout_s": 200.0})
    endpoint = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
    endpoint += ["--rdzv-endpoint", f"127.0.0.1:{torchrun_port()['PET_MASTER_PORT']}"]
    with (
        running([*torchrun(*endpoint, "--rdzv-conf", "is_host=0"), "--set", "seed=7"], tmp_path, "second") as other,
        running(torchrun(*endpoint, "--rdzv-conf", "is_host=1"), tmp_path) as process,
    ):
        codes = process.wait(LONGEST_S), other.wait(LONGEST_S)
    err = (tmp_path / "agent.err").read_text() + (tmp_path / "second.err").read_text()
    assert 0 not in codes
    assert "the ranks must all have the same run and code, and differ in" in err
    assert re.search(r"spec: \w{12} on ranks \d-\d \(host .*\), \w{12} on ranks \d-\d \(host ", err), err
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
