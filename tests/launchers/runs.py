"""Runs through the real command line, with a corpus and a model so small that the start is most of the time."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch
import yaml
from typer.testing import CliRunner

from tests import counting
from tests.launchers.forked import COMMAND_LINE, HUGGING_FACE, Forked, fork_server
from tests.launchers.ports import free_ports
from trimaran.launchers.cli.app import app
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.train.metrics import Row, read_metrics

TRIMARAN = [sys.executable, "-m", COMMAND_LINE]
TIMEOUT_S = 250.0  # of one command: five seconds on idle cores, far more where many others want them
LEAVE_S = 100.0  # for the ranks of a command that has ended: they leave within a second on idle cores
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, what it printed, and the processes and shared memory that it left behind."""

    code: int
    out: str
    err: str
    left: list[str]

    @property
    def last_line(self) -> str:
        """The last line that the user sees."""
        return self.err.strip().splitlines()[-1]


@dataclass(frozen=True)
class Workplace:
    """A folder with a spec file and a corpus; runs write to `run` in it."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def train(self, *overrides: str, environment: dict[str, str] | None = None) -> Outcome:
        """Run `trimaran train` to its end."""
        with self.start_training(*overrides, environment=environment) as command:
            return command.finish()

    @contextmanager
    def start_training(
        self, *overrides: str, environment: dict[str, str] | None = None, cold: str | None = None
    ) -> Iterator["Command"]:
        """Start `trimaran train` in a process group of its own, as a shell does."""
        arguments = ["train", "spec.yaml", *(part for override in overrides for part in ("--set", override))]
        with Command.start(self.folder, arguments, environment, cold) as command:
            yield command

    def rows(self) -> list[Row]:
        """The training rows of metrics.jsonl."""
        return [row for row in read_metrics(self.run / "metrics.jsonl") if "loss" in row]

    def saved_steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.checkpoints.iterdir())


class Command:
    """A running `trimaran`, its output in files, and what /dev/shm held before it."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes] | Forked", before: set[str]) -> None:
        self.folder, self.process, self._before = folder, process, before

    @staticmethod
    @contextmanager
    def start(
        folder: Path,
        arguments: list[str],
        environment: dict[str, str] | None = None,
        cold: str | None = None,
        kind: str = "-m",
    ) -> Iterator["Command"]:
        """Start `trimaran`, or with the kind "-c" the program text that is the first argument.

        Args:
            cold: why it starts in a new interpreter, as a user's does; else it is forked from the fork server.
        """
        if cold is None:
            fork_server()
        before, variables = shared_memory(), {**os.environ, **(environment or {})}
        process: subprocess.Popen[bytes] | Forked
        with new_file(folder / "out") as out, new_file(folder / "err") as err, Path(os.devnull).open() as nothing:
            if cold is None:
                descriptors = {0: nothing.fileno(), 1: out.fileno(), 2: err.fileno()}
                preload = HUGGING_FACE if arguments[0] in ("import", "export") else ()
                words = ["-m", COMMAND_LINE, *arguments] if kind == "-m" else [kind, *arguments]
                process = Forked(words, folder, descriptors, variables, preload=preload)
            else:
                counting.record("cold start", cold, 2 if arguments[0] == "train" else 1)  # train forks ranks from one
                process = subprocess.Popen(
                    [*TRIMARAN, *arguments],
                    cwd=folder,
                    stdin=nothing,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                    env=variables,
                )
        command = Command(folder, process, before)
        try:
            yield command
        finally:
            for each in [process.pid, *(rank.pid for rank in command.ranks())]:
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            process.wait()

    def ranks(self) -> list[psutil.Process]:
        """The rank processes, by rank."""
        return ranks_in(self.folder)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that the run does; fail if the run ends or takes too long."""
        deadline = time.monotonic() + TIMEOUT_S
        while not happened():
            assert self.process.poll() is None, f"trimaran ended early\n{self.printed()}"
            assert time.monotonic() < deadline, f"still waiting after {TIMEOUT_S} s\n{self.printed()}"
            time.sleep(0.05)

    def wait_for_steps(self, count: int) -> None:
        """Wait until this command has finished some steps."""
        self.wait_until(lambda: (self.folder / "out").read_text().count("\nstep ") + 1 > count)

    def printed(self) -> str:
        return (self.folder / "out").read_text() + (self.folder / "err").read_text()

    def finish(self, timeout_s: float = TIMEOUT_S) -> Outcome:
        """Wait for the end and look for what is left."""
        code = self.process.wait(timeout_s)
        return Outcome(code, (self.folder / "out").read_text(), (self.folder / "err").read_text(), self.left_behind())

    def left_behind(self, patience_s: float = LEAVE_S) -> list[str]:
        """Rank processes, and new names in /dev/shm, that are still there after some time.

        Names of other tests come and go meanwhile.
        """
        deadline = time.monotonic() + patience_s
        suspects = shared_memory() - self._before
        while True:
            left = [f"process {rank.pid}" for rank in self.ranks()] + sorted(suspects & shared_memory())
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)


def new_file(path: Path) -> BinaryIO:
    """Open a new file in the place of one that a killed command's last process (multiprocessing's) may still write."""
    path.unlink(missing_ok=True)
    return path.open("wb")


def ranks_in(folder: Path) -> list[psutil.Process]:
    """The rank processes that work in a folder, by rank."""
    found = {}
    for name in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError, psutil.Error):
            program, _, rank = name.read_text().strip().partition("-")
            if program == "trimaran" and rank.isdecimal() and os.readlink(name.with_name("cwd")) == str(folder):
                found[int(rank)] = psutil.Process(int(name.parent.name))
    return [found[rank] for rank in sorted(found)]


def shared_memory() -> set[str]:
    return {name for name in os.listdir(SHARED_MEMORY) if name.startswith("trimaran-")}


def trimaran(
    folder: Path, *arguments: str, timeout_s: float = TIMEOUT_S, environment: dict[str, str] | None = None
) -> Outcome:
    """Run any command to its end."""
    with Command.start(folder, list(arguments), environment) as command:
        return command.finish(timeout_s)


def trimaran_here(folder: Path, *arguments: str) -> Outcome:
    """Run a command that starts no process in this one: most of them take less than a fork does."""
    with chdir(folder):
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return Outcome(result.exit_code, result.stdout, result.stderr, [])


def run_script(
    folder: Path,
    script: Path,
    *arguments: str,
    preload: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run a file of Python to its end, forked."""
    fork_server()
    with new_file(folder / "out") as out, new_file(folder / "err") as err, Path(os.devnull).open() as nothing:
        descriptors = {0: nothing.fileno(), 1: out.fileno(), 2: err.fileno()}
        process = Forked(
            [str(script), *arguments], folder, descriptors, environment or dict(os.environ), preload=preload
        )
        code = process.wait(TIMEOUT_S)
    return Outcome(code, (folder / "out").read_text(), (folder / "err").read_text(), [])


