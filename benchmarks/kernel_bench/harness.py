"""What every part of the benchmark uses: random inputs, comparison, clock, report, a process a core."""

import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from trimaran.kernels.dispatch import TORCH, TRITON, KernelSet
from trimaran.kernels.launch import interpreting
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext, new_parameter

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error over the largest value: some tens of roundings of the dtype (2^-24, 2^-11, 2^-8).

The tests in tests/kernels/interpreted have the same.
"""
WARM_UP_SECONDS, RUNS = 0.1, 25
_SLEEP_HERTZ = 2e9  # about the clock that torch.cuda._sleep counts
_MOST_DELAY_SECONDS = 0.02
Run = Callable[..., Any]
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class Draw:
    """Random tensors of one call: the same numbers in every dtype, rounded to `rounded` before they become `dtype`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rounded: torch.dtype | None = None) -> None:
        self.device, self.dtype, self._rounded = device, dtype, rounded or dtype
        self._generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(1)

    def __call__(self, *shape: int, std: float = 1.0, grad: bool = True) -> Tensor:
        """Return normal numbers of that deviation."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device=self.device, requires_grad=grad)
        x = torch.randn(shape, generator=self._generator, device=self.device).mul_(std)
        return x.to(self._rounded).to(self.dtype).requires_grad_(grad)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return whole numbers in [low, high)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randint(low, high, shape, generator=self._generator, device=self.device).to(dtype)

    def permutation(self, length: int) -> Tensor:
        """Return the numbers below `length` in random order, int32."""
        if self.device.type == "meta":
            return torch.empty(length, dtype=torch.int32, device=self.device)
        return torch.randperm(length, generator=self._generator, device=self.device).to(torch.int32)

    def parameter(self, rows: int, cols: int, std: float) -> Tensor:
        """Return a parameter [rows, cols] that could be cut over tp, as layers make it."""
        values = self(rows, cols, std=std, grad=False)
        parameter = new_parameter((rows, cols), placement(values, TORCH), dim=0)
        parameter.data.copy_(values)
        return parameter


def placement(like: Tensor, kernels: KernelSet) -> LayerContext:
    """Return the placement of one rank alone, for the dtype and device of `like`."""
    return LayerContext(single("tp"), False, like.dtype, like.device, kernels)


@dataclass(frozen=True)
class Case:
    """A call that both implementations can make: `run(kernels, *make(draw))` returns one tensor or several.

    Args:
        dtypes: in which it may be called.
        deterministic: whether the Triton op must give the same bits every time.
    """

    label: str
    make: Callable[[Draw], Sequence[Tensor]]
    run: Run
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)
    deterministic: bool = True


def tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return what an op gave, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def call(case: Case, kernels: KernelSet, draw: Draw) -> list[Tensor]:
    """Return the outputs of a case and the gradients of its inputs under random output gradients."""
    inputs = case.make(draw)
    outputs = tensors(case.run(kernels, *inputs))
    pairs = [(out, draw(*out.shape, grad=False).to(out.dtype)) for out in outputs if out.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs]) if pairs else ()
    return [*(out.detach() for out in outputs), *found]


def check(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Return (error, tolerance) of the worst tensor: the Triton op in `dtype` against the reference in float64.

    Raises:
        ValueError: where a shape is wrong, or a second run gives other bits although the case is deterministic: that
            shows races.
    """
    found = call(case, TRITON, Draw(device, dtype))
    if case.deterministic and not all(map(torch.equal, found, call(case, TRITON, Draw(device, dtype)))):
        raise ValueError("a second run on the same inputs gave other bits")
    expected = call(case, TORCH, Draw(device, torch.float64, rounded=dtype))
    pairs = []
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"shape {tuple(a.shape)} where the reference has {tuple(b.shape)}")
        error = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-6))
        pairs.append((math.inf if math.isnan(error) else error, max(TOLERANCES[dtype], TOLERANCES.get(a.dtype, 0.0))))
    return max(pairs, key=lambda pair: pair[0] / pair[1])


class Seconds(float):
    """The median time of some runs.

    Attributes:
        steadiness: the fastest run's time over the median.
    """

    steadiness = 1.0


