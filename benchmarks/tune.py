"""trimaran tune: random SIGKILLs over a study, a ladder against its held-out rung, and muP's best rate over widths.

    python benchmarks/tune.py kills --count 200      kill tuner, worker or rank at random moments; compare the tables
    python benchmarks/tune.py ladder                 climb examples/ladder.yaml; the held-out rung beside its prediction
    python benchmarks/tune.py widths                 the best rate at widths 64 to 512, muP beside one rate for all
    python benchmarks/tune.py overhead               a search beside its trials' own commands; the time between trials
    python benchmarks/tune.py search                 rate, decay and warmup by TPE, beside a grid of 60 points

Each prints a line of JSON at its end. overhead and search need a machine on which nothing else runs.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import yaml

from trimaran.runtime.train.metrics import read_metrics
from trimaran.runtime.tune.study import STUDY, Found, Study, Trial

ROOT: Final = Path(__file__).parents[1]
_END_S: Final = 600.0
_POLL_S: Final = 0.02
_TINY: Final[dict[str, Any]] = {
    "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24},
    "data": {"source": ["corpus.txt"], "cache_dir": "cache", "tokenizer_vocab_size": 270, "held_out_fraction": 0.2},
    "optimizer": {"lr": 3e-3},
    "train": {
        "num_steps": 60,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "seq_len": 16,
        "eval_interval": 10,
        "eval_batches": 1,
    },
    "checkpoint": {"interval": 5},
    "logging": {"tensorboard": False},
    "launcher": {"device": "cpu", "threads_per_rank": 1, "timeout_s": 60},
}


def write_study(folder: Path, base: dict[str, Any], tune: dict[str, Any]) -> Path:
    """Write a base spec and a search over it into a folder; return the study's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "tune.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "output_dir": "study", **tune}))
    return folder / "study"


def rows_of_table(found: Found) -> list[dict[str, Any]]:
    """Return what must be the same after any kills: every trial with its curve and figures, not how often it began."""
    return [trial.model_dump(mode="json", exclude={"attempts", "error"}) for trial in found.trials]


def losses_of(study: Path, trial: Trial) -> list[Any]:
    """Return step, loss and gradient norm of every step of a trial, up to its end."""
    rows = read_metrics(study / trial.folder / "metrics.jsonl")
    last = max((point.step for point in trial.curve), default=0)
    return [
        (row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row and (row["step"] or 0) <= last
    ]


def processes_in(folder: Path) -> dict[str, list[int]]:
    """Return the processes of a study that run in a folder, by kind: worker and rank."""
    found: dict[str, list[int]] = {"worker": [], "rank": []}
    for name in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            program = name.read_text().strip()
            kind = "worker" if program == "tune-worker" else "rank" if program.startswith("trimaran-") else ""
            if kind and os.readlink(name.with_name("cwd")) == str(folder):
                found[kind].append(int(name.parent.name))
    return found


def kill_and_finish(
    start: Callable[[], Any], folder: Path, draw: random.Random, kills: int, most_pause_s: float
) -> dict[str, int]:
    """Run the command of a study to its end, with SIGKILLs of random processes at random moments.

    Args:
        start: starts the command, and returns its process.

    Returns:
        How many of each kind were killed.
    """
    killed = {"tuner": 0, "worker": 0, "rank": 0}
    process = start()
    while process.poll() is None:
        if sum(killed.values()) >= kills:
            process.wait(_END_S)
            break
        kind = draw.choice(list(killed))
        while kind != "tuner" and process.poll() is None and not processes_in(folder)[kind]:
            time.sleep(_POLL_S)
        time.sleep(draw.uniform(0.0, most_pause_s))
        pids = [process.pid] if kind == "tuner" else processes_in(folder)[kind]
        if not pids or process.poll() is not None:
            continue
        with suppress(ProcessLookupError):
            os.kill(draw.choice(pids), signal.SIGKILL)
            killed[kind] += 1
        if kind == "tuner":
            process.wait(_END_S)
            process = start()
    if process.returncode:
        raise RuntimeError(f"the command ended with code {process.returncode} in {folder}")
    return killed


def _command(folder: Path) -> Callable[[], "subprocess.Popen[bytes]"]:
    def start() -> "subprocess.Popen[bytes]":
        words = [sys.executable, "-P", "-m", "trimaran.launchers.cli.app", "tune", "tune.yaml"]
        with (folder / "output").open("ab") as output:
            return subprocess.Popen(words, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    return start


def _corpus(folder: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 7))) for _ in range(200)]
    lines = (" ".join(draw.choice(words) for _ in range(10)) + "\n" for _ in range(3000))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("".join(lines))


KILLED_STUDY: Final[dict[str, Any]] = {
    "space": {
        "optimizer.lr": {"low": 1e-4, "high": 0.3, "log": True},
        "optimizer.weight_decay": [0.0, 0.1],
        "model.num_layers, model.hidden_size": [[1, 16], [2, 16], [2, 24]],
        "model.num_heads": [2, 5],
    },
    "search": {"sampler": "tpe", "trials": 16, "seed": 3},
    "prune": {"method": "median", "first_step": 20},
    "max_retries": 1000,
}