def run_forked(
    command: Sequence[str | Path], env: dict[str, str] | None = None, timeout: float = TIMEOUT_S, **_: object
) -> Any:
    """As subprocess.run, for a command of this interpreter or `trimaran`, which is forked and forks its ranks."""
    fork_server()
    own, *rest = map(str, command)
    words = rest if own == sys.executable else ["-m", COMMAND_LINE, *rest]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, Path(os.devnull).open() as nothing:
        descriptors = {0: nothing.fileno(), 1: out.fileno(), 2: err.fileno()}
        code = Forked(words, Path.cwd(), descriptors, env or dict(os.environ), preload=HUGGING_FACE).wait(timeout)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def run_code(folder: Path, code: str, *arguments: str) -> Outcome:
    """Run a program text to its end, forked."""
    with Command.start(folder, [code, *arguments], kind="-c") as command:
        return command.finish()


def text_of(num_lines: int, seed: int = 0) -> str:
    """Return text with some repetition for a tokenizer to find."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 7))) for _ in range(200)]
    return "".join(" ".join(draw.choice(words) for _ in range(10)) + "\n" for _ in range(num_lines))


def make_workplace(folder: Path, **sections: dict[str, Any]) -> Workplace:
    """Write a corpus and a spec; `sections` change fields of it."""
    spec: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24},
        "parallel": {"tp": 2},
        "data": {"source": ["corpus.txt"], "cache_dir": "cache", "tokenizer_vocab_size": 270, "held_out_fraction": 0.2},
        "optimizer": {"lr": 3e-3},
        "train": {
            "num_steps": 60, "global_batch_size": 4, "micro_batch_size": 1, "seq_len": 16,
            "output_dir": str(folder / "run"), "eval_interval": 20, "eval_batches": 1,
        },
        "checkpoint": {"interval": 4},
        "launcher": {"device": "cpu", "threads_per_rank": 1, "timeout_s": 200},
    }  # fmt: skip
    for name, fields in sections.items():
        spec[name] = spec.get(name, {}) | fields
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    (folder / "corpus.txt").write_text(text_of(3000))
    return Workplace(folder)


def losses(workplace: Workplace) -> list[tuple[Any, Any, Any]]:
    """Step, loss and gradient norm of every training row; JSON keeps every bit of a double."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in workplace.rows()]


