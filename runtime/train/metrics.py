"""The numbers of a run: metrics.jsonl, the sinks and one line on the screen. Used on the logging rank only.

metrics.jsonl is one JSON object a line. A training row has step, loss, lr, grad_norm, tokens_seen, tokens_per_second,
step_time_ms and mfu (null where unknown; else peak_flops, of one device, is what it is a share of), with experts also
load_balancing_loss, and what `peak_memory` measures; an evaluation row has step, held_out_loss and held_out_perplexity;
a row of scores has step and TASK/METRIC, TASK/METRIC_stderr of each task. Beside them a row of a start has step and
started_at, and one of what is done between two steps step and evaluation_s or save_s, its seconds.
``step`` is the number of optimizer steps finished, so the first training row is step 1. Numbers that JSON lacks are the
strings "NaN", "Infinity" and "-Infinity" (the JSON mapping of protocol buffers), so that any JSON reader can read the
file and a diverged loss differs from an unknown one.
"""

import contextlib
import json
import math
import os
import statistics
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, TextIO

from trimaran.models.fields import printable
from trimaran.runtime.files import naming, open_regular, parse_json
from trimaran.runtime.train.monitor.screen import make_screen
from trimaran.runtime.train.sinks.feeder import Feeder
from trimaran.runtime.train.sinks.protocol import Sink
from trimaran.runtime.train.sinks.tensorboard import TensorBoard

Row = dict[str, int | float | None]
"""One line of metrics.jsonl: a training row has "loss", an evaluation row "held_out_loss", one of scores a "/"."""

DIVERGED = "training diverged at step"
"""How the error of a step begins whose loss or gradient norm is not finite."""