def kills(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the table of an unbroken study with those of studies under random SIGKILLs."""
    folder, draw = Path(options.folder), random.Random(options.seed)
    _corpus(folder / "unbroken")
    unbroken = write_study(folder / "unbroken", _TINY, KILLED_STUDY)
    kill_and_finish(_command(folder / "unbroken"), folder / "unbroken", draw, 0, 1.0)
    expected = Study(unbroken, {}).read()
    total = {"tuner": 0, "worker": 0, "rank": 0}
    number = 0
    while sum(total.values()) < options.count:
        place = folder / f"killed-{number}"
        _corpus(place)
        study = write_study(place, _TINY, KILLED_STUDY)
        killed = kill_and_finish(_command(place), place, draw, options.count - sum(total.values()), options.pause_s)
        total = {kind: total[kind] + killed[kind] for kind in total}
        found = Study(study, {}).read()
        if rows_of_table(found) != rows_of_table(expected):
            raise SystemExit(f"the table of {study} differs from that of {unbroken}")
        for trial in expected.trials:
            if trial.state != "invalid" and losses_of(study, trial) != losses_of(unbroken, trial):
                raise SystemExit(f"trial {trial.number} of {study} differs from that of {unbroken}")
        print(f"study {number}: {killed}, the same table", flush=True)
        number += 1
    states = [trial.state for trial in expected.trials]
    return {"kills": total, "studies": number, "trials": {state: states.count(state) for state in sorted(set(states))}}


MOST_LOSS_ERROR: Final = 0.015
MOST_RATE_FACTOR: Final = 1.5
MOST_MUP_SHIFT: Final = 2.0


def ladder(options: argparse.Namespace) -> dict[str, Any]:
    """Climb a ladder and hold its largest rung against what the others predict of it."""
    folder = Path(options.folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    started = time.monotonic()
    _run(folder, "tune", options.search)
    seconds = time.monotonic() - started
    output_dir = yaml.safe_load((folder / options.search).read_text()).get("output_dir", "runs/ladder")
    found = json.loads((folder / output_dir / "ladder.json").read_text())
    if options.keep:
        shutil.copytree(folder / output_dir, options.keep, ignore=shutil.ignore_patterns("checkpoints"))
    error = max(abs(each["error"]) for each in found["held_out"])
    factor = max(each["factor"] for each in found["held_out_optima"])
    sizes = [each["parameters"] for each in found["rungs"]]
    return {
        "rungs": [{name: each[name] for name in ("parameters", "tokens", "loss", "best")} for each in found["rungs"]],
        "span": sizes[-1] / sizes[0],
        "law": found["loss_law"],
        "held_out": found["held_out"],
        "held_out_optima": found["held_out_optima"],
        "loss_error": error,
        "rate_factor": factor,
        "holds": error <= MOST_LOSS_ERROR and factor <= MOST_RATE_FACTOR,
        "seconds": round(seconds),
    }


def widths(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the shift of the best rate over widths under muP with that of one deviation and rate for all."""
    changes = {
        "model.init": "mup", "model.mup_base_width": 64, "model.num_layers": 2, "data.tokenizer_vocab_size": 512,
        "train.num_steps": options.steps, "train.global_batch_size": 16, "train.micro_batch_size": 16,
        "train.seq_len": 64, "lr_schedule.warmup_steps": max(1, options.steps // 10), "launcher.threads_per_rank": 2,
        "parallel.tp": 1, "parallel.pp": 1, "parallel.dp": 1, "zero.stage": 1, "train.eval_batches": 8,
    }  # fmt: skip
    words = ["coordinate-check", str(ROOT / "examples" / "quickstart.yaml"), "--widths", options.widths]
    words += ["--rates", options.rates, *(each for name in changes for each in ("--set", f"{name}={changes[name]}"))]
    told = _run(Path(options.folder), *words)
    found = {
        init: {"first": float(first), "last": float(last), "shift": float(shift)}
        for init, first, last, shift in re.findall(
            r"^(\w+): the best rate is (\S+) at width \d+, (\S+) at width \d+: times (\S+)$", told, re.MULTILINE
        )
    }
    shift = found["mup"]["shift"]
    holds = 1 / MOST_MUP_SHIFT <= shift <= MOST_MUP_SHIFT and "edge" not in told.partition("normal: the best")[0]
    return {"widths": options.widths, "rates": options.rates, **found, "holds": holds}


def _run(folder: Path, *words: str) -> str:
    """Run a command of trimaran to its end and return what it prints; its progress goes to stderr as it comes."""
    command = [sys.executable, "-P", "-m", "trimaran.launchers.cli.app", *words]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, file=sys.stderr)
    return done.stdout


def _measured(base: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Return a base spec with a length, its warmup and evaluations in proportion; the rest as in the file."""
    base["train"] |= {"num_steps": num_steps, "eval_interval": max(1, num_steps // 5)}
    base["lr_schedule"] = base.get("lr_schedule", {}) | {"warmup_steps": num_steps // 10}
    base["train"].pop("output_dir", None)
    base["parallel"] = {"tp": 1, "pp": 1, "dp": 1}
    base.get("zero", {}).pop("shard_size", None)
    base["checkpoint"] = {"interval": 0}
    base["data"]["cache_dir"] = str(ROOT / ".cache" / "tune-benchmark")
    return base


def _finish(folder: Path, base: dict[str, Any], tune: dict[str, Any]) -> tuple[Study, float]:
    """Run a search to its end; return its study and the seconds."""
    study = write_study(folder, base, tune)
    begun = time.monotonic()
    process = _command(folder)()
    if process.wait():
        raise SystemExit((folder / "output").read_text()[-4000:])
    return Study(study, {}), time.monotonic() - begun


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Compare a search with its trials' own commands, one after the other, and measure the time between two trials."""
    folder = Path(options.folder)
    base = _measured(yaml.safe_load(Path(options.base).read_text()), options.steps)
    tune = {"space": {"seed": list(range(1, options.trials + 1))}, "search": {"sampler": "grid"}}
    _finish(folder / "data", base, {"space": {"seed": [0]}, "search": {"sampler": "grid"}})  # prepares the text
    study, of_search = _finish(folder / "search", base, tune)
    begun = time.monotonic()
    for trial in study.read().trials:
        words = ["train", str(study.run_folder(trial) / "spec.yaml"), "--set", f"train.output_dir=run-{trial.number}"]
        command = [sys.executable, "-P", "-m", "trimaran.launchers.cli.app", *words]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    of_commands = time.monotonic() - begun
    lines = [json.loads(line) for line in (study.folder / STUDY).read_text().splitlines()]
    ended = {line["trial"]["number"]: line["time"] for line in lines if "trial" in line}
    gaps = [
        (study.run_folder(trial) / "machine.json").stat().st_mtime - ended[trial.number - 1]
        for trial in study.read().trials[1:]
    ]
    return {
        "search_s": round(of_search, 2),
        "commands_s": round(of_commands, 2),
        "overhead": round(of_search / of_commands - 1, 4),
        "to_next_trial_s": round(statistics.median(gaps), 3),
    }


def search(options: argparse.Namespace) -> dict[str, Any]:
    """Compare TPE of several seeds with a grid of 60 points over rate, decay and warmup: the points that it has too."""
    folder = Path(options.keep or options.folder)
    base = _measured(yaml.safe_load(Path(options.base).read_text()), options.steps)
    warmups = [round(share * options.steps) for share in (0.0, 0.05, 0.1, 0.2)]
    grid = {
        "optimizer.lr": {"low": 1e-3, "high": 1.6e-2, "log": True, "step": 2},
        "optimizer.weight_decay": [0.0, 0.1, 0.3],
        "lr_schedule.warmup_steps": warmups,
    }
    whole = _finish(folder / "grid", base, {"space": grid, "search": {"sampler": "grid"}})[0].read()
    best = min(trial.objectives[0] for trial in whole.trials if trial.objectives is not None)
    tokens = sum(trial.tokens for trial in whole.trials)
    found = []
    for seed in range(options.seeds):
        tune = {
            "space": grid,
            "search": {"sampler": "tpe", "trials": 40, "seed": seed},
            "prune": {"method": "median", "first_step": max(1, options.steps // 5)},
        }
        trials = _finish(folder / f"tpe-{seed}", base, tune)[0].read().trials
        loss = min(trial.objectives[0] for trial in trials if trial.state == "complete" and trial.objectives)
        share = sum(trial.tokens for trial in trials) / tokens
        found.append({"seed": seed, "above_the_grid": round(loss - best, 4), "share_of_tokens": round(share, 3)})
        print(json.dumps(found[-1]), flush=True)
    return {"grid": len(whole.trials), "best_of_grid": round(best, 4), "tpe": found}


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    killing = commands.add_parser("kills")
    killing.add_argument("--count", type=int, default=200)
    killing.add_argument("--seed", type=int, default=0)
    killing.add_argument("--pause-s", type=float, default=6.0)
    killing.set_defaults(run=kills)
    climbing = commands.add_parser("ladder")
    climbing.add_argument("--search", default="examples/ladder.yaml")
    climbing.add_argument("--keep", help="a folder to be made, for the study without its checkpoints")
    climbing.set_defaults(run=ladder)
    widening = commands.add_parser("widths")
    widening.add_argument("--widths", default="64,128,256,512")
    widening.add_argument("--rates", default="5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2,3.2e-2,6.4e-2")
    widening.add_argument("--steps", type=int, default=60)
    widening.set_defaults(run=widths)
    for name, run in (("overhead", overhead), ("search", search)):
        measuring = commands.add_parser(name)
        measuring.add_argument("--base", default=str(ROOT / "examples" / "quickstart.yaml"))
        measuring.add_argument("--steps", type=int, default=100)
        measuring.add_argument("--trials", type=int, default=8)
        measuring.add_argument("--seeds", type=int, default=3)
        measuring.add_argument("--keep", help="of search: a folder for its studies, to go on in after a stop")
        measuring.set_defaults(run=run)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trimaran-tune-") as folder:
        options.folder = folder
        print(json.dumps(options.run(options)))


if __name__ == "__main__":
    main()
