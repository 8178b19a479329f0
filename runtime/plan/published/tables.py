"""Tables of published runs: a CSV row becomes the cases that it may have been, or an error with its line and column.

What the sources leave out is settled here and nowhere else. A row without a microbatch, or a pipeline's row of a source
that prints no virtual stages, stands for all of the usual ones that divide; the fastest is what its authors will have
chosen.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trimaran.runtime.files import read_text
from trimaran.runtime.plan.cases import Case, even_layers, layers_by_cost
from trimaran.runtime.plan.chips import chip_named

_GBIT: Final = 1e9 / 8
_DTYPES: Final = {"fp16": "float16", "bf16": "bfloat16", "fp8": "fp8", "": "bfloat16"}
_TRIED: Final = (1, 2, 4, 8)
_WITHOUT_VIRTUAL_STAGES: Final = ("mcore-2024",)  # print neither them nor the microbatch
_STEADY: Final = 8  # microbatches a pipeline rank where no batch is printed, so that the pipeline is full
_LAYOUT: Final = ("layers", "hidden", "seq", "tp", "pp", "dp")


@dataclass(frozen=True)
class PublishedRun:
    """One row.

    Attributes:
        line: in its file, whose header is line 1.
        dtype: of the matrix products.
        memory_kind: what the source's memory counts, in its words.
        cases: what it may have been; empty where the layout or the batch is not printed.
        seconds: of a step; NaN where it is not printed.
        gib: of memory, as the source prints it; NaN where it doesn't.
    """

    line: int
    source: str
    stack: str
    chip: str
    dtype: str
    model: str
    gpus: int
    note: str
    memory_kind: str
    cases: tuple[Case, ...]
    seconds: float
    gib: float


class _Cells:
    """The cells of a row, by column."""

    def __init__(self, path: Path, line: int, row: Mapping[str, str]) -> None:
        self._path, self._line, self._row = path, line, row

    def has(self, column: str) -> bool:
        return self.text(column) != ""

    def text(self, column: str) -> str:
        return self._row.get(column, "")

    def number(self, column: str, default: float = math.nan) -> float:
        """Return the number in a cell; `default` where it is empty."""
        text = self.text(column)
        if text == "":
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            where = f"{self._path}: line {self._line}, column {column}"
            raise ValueError(f"{where}: {text!r} is no number of at least 0; mend the cell or leave it empty")
        return value


def read_table(path: Path) -> list[PublishedRun]:
    """Return all rows of a table.

    Raises:
        ValueError: a cell is no number or a row has another number of cells than the header; tells the line and column.
        OSError: the file can't be read.
    """
    return [_run_of(_Cells(path, line, row), line) for line, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    header = reader.fieldnames or []
    missing = [column for column in (*_LAYOUT, "gbs", "mbs", "stack", "chip") if column not in header]
    if missing:
        raise ValueError(f"{path}: line 1 has no column {missing[0]}; a table of runs begins with its columns' names")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}: line {reader.line_num} has another number of cells than the header ({len(header)})"
            )
        yield reader.line_num, row


def _run_of(cells: _Cells, line: int) -> PublishedRun:
    return PublishedRun(
        line,
        cells.text("source"),
        cells.text("stack"),
        cells.text("chip"),
        _DTYPES.get(cells.text("dtype"), cells.text("dtype")),
        cells.text("model"),
        int(cells.number("gpus", 0)),
        cells.text("note"),
        cells.text("mem_kind"),
        tuple(_cases(cells)),
        cells.number("sec_per_iter"),
        cells.number("mem_gib"),
    )


def _cases(cells: _Cells) -> Iterator[Case]:
    if not all(cells.has(column) for column in (*_LAYOUT, "chip")):
        return
    layers, pp, dp = int(cells.number("layers")), int(cells.number("pp")), cells.number("dp")
    batch = cells.number("gbs", dp * cells.number("mbs", 1) * pp * _STEADY)
    microbatches = (cells.number("mbs"),) if cells.has("mbs") else _TRIED
    virtual: tuple[float, ...] = (cells.number("vpp", 1),)
    if cells.text("stack") in _WITHOUT_VIRTUAL_STAGES and pp > 1:
        virtual = tuple(v for v in _TRIED if layers // pp >= v)
    for microbatch in microbatches:
        if batch % (microbatch * dp) == 0:
            for stages in virtual:
                yield _case(cells, batch, microbatch, stages, _shares(cells, layers, pp))


def _shares(cells: _Cells, layers: int, pp: int) -> list[int]:
    if cells.text("stack") != "nanotron":
        return even_layers(layers, pp)
    # What nanotron counts of a block: four square matrices of attention, three of the feed-forward layer.
    hidden, ffn = cells.number("hidden"), cells.number("ffn")
    return layers_by_cost(layers, pp, 4 * hidden**2 + 3 * ffn * hidden, cells.number("vocab") * hidden)


def _case(cells: _Cells, batch: float, microbatch: float, virtual_stages: float, shares: list[int]) -> Case:
    chip = chip_named(cells.text("chip"))
    peak = chip.peak(_DTYPES.get(cells.text("dtype"), "bfloat16"))
    recompute = cells.text("recompute")
    same = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "seq", "tp", "pp", "dp")
    return Case(
        **{column: cells.number(column) for column in same},
        **{column: cells.number(column, 0) for column in ("gated", "tied", "zero")},
        **{column: cells.number(column, 1) for column in ("cp", "ep")},
        virtual_stages=virtual_stages,
        sequence_parallel=cells.number("sp", 0),
        batch=batch,
        microbatch=microbatch,
        gpus_per_node=cells.number("gpus_per_node", 8),
        recompute=float(recompute == "full"),
        selective=float(recompute.startswith("selective")),
        unfused=float(cells.text("attention") == "unfused"),
        overlap=cells.number("dp_overlap", 0),
        gradient_bytes=_gradient_bytes(cells),
        experts=0.0,
        experts_per_token=1.0,
        first_layers=float(shares[0]),
        last_layers=float(shares[-1]),
        most_layers=float(max(shares)),
        reductions=4.0,
        nic_rate=cells.number("nic_gbps_per_gpu", 100) * _GBIT,
        flops=peak or chip.flops,
        memory_rate=chip.memory_rate,
        link_rate=chip.link_rate,
        processors=float(chip.processors),
    )


def _gradient_bytes(cells: _Cells) -> float:
    """Megatron exchanges gradients in float16 where a run has that; BigScience changed to float32 on the way."""
    if cells.text("stack") == "megatron-deepspeed-2022":
        return 2.0 if "fp16 gradients" in cells.text("note") else 4.0
    return 2.0 if cells.text("dtype") == "fp16" else 4.0
