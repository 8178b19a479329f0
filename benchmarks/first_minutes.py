"""A newcomer's first minutes: a bare clone until it is installed, trains and has its report.

    python benchmarks/first_minutes.py                  the quickstart as it is
    python benchmarks/first_minutes.py --steps 20       cut to 20 steps

Seconds and CPU-seconds of `git clone`, of the environment that `make train` makes (pip without its cache), of `make
train` until the first step is in metrics.jsonl, until the first line that tells a loss, and until its end, which is the
report (no CPU-seconds: ranks are not processes that the command waits for). MB and packages are those of the
environment.
"""

import argparse
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).parent.parent
RUNTIME = ".venv/.trimaran-runtime"
"""The Makefile's target that `make train` waits for."""
POLL_S = 0.02


@dataclass(frozen=True)
class Cost:
    """Of one step: wall seconds, and CPU-seconds of its processes where they are known."""

    name: str
    seconds: float
    cpu_seconds: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=ROOT, help="what is cloned")
    parser.add_argument("--steps", type=int, help="of the quickstart; its own number where not given")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="first-minutes-") as folder:
        _print_clone(options.repository, Path(folder) / "clone", options.steps)


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
    """Run a command; return what it took.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is on this process's standard error.
    """
    began, cpu = time.monotonic(), _cpu_of_children()
    environment = {**os.environ, "PIP_NO_CACHE_DIR": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return Cost(name, time.monotonic() - began, _cpu_of_children() - cpu)


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
        if _has_step(metrics):
            seen["step"] = time.monotonic() - began
    code = running.wait()
    reader.join()
    if _has_step(metrics):  # written between the last look and the end
        seen.setdefault("step", time.monotonic() - began)
    if code or len(seen) < 2:
        raise SystemExit(f"make train ended with {code} and was seen at {sorted(seen)} alone:\n{''.join(lines)}")
    return [
        Cost("`make train` to its first step", seen["step"]),
        Cost("... to the first printed loss", seen["loss"]),
        Cost("... to its end, with the report", time.monotonic() - began),
    ]


def _has_step(metrics: Path) -> bool:
    """Return whether a step's row is there: before it come those of what else a run does."""
    return metrics.exists() and b'"loss"' in metrics.read_bytes()


if __name__ == "__main__":
    main()