def tensors(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every stored tensor of a checkpoint, whole."""
    opened = Checkpoint.open(checkpoint)
    return {(name, key): opened.read_global(name, key) for name in opened.names() for key in opened.keys(name)}


def assert_same_bits(left: Path, right: Path) -> None:
    """Compare two checkpoints bit for bit."""
    ours, theirs = tensors(left), tensors(right)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8))]
    assert not different


def task_of(workplace: Workplace) -> dict[str, Any]:
    return dict(json.loads((workplace.run / "logs" / "task.json").read_text()))


def fault(folder: Path, code: str, rank: int = 1) -> dict[str, str]:
    """Return the environment in which one rank runs some code before its task."""
    place = folder / "fault"
    place.mkdir(parents=True)
    body = textwrap.indent(textwrap.dedent(code), "        ")
    (place / "sitecustomize.py").write_text(FAULT.format(rank=rank, body=body))
    return {"PYTHONPATH": str(place)}


# Ranks are forked from a process that has run this file too.
FAULT = """
import os
from trimaran.launchers.worker.process import Rank

keep_records = Rank.keep_records

def keep_records_and_run(self, *folders):
    keep_records(self, *folders)
    if self.number == {rank}:
{body}

Rank.keep_records = keep_records_and_run
"""


def torchrun_port() -> dict[str, str]:
    """Return the environment that gives torchrun a free port; by itself it takes 29500, which another test may have."""
    return {"PET_MASTER_PORT": str(free_ports(1))}


def hold_start(folder: Path) -> tuple[dict[str, str], Path]:
    """Return the environment in which rank 1 never gets beyond its start, and the file that it makes there."""
    reached = folder / "starting"
    code = f"""
        import time
        open({str(reached)!r}, "w").close()
        time.sleep(1000)
        """
    return fault(folder, code), reached


def hold_in_step(folder: Path) -> tuple[dict[str, str], Path]:
    """Return the environment in which rank 0 never ends its first step, and the file that it makes there."""
    reached = folder / "in the step"
    return fault(folder, LONG_STEP.format(reached=str(reached)), rank=0), reached


LONG_STEP = """
import time
from pathlib import Path
import trimaran.runtime.train.loop as loop
from trimaran.launchers.worker import entry

def lr_at(step, **options):
    entry._STEP_S = 5.0
    Path({reached!r}).touch()
    time.sleep(1000)

loop.lr_at = lr_at
"""


RAISE_AT_STEP_6 = """
import trimaran.runtime.train.loop as loop

real = loop.train_step

def train_step(train_context, *arguments, **options):
    if train_context.optimizer.num_steps == 5:
        raise KeyError("made to fail")
    return real(train_context, *arguments, **options)

loop.train_step = train_step
"""


class Hold:
    """Makes rank 0 wait before a step, and the others for it, until `release`, or until the rank is told to stop."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._reached = folder / "hold", folder / "reached"
        self._file.touch()
        self.environment = fault(
            folder, HOLD.format(step=step, hold=str(self._file), reached=str(self._reached)), rank=0
        )

    @property
    def reached(self) -> bool:
        return self._reached.exists()

    def release(self) -> None:
        self._file.unlink()


HOLD = """
import signal
import time
from pathlib import Path
import trimaran.runtime.train.loop as loop

real = loop.lr_at

def lr_at(step, **options):  # called at the start of every step
    if step == {step} and Path({hold!r}).exists():
        Path({reached!r}).touch()
        stop = signal.getsignal(signal.SIGTERM).__self__
        while Path({hold!r}).exists() and not stop.requested:
            time.sleep(0.02)
    return real(step, **options)

loop.lr_at = lr_at
"""
