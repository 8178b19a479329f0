"""Whether the plan orders layouts of a small model on this machine's CPU as measured steps do.

    trimaran calibrate --output chip.json
    python benchmarks/plan_cpu.py --chip chip.json
    python benchmarks/plan_cpu.py --chip chip.json --rounds 3 tp2 pp2

Prints for every layout the planned and the measured step, by the wall clock and in processor time: that of one rank, or
of all over the cores where it is more. Then, of the pairs whose measured steps are more than a tenth apart, how many
the plan has in the right order. Where other programs use the cores the wall clock says little; processor time leaves
out bubbles, on both sides.

The model: LLaMA-style, 4 layers, hidden 128, 4 heads, ffn 352, vocabulary 1024, seq 128, float32, global batch 32.
Every rank has one thread.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from rank_processes import RanksFailed, result_of_ranks

_APART = 1.1
MODEL = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 352, "vocab_size": 1024}
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"train.micro_batch_size": 8},
    "single-micro-1": {"train.micro_batch_size": 1},
    "dp2": {"parallel.dp": 2},
    "dp2-micro-1-zero3": {"parallel.dp": 2, "zero.stage": 3, "train.micro_batch_size": 1},
    "dp2-recompute": {"parallel.dp": 2, "train.recompute": "full"},
    "dp4-micro-8": {"parallel.dp": 4, "train.micro_batch_size": 8},
    "tp2": {"parallel.tp": 2},
    "tp2-micro-1": {"parallel.tp": 2, "train.micro_batch_size": 1},
    "tp4": {"parallel.tp": 4},
    "pp2": {"parallel.pp": 2},
    "pp4-micro-1": {"parallel.pp": 4, "train.micro_batch_size": 1},
    "tp2-pp2-dp2": {"parallel.tp": 2, "parallel.pp": 2, "parallel.dp": 2},
}
"""Fields beside those of `spec_of`."""


def spec_of(layout: str) -> Any:
    """Return the spec of a layout."""
    from trimaran.runtime.spec import parse_spec

    content: dict[str, dict[str, Any]] = {
        "model": dict(MODEL),
        "parallel": {},
        "zero": {"stage": 1},
        "data": {"tokenizer_vocab_size": MODEL["vocab_size"]},
        "optimizer": {"lr": 3e-4},
        "train": {"num_steps": 1000, "global_batch_size": 32, "micro_batch_size": 2, "seq_len": 128},
        "launcher": {"threads_per_rank": 1},
    }
    for field, value in LAYOUTS[layout].items():
        section, name = field.split(".")
        content[section][name] = value
    return parse_spec(content)


def run_here(layout: str, steps: int) -> None:
    """Measure as one of the ranks, and print the figures on rank 0."""
    import torch
    from throughput import measure, step_of_rank

    from trimaran.launchers.worker.process import exit_process

    spec = spec_of(layout)
    torch.set_num_threads(1)
    step, total, leave = step_of_rank(spec)
    figures = {**measure(step, steps, total), "ranks": spec.world_size}
    leave()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(figures))
    exit_process(0)


def run_apart(layout: str, steps: int) -> dict[str, float]:
    """Measure in fresh processes. Raises RanksFailed."""
    return result_of_ranks(__file__, [layout, "--steps", str(steps), "--here"], spec_of(layout).world_size, 1)


def step_of_cpu(row: Mapping[str, float], cores: int) -> float:
    """Return the processor time that a step waits for: that of a rank, or of all over the cores where it is more."""
    return max(row["cpu_seconds"] / row["ranks"], row["cpu_seconds"] / cores)


def planned(chip: Path, layouts: list[str]) -> dict[str, tuple[float, float]]:
    """Return by layout the planned seconds of a step, and the processor time that it waits for."""
    from trimaran.runtime.plan.calibrate.processor_step import processor_step
    from trimaran.runtime.plan.calibrate.record import read_machine

    machine = read_machine(chip)
    steps = {layout: processor_step(spec_of(layout), machine) for layout in layouts}
    return {
        layout: (
            step.seconds,
            step_of_cpu({"cpu_seconds": step.cpu_seconds, "ranks": spec_of(layout).world_size}, step.cores),
        )
        for layout, step in steps.items()
    }


def pairs_in_order(measured: Mapping[str, float], plan: Mapping[str, float]) -> tuple[int, int, list[str]]:
    """Return of the pairs that are apart how many the plan has in order, their number, and the others."""
    apart = [
        (fast, slow)
        for pair in combinations(measured, 2)
        for fast, slow in [sorted(pair, key=lambda name: measured[name])]
        if measured[slow] > _APART * measured[fast]
    ]
    wrong = [f"{fast} before {slow}" for fast, slow in apart if plan[fast] >= plan[slow]]
    return len(apart) - len(wrong), len(apart), wrong


def main() -> None:
    """Measure, plan and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", help=", ".join(LAYOUTS))
    parser.add_argument("--chip", type=Path, help="a calibration of this machine")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="keep the measurements in this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run_here(options.layouts[0], options.steps)
        return
    unknown = set(options.layouts) - set(LAYOUTS)
    if unknown:
        parser.error(f"unknown layouts {sorted(unknown)}; choose from {', '.join(LAYOUTS)}")
    if options.chip is None:
        parser.error("--chip FILE: give a calibration of this machine, which trimaran calibrate --output FILE makes")
    names, cores = options.layouts or list(LAYOUTS), len(os.sched_getaffinity(0))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            try:
                found[name].append(run_apart(name, options.steps))
            except RanksFailed as error:
                print(f"{name} failed:\n{error}", file=sys.stderr)
    wall = {name: statistics.median(each["seconds"] for each in rows) for name, rows in found.items() if rows}
    cpu = {name: statistics.median(step_of_cpu(row, cores) for row in rows) for name, rows in found.items() if rows}
    if options.json is not None:
        options.json.write_text(json.dumps({"wall": wall, "cpu": cpu}), encoding="utf-8")
    report(planned(options.chip, list(wall)), wall, cpu)


def report(plan: Mapping[str, tuple[float, float]], wall: Mapping[str, float], cpu: Mapping[str, float]) -> None:
    """Print the table and how many pairs are in order."""
    print(f"{'layout':20} {'planned s':>10} {'wall s':>8} {'planned cpu s':>14} {'cpu s':>8}")
    for name in sorted(wall, key=lambda name: cpu[name]):
        print(f"{name:20} {plan[name][0]:10.3f} {wall[name]:8.3f} {plan[name][1]:14.3f} {cpu[name]:8.3f}")
    for what, measured, index in (("wall clock", wall, 0), ("processor time", cpu, 1)):
        right, number, wrong = pairs_in_order(measured, {name: each[index] for name, each in plan.items()})
        share = f"{right / number:.0%}" if number else "none"
        print(f"{what}: {right} of {number} pairs in order ({share}); wrong: {'; '.join(wrong) or 'none'}")


if __name__ == "__main__":
    main()
