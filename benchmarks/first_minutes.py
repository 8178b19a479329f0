"""A newcomer's first minutes: a bare clone until it is installed, trains and has its report; CPU of short commands.

    python benchmarks/first_minutes.py                          both tables
    python benchmarks/first_minutes.py clone --steps 20         the clone alone, the quickstart cut to 20 steps
    python benchmarks/first_minutes.py commands                 the commands alone, of this environment

`clone`: seconds and CPU-seconds of `git clone`, of the environment that `make train` makes (pip without its cache), of
`make train` until the first step is in metrics.jsonl, until the first line that tells a loss, and until its end, which
is the report (no CPU-seconds: ranks are not processes that the command waits for). MB and packages are those of the
environment. `commands`: the least CPU-seconds of several starts; a command that this version does not have is left out.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).parent.parent
RUNTIME = ".venv/.trimaran-runtime"
"""The Makefile's target that `make train` waits for."""
QUICKSTART = "examples/quickstart.yaml"
COMMANDS = (("--help",), ("check", QUICKSTART), ("fields",), ("doctor",))
POLL_S = 0.02


@dataclass(frozen=True)
class Cost:
    """Of one step: wall seconds, and CPU-seconds of its processes where they are known."""

    name: str
    seconds: float
    cpu_seconds: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the tables that are asked for."""
    options = _parser().parse_args(arguments)
    if options.part in ("all", "clone"):
        with tempfile.TemporaryDirectory(prefix="first-minutes-") as folder:
            _print_clone(options.repository, Path(folder) / "clone", options.steps)
    if options.part in ("all", "commands"):
        _print_commands(options.trimaran, options.rounds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("all", "clone", "commands"), default="all")
    parser.add_argument("--repository", type=Path, default=ROOT, help="what is cloned")
    parser.add_argument("--steps", type=int, help="of the quickstart; its own number where not given")
    parser.add_argument("--trimaran", type=Path, default=Path(sys.executable).parent / "trimaran")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def _print_clone(repository: Path, clone: Path, steps: int | None) -> None:
    costs = [
        _cost("git clone", ["git", "clone", "--quiet", str(repository), str(clone)]),
        _cost("install", ["make", "--silent", "-C", str(clone), RUNTIME]),
        *_train(clone, steps),
    ]
    print("| from a bare clone | seconds | CPU-seconds |\n|---|---|---|")
    for each in costs:
        cpu = "" if each.cpu_seconds is None else f"{each.cpu_seconds:.1f}"
        print(f"| {each.name} | {each.seconds:.1f} | {cpu} |")
    environment = clone / ".venv"
    packages = len(list(environment.glob("lib/python*/site-packages/*.dist-info")))
    size = sum(path.lstat().st_size for path in environment.rglob("*") if path.is_file())
    print(f"\nThe environment: {size / 1e6:.0f} MB, {packages} packages.\n")


def _cost(name: str, command: Sequence[str]) -> Cost:
    began = time.monotonic()
    cpu_seconds = _cpu_seconds_of(command)
    return Cost(name, time.monotonic() - began, cpu_seconds)


def _cpu_seconds_of(command: Sequence[str]) -> float:
    """Run a command; return the CPU-seconds of its processes.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is on this process's standard error.
    """
    began = _cpu_of_children()
    environment = {**os.environ, "PIP_NO_CACHE_DIR": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return _cpu_of_children() - began


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _train(clone: Path, steps: int | None) -> list[Cost]:
    """Run `make train`; return its seconds to the first step, to the first printed loss and to its end."""
    short = [] if steps is None else [f"ARGS=--set train.num_steps={steps} --set lr_schedule.warmup_steps=0"]
    began = time.monotonic()
    running = subprocess.Popen(
        ["make", "-C", str(clone), "train", *short], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen: dict[str, float] = {}
    lines: list[str] = []

    def read() -> None:
        assert running.stdout is not None
        with running.stdout as output:
            for line in output:
                lines.append(line)
                if "loss" in line:
                    seen.setdefault("loss", time.monotonic() - began)

    reader = Thread(target=read)
    reader.start()
    metrics = clone / "runs" / "quickstart" / "metrics.jsonl"
    while "step" not in seen and running.poll() is None:
        time.sleep(POLL_S)
        if metrics.exists() and metrics.stat().st_size:
            seen["step"] = time.monotonic() - began
    code = running.wait()
    reader.join()
    if metrics.exists():  # written between the last look and the end
        seen.setdefault("step", time.monotonic() - began)
    if code or len(seen) < 2:
        raise SystemExit(f"make train ended with {code} and was seen at {sorted(seen)} alone:\n{''.join(lines)}")
    return [
        Cost("`make train` to its first step", seen["step"]),
        Cost("... to the first printed loss", seen["loss"]),
        Cost("... to its end, with the report", time.monotonic() - began),
    ]


def _print_commands(trimaran: Path, rounds: int) -> None:
    known = subprocess.run([str(trimaran), "--help"], capture_output=True, text=True, check=True).stdout
    print("| command | CPU-seconds |\n|---|---|")
    for words in COMMANDS:
        if words == ("--help",) or re.search(rf"^\W*{words[0]}\s", known, flags=re.MULTILINE):
            least = min(_cpu_seconds_of([str(trimaran), *words]) for _ in range(rounds))
            print(f"| `trimaran {' '.join(words)}` | {least:.2f} |")


if __name__ == "__main__":
    main()
