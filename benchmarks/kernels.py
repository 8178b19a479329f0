"""What the Triton kernels give and how fast they are, on this machine's NVIDIA GPU.

    python benchmarks/kernels.py                             every op: compared with its reference, then timed; then the
    training step of a whole model python benchmarks/kernels.py --op attention --op decode  some of them
    python benchmarks/kernels.py --tune --op attention_forward   choose configurations, written to
    kernels/tuned/CHIP.json

Every op (for a model: all of them) is first compared with its torch reference in float64, and a second run of it must
give the same bits; one that differs is not timed, and the exit status is 1. Speed is that of the device alone
(CUDA events, cold second-level cache, median of 25). The tables go to kernels.md, the plot of attention to
attention.png in the folder --out. Without a GPU the exit status is 2, but for TRITON_INTERPRET=1 with --smoke, which
only shows that this benchmark's own code works.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import triton
from kernel_bench.cases import CASES, MEMORY_OPS
from kernel_bench.checks import run_checks
from kernel_bench.harness import Bench, Report
from kernel_bench.sections import attention_section, cross_entropy_section, decode_section, memory_section
from kernel_bench.tuning import TUNABLES, tune
from kernel_bench.whole_model import MODELS, model_section

from trimaran.kernels.launch import interpreting, why_not_triton

ROOT = Path(__file__).parents[1]
OPS = (*CASES, *MODELS)


def sections_of(ops: Sequence[str]) -> dict[str, Callable[[Bench], None]]:
    """Return what times these ops, by title."""
    memory = [op for op in ops if op in MEMORY_OPS]
    sections: dict[str, Callable[[Bench], None]] = {
        "attention": attention_section,
        "memory-bound ops": partial(memory_section, names=memory),
        "cross_entropy": cross_entropy_section,
        "decode": decode_section,
        **{name: partial(model_section, name=name) for name in MODELS},
    }
    return {
        title: section
        for title, section in sections.items()
        if title in ops or (memory and title == "memory-bound ops")
    }


def nvidia_smi(field: str, *options: str) -> str:
    """Return what nvidia-smi says of the first GPU it names."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", *options]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def state(device: torch.device) -> str:
    """Return the GPU's clocks, its power and what holds them down (bits as NVML names them; 1: idle)."""
    if device.type != "cuda":
        return "none"
    one = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "clocks_throttle_reasons.active")
    return ", ".join(f"{field} {nvidia_smi(field, one)}" for field in fields)


def header(device: torch.device) -> str:
    """Return what the figures depend on."""
    on_gpu = device.type == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "Triton's interpreter on a CPU",
        "driver": nvidia_smi("driver_version") if on_gpu else "none",
        "state before the first run": state(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python benchmarks/kernels.py {shlex.join(sys.argv[1:])}".strip(),
    }
    return "\n".join(["# Kernels", "", *(f"- {key}: {value}" for key, value in facts.items())])


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--op",
        action="append",
        metavar="NAME",
        help=f"only this; may be repeated: {', '.join(OPS)}; to tune: {', '.join(TUNABLES)}",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; the figures mean nothing")
    parser.add_argument(
        "--tune", action="store_true", help="choose the configurations of this chip instead of measuring"
    )
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="KEY",
        help="with --tune: only this key of the tables; may be repeated",
    )
    parser.add_argument(
        "--tuned-dir",
        type=Path,
        default=ROOT / "kernels" / "tuned",
        help="folder of the table that --tune reads and writes",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args()
    known = TUNABLES if arguments.tune else OPS
    unknown = set(arguments.op or ()) - set(known)
    if unknown:
        parser.error(f"unknown --op {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    arguments.op = [name for name in known if name in (arguments.op or known)]
    return arguments


def main() -> int:
    """Compare, measure or tune; return the exit status."""
    arguments = parse_arguments()
    on_cpu = arguments.smoke and interpreting()
    device = torch.device("cpu" if on_cpu else "cuda")
    reason = (
        None
        if on_cpu
        else "torch finds none"
        if not torch.cuda.is_available()
        else why_not_triton(device, torch.bfloat16)
    )
    if reason is not None:
        print(
            f"benchmarks/kernels.py needs an NVIDIA GPU: {reason}. To see that it runs: TRITON_INTERPRET=1 and --smoke",
            file=sys.stderr,
        )
        return 2
    bench = Bench(device, arguments.smoke, Report(arguments.out / ("tuning.md" if arguments.tune else "kernels.md")))
    bench.report.add(header(device))
    if arguments.tune:
        tune(bench, arguments.op, arguments.key, arguments.tuned_dir)
    else:
        has_model = any(op in MODELS for op in arguments.op)  # which is made of every op
        wrong = run_checks(bench, [op for op in CASES if has_model or op in arguments.op])
        timed = [op for op in arguments.op if op not in wrong and not (op in MODELS and wrong)]
        for title, section in sections_of(timed).items():
            bench.attempt(title, partial(section, bench))
        bench.failures += sorted(wrong)
        bench.report.add(f"State after the last run: {state(device)}")
    if bench.failures:
        bench.report.add("\n".join(["## Failures", "", *(f"- {failure}" for failure in bench.failures)]))
    return int(bool(bench.failures))


if __name__ == "__main__":
    sys.exit(main())
