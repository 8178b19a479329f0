"""The comparison of every op with its reference, which comes before any clock."""

import math
import os
import sys
from collections.abc import Sequence
from functools import partial

import torch
from compile_kernels import faults
from kernel_bench.cases import CASES
from kernel_bench.harness import TOLERANCES, Bench, Draw, call, check, on_all_cores, outcome, short

from trimaran.kernels.ahead_of_time import SHARED_LIMIT_BYTES, compiling_for
from trimaran.kernels.dispatch import TRITON

CompileJob = tuple[str, int, torch.dtype, int]
"""(op, number of the case, dtype, compute capability times ten)."""


def compile_case(job: CompileJob) -> list[str]:
    """Compile a case's kernels, which leaves them in Triton's cache on disk; return what is wrong with them."""
    op, index, dtype, arch = job
    with compiling_for(arch) as kernels:
        error = outcome(lambda: call(CASES[op](False)[index], TRITON, Draw(torch.device("meta"), dtype)))
    if isinstance(error, Exception):
        return [short(error)]
    return [f"{kernel.name} {kernel.constants}: {fault}" for kernel in kernels for fault in faults(kernel)]


SMOKE_CASES = 1
"""Cases of an op that a smoke run compares; tests/kernels/interpreted compares far more."""


def run_checks(bench: Bench, ops: Sequence[str]) -> set[str]:
    """Compare, report and return the ops that failed."""
    cases = {
        op: [
            (case, dtype)
            for case in CASES[op](bench.smoke)[: SMOKE_CASES if bench.smoke else None]
            for dtype in bench.check_dtypes
            if dtype in case.dtypes
        ]
        for op in ops
    }
    arch = architecture(bench.device)
    if arch in SHARED_LIMIT_BYTES and not bench.smoke and len(os.sched_getaffinity(0)) > 1:
        on_all_cores(
            compile_case,
            [(op, i, dtype, arch) for op in ops for i, case in enumerate(CASES[op](False)) for dtype in case.dtypes],
        )
    rows, failures = [], []
    for op in ops:
        for dtype in bench.check_dtypes:
            results = []
            for case in (case for case, of in cases[op] if of == dtype):
                found = outcome(partial(check, case, dtype, bench.device))
                error, tolerance = (math.inf, TOLERANCES[dtype]) if isinstance(found, Exception) else found
                if error > tolerance:
                    why = (
                        short(found)
                        if isinstance(found, Exception)
                        else f"error {error:.2e} over the tolerance {tolerance:.0e}"
                    )
                    failures.append((op, f"{op}, {case.label}, {dtype}: {why}"))
                results.append((error / tolerance, error, tolerance, case.label))
            if results:
                _, error, tolerance, label = max(results)
                result = "equal" if error <= tolerance else "**wrong**"
                name = str(dtype).removeprefix("torch.")
                rows.append([op, name, str(len(results)), f"{error:.1e}", f"{tolerance:.0e}", label, result])
    header = ("op", "dtype", "cases", "worst error", "tolerance", "of case", "result")
    note = (
        "Triton against the torch reference in float64 on the same inputs: outputs and gradients, "
        "error over the largest value."
    )
    bench.report.table("Correctness", header, rows, note, *(text for _, text in failures))
    for _, text in failures:
        print(text, file=sys.stderr)
    return {op for op, _ in failures}


def architecture(device: torch.device) -> int:
    """Return the compute capability times ten, 0 off a GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