_RENAMED_FIELDS = {"expert_balance": "load_balancing_loss"}  # old name -> name; in files of earlier versions
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# window of the median step time for the ETA: long enough to outlive one slow step, short enough to follow a change
_RECENT_STEPS = 50
_MOST_SCORES = 8  # on a line of the screen
_EARLY_MS = 10_000.0


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a metrics.jsonl in file order, without a last line that was cut while being written.

    Raises:
        ValueError: another line is not a row, naming the line number.
        FileNotFoundError: there is no such file.
    """
    with open_regular(path) as file:
        lines = file.read().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_decode_row(line))
        except ValueError as error:
            # only what follows the last newline can be a write that a crash cut short
            if number == len(lines):
                break
            raise ValueError(
                f"{path.name} line {number} is not a metrics row ({error}); remove that line to use the file"
            ) from error
    return rows


class MetricsLogger:
    """Writes the rows of one run.

    Call ``log`` once per step, ``log_evaluation`` and ``log_scores`` after an evaluation, ``close`` (or a with block)
    at the end.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_steps: int,
        resume_step: int = 0,
        interval: int = 1,
        tensorboard: bool = True,
        sinks: Mapping[str, Sink] = MappingProxyType({}),
        stream: TextIO | None = None,
        peak: str = "",
    ) -> None:
        """Open the files in ``folder`` and drop what an earlier run wrote after ``resume_step``.

        Args:
            folder: the run folder; metrics.jsonl and tensorboard/ are made in it.
            num_steps: length of the run, for the "step/total" and the ETA on the screen.
            resume_step: steps finished in the loaded checkpoint. Rows of later steps are dropped, because they are
                written again; 0 is a fresh start, which drops every row.
            interval: steps between lines on the screen; the files get every step.
            tensorboard: also write TensorBoard scalars.
            sinks: what gets every row too, by name; they are closed at the end.
            stream: where the screen lines go, standard output by default. A terminal gets one live line, anything else
                plain lines.
            peak: what the MFU is a share of, for the screen.

        Raises:
            ValueError: the metrics.jsonl found there has a broken line before its last.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = _drop_rows_after(path, resume_step)
        self._last_step = max((int(row["step"] or 0) for row in kept if "loss" in row), default=0)
        self._last_evaluation = max((int(row["step"] or 0) for row in kept if "held_out_loss" in row), default=-1)
        self._num_steps = num_steps
        self._interval, self._peak = max(1, interval), peak
        self._step_times_ms: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._early_ms: float | None = None  # of the steps after the first of this start
        # line buffering passes every finished row to the system: a killed process loses at most the row it was writing
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._screen = make_screen(sys.stdout if stream is None else stream)
        scalars = {"tensorboard": TensorBoard(folder / "tensorboard", resume_step + 1)} if tensorboard else {}
        self._feeders = [Feeder(name, sink, self.say) for name, sink in {**scalars, **sinks}.items()]

    def log(
        self,
        *,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float | None,
        tokens_seen: int,
        tokens_per_second: float,
        step_time_ms: float,
        mfu: float | None = None,
        load_balancing_loss: float | None = None,
        more: Mapping[str, float | None] = MappingProxyType({}),
    ) -> None:
        """Write the row of one finished training step to the files and the screen.

        Args:
            step: optimizer steps finished, this one included: 1 for the first.
            loss: mean over the tokens of the global batch.
            grad_norm: before clipping; None where it was not measured.
            tokens_seen: since the start of training, this step included.
            tokens_per_second: of the whole run, all ranks together.
            mfu: share in [0, 1] or None.
            load_balancing_loss: 1 where all experts are used equally; None for a model without experts.
            more: further columns by name.

        Raises:
            ValueError: ``step`` is not later than the last one logged; the file holds each step once.
        """
        if step <= self._last_step:
            raise ValueError(
                f"step ({step}) was logged before: the last row is step {self._last_step}, the next must be later"
            )
        self._last_step = step
        row: Row = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_seen": tokens_seen,
            "tokens_per_second": tokens_per_second,
            "step_time_ms": step_time_ms,
            "mfu": mfu,
        }
        if load_balancing_loss is not None:
            row["load_balancing_loss"] = load_balancing_loss
        row |= more
        self._write(row, prefix="train/")
        self._step_times_ms.append(step_time_ms)
        due = step % self._interval == 0 or step == self._num_steps or self._is_early_sign(step_time_ms)
        with contextlib.suppress(OSError):  # as in `say`
            self._screen.show(self._progress_line(row), due)

    def log_evaluation(
        self, *, step: int, held_out_loss: float, statistics: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Write the row of an evaluation after ``step`` finished steps (0 = before training); perplexity is exp(loss).

        Args:
            statistics: what is told beside a loss that is not that of tokens, and has no perplexity.

        Raises:
            ValueError: an evaluation at this step or a later one was logged before.
        """
        if step <= self._last_evaluation:
            raise ValueError(
                f"step ({step}) was evaluated before: the last evaluation row is step {self._last_evaluation}"
            )
        self._last_evaluation = step
        more = {f"held_out_{name}": value for name, value in statistics.items()}
        told = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in statistics.items())
        if not statistics:
            more = {"held_out_perplexity": perplexity_of(held_out_loss)}
            told = f"perplexity {more['held_out_perplexity']:.2f}"
        self._write({"step": step, "held_out_loss": held_out_loss, **more}, prefix="")
        self.say(f"step {step}/{self._num_steps}  held-out loss {held_out_loss:.4f}  {told}")

    def log_scores(self, *, step: int, scores: Mapping[str, float | None], told: str = "") -> None:
        """Write the row of an evaluation of tasks after ``step`` finished steps.

        Args:
            scores: TASK/METRIC -> figure.
            told: what belongs beside the scores on the screen.
        """
        self._write({"step": step, **scores}, prefix="evaluation/")
        shown = [(name, value) for name, value in scores.items() if value is not None and "_stderr" not in name]
        parts = [f"{name} {value:.4f}" for name, value in shown[:_MOST_SCORES]]
        further = f"  and {len(shown) - len(parts)} more in metrics.jsonl" if len(shown) > len(parts) else ""
        self.say(f"step {step}/{self._num_steps}  " + "  ".join(parts) + further + told)

    def log_time(self, *, step: int, name: str, seconds: float) -> None:
        """Write a row of when a start began, or how long something between two steps took."""
        self._write({"step": step, name: round(seconds, 3)}, prefix="time/")

    def say(self, text: str) -> None:
        """Print one line of text above the live line.

        A closed terminal or pipe does not end the run: the files have all rows.
        """
        with contextlib.suppress(OSError):
            self._screen.say(printable(text, keep="\n"))

    def close(self, *, failed: bool = False) -> None:
        """Flush and close everything; may be called again. `failed` is how the training ended, for the sinks."""
        while self._feeders:
            self._feeders.pop().close(failed=failed)
        with contextlib.suppress(OSError):
            self._screen.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _write(self, row: Row, prefix: str) -> None:
        with naming(Path(self._file.name)):
            self._file.write(_encode_row(row) + "\n")
        known = {_tag(prefix, name): value for name, value in row.items() if name != "step" and value is not None}
        for feeder in self._feeders:
            feeder.add(int(row["step"] or 0), known)

    def _is_early_sign(self, step_time_ms: float) -> bool:
        """Whether a step is the first of a start, or the first that ends 10 s of steps after it.

        The first shows that the run works; it is slower than those that follow, whose time the second one tells.
        """
        is_first, before_ms = self._early_ms is None, self._early_ms or 0.0
        self._early_ms = 0.0 if is_first else before_ms + step_time_ms
        return is_first or before_ms < _EARLY_MS <= self._early_ms

    def _progress_line(self, row: Mapping[str, Any]) -> str:
        remaining_ms = statistics.median(self._step_times_ms) * max(0, self._num_steps - row["step"])
        parts = [f"step {row['step']}/{self._num_steps}", f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}"]
        if row.get("reward") is not None:
            parts.insert(1, f"reward {row['reward']:.3f}")
        if row["grad_norm"] is not None:
            parts.append(f"grad norm {row['grad_norm']:.3f}")
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
        if row["mfu"] is not None:
            parts.append(f"MFU {row['mfu']:.1%}" + f" of {self._peak}" * bool(self._peak))
        parts.append(f"ETA {_duration(remaining_ms / 1000)}")
        if row.get("peak_memory_bytes") is not None:
            whose = f" (rank {row['peak_memory_rank']})" if "peak_memory_rank" in row else ""
            parts.append(f"memory {row['peak_memory_bytes'] / 2**30:.2f} GiB{whose}")
        return "  ".join(parts)


