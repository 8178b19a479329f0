"""The file of a calibrated machine: every point that was measured, what was fitted on them, and how well. No torch.

It has no name of a host, a person or a path.
"""

import math
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trimaran.runtime.files import read_text

VERSION: Final = 1
MOST_SPREAD: Final = 0.2
"""Above it a calibration is refused: what else ran on the machine was measured too."""
_MOST_BYTES: Final = 8 << 20

What = Literal["product", "copy", "attention", "step", "update", "exchange"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Point(_Record):
    """One thing that was timed.

    Attributes:
        ranks: that did the same at once.
        threads: of each of them; 1 on a GPU.
        shape: sizes by name: `m, n, k` of a product; `bytes` of a copy, or of an exchange, a rank's whole tensor;
            `seq, heads, head_dim` of attention; those of the model in a step; `elements` that an update changes.
        axis: of the mesh, of an exchange.
        nodes: on which the ranks of the exchange are.
        operation: which exchange; "forward" or "backward" of attention.
        seconds: median of the wall clock.
        cpu_seconds: median of a rank's processor time; 0 on a GPU, where it says nothing.
        spread: half the distance of the quartiles of what counts (`taken`), over its median.
    """

    what: What
    dtype: str
    ranks: int
    threads: int
    shape: dict[str, int]
    axis: str = ""
    operation: str = ""
    nodes: int = 1
    seconds: float
    cpu_seconds: float
    spread: float
    repeats: int

    @property
    def taken(self) -> float:
        """Seconds that count: of a single thread that computes its processor time, which no neighbour lengthens."""
        if self.what != "exchange" and self.threads == 1 and self.cpu_seconds > 0:
            return min(self.seconds, self.cpu_seconds)
        return self.seconds


class Rates(_Record):
    """What was fitted for ranks that compute at once, in one dtype.

    Attributes:
        ranks, threads: see Point.
        flops: the highest rate of a product that was measured, FLOP/s.
        memory_rate: the highest of a copy, bytes a second, read and written.
        gemm, half_depth, hbm, attention: see `constants.Constants`.
        call: seconds of one product, attention or copy beside that.
        host: seconds that a layer's forward takes beside its products and attention, whatever its size.
        traffic: bytes of what is bound by memory in a layer, as a multiple of the least.
        stage: seconds of one pipeline stage and microbatch, forward and backward, whatever its layers.
        update: bytes of AdamW as a multiple of the least.
        residuals: by what was measured, median of |fitted / measured - 1|.
    """

    ranks: int
    threads: int
    dtype: str
    flops: float
    memory_rate: float
    gemm: float
    half_depth: float
    hbm: float
    attention: float
    call: float
    host: float
    traffic: float
    stage: float
    update: float
    residuals: dict[str, float]


class ChipConstants(_Record):
    """What was fitted for a GPU in one dtype.

    Attributes:
        flops, memory_rate, link_rate: the datasheet's where the GPU is known (`is_datasheet`), else the highest that
            were measured; the constants are shares of them.
        constants: the twelve of `constants.Constants`; those that one machine does not tell are the default's.
        measured: names of those that were measured.
        residuals: by what was measured, median of |fitted / measured - 1|.
    """

    dtype: str
    flops: float
    memory_rate: float
    link_rate: float
    is_datasheet: bool
    constants: dict[str, float]
    measured: list[str]
    residuals: dict[str, float]


class Exchange(_Record):
    """Seconds of an exchange between ranks: latency + bytes / rate, by the wall clock and by a rank's processor time.

    Attributes:
        ranks: of the group.
        nodes: on which they are.
        residual: median of |fitted / measured - 1| by the wall clock.
    """

    axis: str
    operation: str
    ranks: int
    nodes: int = 1
    latency: float
    rate: float
    cpu_latency: float
    cpu_rate: float
    residual: float


class Machine(_Record):
    """The whole file.

    Attributes:
        kind: "cpu" or "gpu".
        name: of the processor, or of the GPU as torch names it.
        cores: that the process might use.
        memory_bytes: of the machine, or of one GPU.
        processors: of one GPU; 0 for a CPU, whose products have no rounds of tiles.
        context_bytes: what a process holds before it has a model: resident, or on the GPU.
        versions: of trimaran, python, torch.
        date: of the measurement, UTC, ISO 8601.
        spread: median of the points' spreads.
        seconds: that it took.
        rates: of a CPU; constants: of a GPU.
    """

    version: int
    kind: Literal["cpu", "gpu"]
    name: str
    cores: int
    memory_bytes: int
    processors: int
    context_bytes: int
    versions: dict[str, str]
    date: str
    spread: float
    seconds: float
    rates: list[Rates]
    constants: list[ChipConstants]
    exchanges: list[Exchange]
    points: list[Point]

    def rates_of(self, dtype: str) -> list[Rates]:
        """Return the rates in a dtype, those of fewest threads first.

        Raises:
            ValueError: it was not measured.
        """
        found = sorted((each for each in self.rates if each.dtype == dtype), key=lambda each: each.threads)
        if not found:
            known = ", ".join(dict.fromkeys(each.dtype for each in self.rates))
            raise ValueError(
                f"precision.dtype is {dtype}, and the calibration of {self.name} has {known}; calibrate anew with "
                f"--dtype {dtype}"
            )
        return found


def read_machine(path: Path) -> Machine:
    """Return a calibration.

    Raises:
        ValueError: it is none, is of another version, or was measured on a machine that did other things meanwhile.
        OSError: it can't be read.
    """
    text = read_text(path, _MOST_BYTES)
    try:
        version = _Version.model_validate_json(text).version
        if version != VERSION:
            raise ValueError(
                f"{path} has version {version} of calibrations, and this trimaran reads {VERSION}; run trimaran "
                "calibrate again"
            )
        found = Machine.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is no calibration: {field}: {first['msg']}; run trimaran calibrate") from None
    if not math.isfinite(found.spread) or found.spread > MOST_SPREAD:
        raise ValueError(
            f"{path} has a spread of {found.spread:.0%}, above {MOST_SPREAD:.0%}: the machine did other things "
            "while it was measured; run trimaran calibrate while nothing else does"
        )
    return found


class _Version(BaseModel):
    version: int
