"""Runs that are killed or asked to stop, and resumed: they end exactly where the run without a stop ended."""

import os
import runpy
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.launchers.conftest import SECTIONS
from tests.launchers.runs import (
    Command,
    Hold,
    Outcome,
    Workplace,
    assert_same_bits,
    hold_in_step,
    hold_start,
    losses,
    make_workplace,
    trimaran,
)
from trimaran.launchers.local.fork_server import interrupts_ignored
from trimaran.runtime.checkpoint.folder import latest, step_of
from trimaran.runtime.folder_lock import FolderLock, holder_of
from trimaran.runtime.train.metrics import read_metrics

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class History:
    """A run that was killed, interrupted, terminated and then finished: how each command ended, and at which step."""

    workplace: Workplace
    killed_after: int
    interrupted: Outcome
    interrupted_at: int
    terminated: Outcome
    terminated_at: int
    ended: Outcome


def last_saved(workplace: Workplace) -> int:
    path = latest(workplace.checkpoints)
    assert path is not None
    return step_of(path) or 0


def kill_everything(command: Command) -> None:
    """SIGKILL to the launcher and all that it started, as a machine that goes down."""
    everything = [psutil.Process(command.process.pid), *command.ranks()]
    for process in everything:  # stopped first, so that none notices the death of another, saves and exits
        process.suspend()
    for process in everything:
        process.kill()
    command.process.wait()


def interrupt_and_resume(workplace: Workplace) -> History:
    """Stop the run at steps 6, 10 and 14, each time while rank 0 is held there."""
    hold = Hold(workplace.folder / "first", 6)
    with workplace.start_training(environment=hold.environment) as command:
        command.wait_until(lambda: hold.reached)
        kill_everything(command)
        assert command.left_behind() == []
    killed_after = last_saved(workplace)

    hold = Hold(workplace.folder / "second", 10)
    with workplace.start_training(environment=hold.environment, cold="Ctrl-C reaches every process") as command:
        command.wait_until(lambda: hold.reached)
        os.killpg(command.process.pid, signal.SIGINT)  # Ctrl-C: the terminal signals the whole foreground group
        interrupted = command.finish()
    interrupted_at = last_saved(workplace)

    hold = Hold(workplace.folder / "third", 14)
    with workplace.start_training(environment=hold.environment) as command:
        command.wait_until(lambda: hold.reached)
        command.process.terminate()
        terminated = command.finish()
    terminated_at = last_saved(workplace)
    return History(workplace, killed_after, interrupted, interrupted_at, terminated, terminated_at, workplace.train())


@pytest.fixture(scope="module")
def pair(finished: tuple[Workplace, Outcome], tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, History]:
    """The run without a stop, and the same run with three; test_resume_layouts.py compares the bits in bfloat16."""
    return finished[0], interrupt_and_resume(make_workplace(tmp_path_factory.mktemp("stopped"), **SECTIONS))


def test_the_run_was_really_stopped_three_times(pair: tuple[Workplace, History]) -> None:
    unbroken, history = pair
    assert [history.killed_after, history.interrupted_at, history.terminated_at] == [4, 11, 15]
    assert unbroken.rows()[-1]["step"] > 15


def test_resumed_losses_equal_the_unbroken_ones_bit_for_bit(pair: tuple[Workplace, History]) -> None:
    unbroken, history = pair
    assert history.ended.code == 0, history.ended.err
    assert losses(history.workplace) == losses(unbroken)
    held_out = [
        [row for row in read_metrics(each.run / "metrics.jsonl") if "held_out_loss" in row]
        for each in (unbroken, history.workplace)
    ]
    assert held_out[0] == held_out[1]
    assert held_out[0]


def test_resumed_weights_and_moments_equal_the_unbroken_ones_bit_for_bit(pair: tuple[Workplace, History]) -> None:
    unbroken, history = pair
    step = f"step-{unbroken.rows()[-1]['step']:08d}"
    assert_same_bits(unbroken.checkpoints / step, history.workplace.checkpoints / step)
    assert (unbroken.run / "sample.txt").read_text() == (history.workplace.run / "sample.txt").read_text()


def test_an_interrupted_run_saves_and_says_so_in_its_last_line(pair: tuple[Workplace, History]) -> None:
    _, history = pair
    for outcome, name, code, step in (
        (history.interrupted, "SIGINT", 130, history.interrupted_at),
        (history.terminated, "SIGTERM", 143, history.terminated_at),
    ):
        assert outcome.code == code, outcome.err
        assert outcome.left == []
        assert "Traceback" not in outcome.err + outcome.out
        assert outcome.last_line.startswith(f"stopped by {name}; step {step} is saved in ")
        assert outcome.last_line.endswith(f"step-{step:08d}, and the same command resumes there")