def perplexity_of(loss: float) -> float:
    """Return exp(loss), infinity where float64 overflows (loss above about 709 nats)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _drop_rows_after(path: Path, step: int) -> list[Row]:
    """Rewrite the file at ``path`` without rows after ``step`` and without a half-written line; return the rows kept.

    The new file replaces the old one by one rename, so a crash leaves one of them complete.
    """
    if not path.exists():
        return []
    kept = [row for row in read_metrics(path) if 0 <= int(row["step"] or 0) <= step] if step > 0 else []
    temporary = path.with_name(path.name + ".partial")
    with naming(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_encode_row(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return kept


def _encode_row(row: Row) -> str:
    return json.dumps({name: _encode_number(value) for name, value in row.items()}, allow_nan=False)


def _encode_number(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode_row(line: bytes) -> Row:
    found = parse_json(line)
    has_step = isinstance(found, dict) and isinstance(found.get("step"), int)
    if not has_step:
        raise ValueError("no integer step")
    return {_RENAMED_FIELDS.get(name, name): _decode_number(name, value) for name, value in found.items()}


def _decode_number(name: str, value: object) -> int | float | None:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if value is None or isinstance(value, int | float):
        return value
    raise ValueError(f"{name} is {value!r}, not a number")


def _tag(prefix: str, name: str) -> str:
    """Return the name that sinks have for a column: train/loss, held_out/perplexity."""
    return prefix + name.replace("held_out_", "held_out/")


def _duration(seconds: float) -> str:
    """Return h:mm:ss, with days in front where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"