class Timer:
    """Median time of a run on the device alone: by CUDA events, with a cold second-level cache.

    Before each run the device is made to wait until the host has queued it, so that the launches themselves are not
    measured. On a CPU (only to see that the benchmark's own code works): one run by the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
            self._others = torch.zeros(max(cache, 64 << 20), device=device)  # four caches full

    def seconds(self, run: Callable[[], object]) -> Seconds:
        """Return the median."""
        if not self._on_gpu:
            start = time.perf_counter()
            run()
            return Seconds(time.perf_counter() - start)
        run()  # compiles
        torch.cuda.synchronize()
        stop, queued = time.perf_counter() + WARM_UP_SECONDS, 0.0
        while time.perf_counter() < stop:
            start = time.perf_counter()
            run()
            queued = time.perf_counter() - start
            torch.cuda.synchronize()
        delay = int(min(2.0 * queued + 1e-4, _MOST_DELAY_SECONDS) * _SLEEP_HERTZ)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(RUNS)]
        for begin, end in events:
            self._others.sum()  # read, not written: what is written would go to memory during the run
            torch.cuda._sleep(delay)
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) / 1e3 for begin, end in events]
        median = Seconds(statistics.median(times))
        median.steadiness = min(times) / median
        return median

    def directions(self, run: Run, inputs: Sequence[Tensor]) -> tuple[Seconds, Seconds | None]:
        """Return the time of the forward and of the backward pass (None where nothing wants a gradient)."""
        forward = self.seconds(lambda: run(*inputs))
        outputs = [out for out in tensors(run(*inputs)) if out.requires_grad]
        if not outputs:
            return forward, None
        wanted, grads = [x for x in inputs if x.requires_grad], [torch.randn_like(out) for out in outputs]
        return forward, self.seconds(lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Return how much memory a run takes at most above what is allocated already; None where there is no counter."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


@dataclass
class Report:
    """Prints sections and keeps the file up to date, so that a run that is cut short leaves what it has."""

    file: Path
    sections: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Add a section."""
        print(text, end="\n\n", flush=True)
        self.sections.append(text)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("\n\n".join(self.sections) + "\n", encoding="utf-8")

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *notes: str) -> None:
        """Add a section that is a table, with notes below it."""
        lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
        self.add("\n".join([f"## {title}", "", *lines, *(f"\n{note}" for note in notes)]))


@dataclass
class Bench:
    """Where it runs, how much of it, and where the results go.

    Args:
        failures: what did not work, of what should.
    """

    device: torch.device
    smoke: bool
    report: Report
    failures: list[str] = field(default_factory=list)
    _copy_rates: dict[int, float] = field(default_factory=dict)

    @cached_property
    def timer(self) -> Timer:
        """The clock."""
        return Timer(self.device)

    def copy_rate(self, moved: float) -> float:
        """Return the bytes a second of a copy that reads and writes `moved` bytes in all: what an op can reach."""
        size = max(1, int(moved) // 2)
        if size not in self._copy_rates:
            source = torch.zeros(size, dtype=torch.int8, device=self.device)
            target = torch.empty_like(source)
            self._copy_rates[size] = 2 * size / self.timer.seconds(lambda: target.copy_(source))
        return self._copy_rates[size]

    def attempt(self, name: str, work: Callable[[], _Result]) -> _Result | None:
        """Return what `work` gives; None, with a note of the failure, where it raises."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = outcome(work)
        if isinstance(found, Exception):
            self.failures.append(f"{name}: {short(found)}")
            traceback.print_exception(found)
            return None
        return found

    @property
    def dtype(self) -> torch.dtype:
        """What is timed."""
        return torch.float32 if interpreting() else torch.bfloat16

    @property
    def check_dtypes(self) -> tuple[torch.dtype, ...]:
        """What is checked."""
        return (torch.float32,) if interpreting() else tuple(TOLERANCES)


def outcome(work: Callable[[], _Result]) -> _Result | Exception:
    """Return what `work` gives, or the error that it raises, with its traceback as a note."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - any error goes into the results; the rest is still measured
        error.add_note("".join(traceback.format_tb(error.__traceback__)))
        error.__traceback__ = error.__context__ = error.__cause__ = (
            None  # their frames would hold on to memory of the device
        )
        return error


def short(error: Exception) -> str:
    """Return an error as it fits into a table's cell."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240].replace("|", "/")


def percent(share: float | None) -> str:
    """Return a share as text."""
    return "-" if share is None else f"{100 * share:.0f}%"


def on_all_cores(work: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> list[_Result | None]:
    """Return `work` of every job, done in fresh processes; None of each where a process died."""
    if not jobs:
        return []
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    try:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # a fork would inherit the GPU's context
            return list(pool.map(work, jobs))
    except BrokenProcessPool:
        return [None] * len(jobs)