def test_a_signal_is_answered_by_what_the_run_waits_for(pair: tuple[Workplace, History]) -> None:
    _, history = pair
    waits = "the run finishes step 11, or one more, saves and ends; press Ctrl-C again to end it at once"
    assert f"SIGINT: {waits}" in history.interrupted.err
    assert "SIGTERM: the run finishes step 15, or one more, saves and ends\n" in history.terminated.err
    assert "saving step 11\n" in history.interrupted.out
    assert "saving step" not in history.ended.out


def test_ctrl_c_is_answered_in_a_long_step_and_a_second_one_ends_the_run_at_once(tmp_path: Path) -> None:
    workplace, (environment, reached) = make_workplace(tmp_path), hold_in_step(tmp_path)
    with workplace.start_training(environment=environment) as command:
        command.wait_until(reached.exists)
        os.kill(command.process.pid, signal.SIGINT)
        command.wait_until(lambda: "SIGINT: the run finishes step 1" in command.printed())
        while (
            "Ctrl-C again: the ranks end" not in (tmp_path / "err").read_text()
        ):  # one that comes too soon counts as the first
            os.kill(command.process.pid, signal.SIGINT)
            time.sleep(0.05)
        outcome = command.finish()
    assert outcome.code == 130
    assert outcome.left == []
    assert outcome.last_line == "stopped by SIGINT; nothing is saved yet, and the same command starts anew"


def test_a_stopped_run_can_be_generated_from_and_has_a_report(pair: tuple[Workplace, History]) -> None:
    _, history = pair
    assert (history.workplace.run / "report.html").exists()
    assert trimaran(history.workplace.folder, "generate", "run", "--max-new-tokens", "2").code == 0


def test_ranks_whose_launcher_was_killed_save_and_leave(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, checkpoint={"interval": 0}, train={"num_steps": 2000, "eval_interval": 0})
    with workplace.start_training() as command:
        command.wait_for_steps(2)
        command.process.kill()
        command.process.wait()
        assert command.left_behind() == []
    (saved,) = workplace.saved_steps()
    assert 2 <= saved < 2000
    assert workplace.rows()[-1]["step"] == saved


def test_ranks_in_a_long_step_leave_soon_after_their_launcher_and_lock_the_run_until_then(tmp_path: Path) -> None:
    workplace, (environment, reached) = make_workplace(tmp_path), hold_in_step(tmp_path)
    with workplace.start_training(environment=environment) as command:
        command.wait_until(lambda: reached.exists() and len(command.ranks()) == 2)
        first = command.ranks()[0].pid
        command.process.kill()
        command.process.wait()
        held = [holder_of(workplace.run)]
        while command.ranks():
            held.append(holder_of(workplace.run))
            time.sleep(0.02)
        assert command.left_behind() == []
    assert first in [holder.pid for holder in held if holder is not None]
    assert not workplace.checkpoints.exists()
    FolderLock.of_run(workplace.run, "trimaran train", {}).release()


def test_ranks_that_are_still_starting_leave_with_their_launcher(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    environment, reached = hold_start(tmp_path)
    with workplace.start_training(environment=environment) as command:
        command.wait_until(lambda: reached.exists() and len(command.ranks()) == 2)
        command.process.kill()
        command.process.wait()
        assert command.left_behind() == []
    assert not workplace.checkpoints.exists()


def test_a_signal_while_the_ranks_start_leaves_nothing_and_says_that_nothing_is_saved(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    environment, reached = hold_start(tmp_path)
    with workplace.start_training(environment=environment) as command:
        command.wait_until(reached.exists)
        command.process.terminate()
        outcome = command.finish()
    assert outcome.code == 143
    assert outcome.left == []
    assert outcome.last_line == "stopped by SIGTERM; nothing is saved yet, and the same command starts anew"
    assert "Traceback" not in outcome.err


def test_a_signal_to_the_ranks_alone_stops_the_run_too(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path, train={"num_steps": 2000, "eval_interval": 0})
    with workplace.start_training() as command:
        command.wait_for_steps(2)
        command.ranks()[1].terminate()
        outcome = command.finish()
    assert outcome.code == 143
    assert outcome.left == []
    assert outcome.last_line.startswith(f"stopped by SIGTERM; step {last_saved(workplace)} is saved in ")


def test_what_ranks_are_forked_from_ignores_ctrl_c_while_it_imports_torch() -> None:
    """A terminal sends Ctrl-C to it too: an import that is interrupted would end with a traceback."""
    usual = signal.getsignal(signal.SIGINT)
    with interrupts_ignored():
        done = subprocess.run(["sh", "-c", "kill -INT $$; echo goes on"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "goes on\n")
    assert signal.getsignal(signal.SIGINT) is usual
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        runpy.run_module("trimaran.launchers.local.preload")  # its last step is for the server's children
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, ignored)
