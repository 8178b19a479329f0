"""The plan of a run that starts: what it says in three lines, what it can't say, and the cheapest change that fits.

It is kept in the run's folder as `plan.json`, beside which the report sets what was measured. No torch, and no numpy
unless a step's time is known.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from trimaran.models.fields import counted
from trimaran.runtime.files import read_text
from trimaran.runtime.plan.chips import Peak, peak_of
from trimaran.runtime.plan.memory.ranks import memory_of
from trimaran.runtime.spec import RunSpec, SpecError, parse_spec

FILE: Final = "plan.json"
MEASURED: Final = "memory.json"
_MOST_BYTES: Final = 4 << 20
_STATE: Final = ("parameters", "gradients", "optimizer")
_WIDE: Final = {"bfloat16": 4, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Place:
    """What is known of the machine that a run starts on.

    Attributes:
        name: of the GPU or CPU, for a sentence.
        rank_bytes: of memory that a rank may take; None: not known.
        context_bytes: that libraries take of it beside tensors; None: not known.
        seconds: of a step; None: not known, and `why_no_time` says why.
        error: band of the seconds; None: outside what was calibrated.
        parts: of the seconds.
        peak: of the chip that the user has named, for the MFU; None: the device's own name tells it.
    """

    name: str
    rank_bytes: float | None
    context_bytes: float | None
    seconds: float | None = None
    error: float | None = None
    parts: Mapping[str, float] | None = None
    why_no_time: str = ""
    peak: Peak | None = None


class Brief(BaseModel):
    """What was planned, as the run's folder keeps it.

    Attributes:
        memory: by pipeline rank, bytes by part.
        rank_bytes: see Place.
        checkpoint_bytes: of one.
        why_not: why memory or time are not planned; "" where they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    place: str
    memory: list[dict[str, float]]
    rank_bytes: float | None
    seconds: float | None
    error: float | None
    parts: dict[str, float]
    tokens_per_step: int
    num_steps: int
    checkpoint_bytes: float
    why_not: dict[str, str]
    peak: Peak | None = None

    @property
    def fullest(self) -> int:
        """The pipeline rank that holds most."""
        return max(range(len(self.memory)), key=lambda rank: sum(self.memory[rank].values()))

    @property
    def missing(self) -> float:
        """Bytes that the fullest rank lacks; 0 where it fits or that is not known."""
        if not self.memory or self.rank_bytes is None:
            return 0.0
        return max(0.0, sum(self.memory[self.fullest].values()) - self.rank_bytes)


def brief_of(spec: RunSpec, place: Place) -> Brief:
    """Return the plan of a run on a place."""
    why_not = {} if place.seconds is not None else {"time": place.why_no_time}
    memory: list[dict[str, float]] = []
    if spec.finetune is not None and (spec.finetune.adapter is not None or spec.finetune.method != "sft"):
        why_not["memory"] = "it knows neither adapters nor the models beside the one that learns"
    else:
        try:
            memory = memory_at(spec, place)
        except ValueError as error:  # another library's ZeRO
            why_not["memory"] = str(error)
    if place.context_bytes is None and memory:
        why_not["context"] = "what Python and libraries take is not counted"
    return Brief(
        place=place.name, memory=memory, rank_bytes=place.rank_bytes, seconds=place.seconds, error=place.error,
        parts=dict(place.parts or {}), tokens_per_step=spec.tokens_per_step, num_steps=spec.train.num_steps,
        checkpoint_bytes=checkpoint_bytes(spec), why_not=why_not, peak=place.peak,
    )  # fmt: skip


def memory_at(spec: RunSpec, place: Place) -> list[dict[str, float]]:
    """Return by pipeline rank the bytes of each part.

    Raises:
        ValueError: the spec's ZeRO is DeepSpeed's.
    """
    return [{**parts, "context": place.context_bytes or 0.0} for parts in memory_of(spec)]


def checkpoint_bytes(spec: RunSpec) -> float:
    """Return the bytes of a checkpoint's tensors: main parameters and two moments, each element once."""
    return 3.0 * _WIDE[spec.precision.dtype] * spec.transformer.num_parameters()


def lines_of(spec: RunSpec, brief: Brief) -> list[str]:
    """Return the three lines: memory, time, checkpoints."""
    return [_memory_line(spec, brief), _time_line(brief), _save_line(spec, brief)]


def _memory_line(spec: RunSpec, brief: Brief) -> str:
    if not brief.memory:
        return f"plan: memory is not planned: {brief.why_not['memory']}"
    parts = brief.memory[brief.fullest]
    where = f"pipeline rank {brief.fullest} holds most, " if spec.parallel.pp > 1 else "a rank holds "
    rest = sum(parts.values()) - sum(parts[name] for name in (*_STATE, "activations"))
    shown = [*((name, parts[name]) for name in (*_STATE, "activations")), ("the rest", rest)]
    limit = f" of {size(brief.rank_bytes)} on {brief.place}" if brief.rank_bytes is not None else ""
    unknown = "" if "context" not in brief.why_not else f"; {brief.why_not['context']}"
    listed = ", ".join(f"{name} {size(value)}" for name, value in shown)
    return f"plan: {where}{size(sum(parts.values()))}{limit} ({listed}{unknown})"


def _time_line(brief: Brief) -> str:
    if brief.seconds is None:
        return f"plan: the time of a step is not planned: {brief.why_not['time']}"
    band = "outside what was calibrated" if brief.error is None else f"± {brief.error:.0%}"
    rate = brief.tokens_per_step / brief.seconds
    step = f"plan: a step takes {brief.seconds:.3g} s ({band}), {rate:,.0f} tokens/s"
    if not brief.num_steps:  # of epochs over examples that are not prepared yet
        return step
    return f"{step}; {counted(brief.num_steps, 'step')} take {duration(brief.seconds * brief.num_steps)}"


def _save_line(spec: RunSpec, brief: Brief) -> str:
    interval = spec.checkpoint.interval
    how_often = f"every {counted(interval, 'step')} and at the end" if interval else "at the end alone"
    often = "" if brief.seconds is None or not interval else f", {duration(brief.seconds * interval)}"
    return f"plan: a checkpoint has {size(brief.checkpoint_bytes)}, saved {how_often}{often}"


def warning_of(spec: RunSpec, brief: Brief, place: Place) -> str | None:
    """Return the sentence about a run that doesn't fit, with the cheapest change that would; None where it fits."""
    if not brief.missing:
        return None
    lacks = f"the plan doesn't fit: pipeline rank {brief.fullest} lacks {size(brief.missing)} on {brief.place}"
    change = first_change_that_fits(spec, place)
    if change is None:
        return f"{lacks}; no change of zero.stage, micro batch and recomputation would do: raise parallel.tp or pp"
    fields = " and ".join(f"{field}={value}" for field, value in change.items())
    return f"{lacks}; it would with {fields}"


def first_change_that_fits(spec: RunSpec, place: Place) -> dict[str, Any] | None:
    """Return the fields whose change makes the run fit, the one that costs least time; None where none does.

    Of what costs nothing or little first: shards of the optimizer, of gradients; what is cheap to compute again;
    smaller micro batches; whole layers again; shards of the parameters; then all of it together.
    """
    for change in _changes(spec):
        changed = _changed(spec, change)
        if changed is not None and max(sum(each.values()) for each in memory_at(changed, place)) <= (
            place.rank_bytes or 0.0
        ):
            return change
    return None


def _changes(spec: RunSpec) -> Iterator[dict[str, Any]]:
    stage, again = spec.zero.stage, spec.train.recompute
    smaller = _smaller_batches(spec)
    shards = [{"zero.stage": each} for each in (1, 2) if stage < each and spec.parallel.dp > 1]
    selective = [{"train.recompute": "selective"}] if again == "none" else []
    full = [{"train.recompute": "full"}] if again != "full" else []
    whole = [{"zero.stage": 3}] if stage < 3 and spec.parallel.dp > 1 else []
    yield from shards
    yield from selective
    yield from smaller
    yield from full
    yield from whole
    least = smaller[-1:] or [{}]
    for more in (*shards[-1:], *whole):
        for recompute in (*selective, *full):
            yield {**more, **recompute, **least[0]}
    for recompute in full if smaller else []:
        yield {**recompute, **least[0]}


def _smaller_batches(spec: RunSpec) -> list[dict[str, Any]]:
    size_now = spec.train.micro_batch_size
    return [
        {"train.micro_batch_size": each} for each in range(size_now - 1, 0, -1) if size_now % each == 0
    ]  # a divisor divides the global batch too


def _changed(spec: RunSpec, change: Mapping[str, Any]) -> RunSpec | None:
    """Return the spec with other fields; None where its rules forbid that."""
    content = spec.model_dump(mode="json")
    for field, value in change.items():
        section, name = field.split(".")
        content[section][name] = value
    try:
        return parse_spec(content)
    except SpecError:
        return None


def table_of(brief: Brief, measured: Sequence[Mapping[str, float]] = ()) -> list[tuple[str, str, str]]:
    """Return rows of what the fullest pipeline rank holds: part, planned and measured bytes, for people.

    Args:
        measured: by pipeline rank, of the state's parts and "peak", that of all tensors; empty where nothing was.
    """
    if not brief.memory:
        return []
    rank = brief.fullest
    found = measured[rank] if rank < len(measured) else {}
    parts = {name: value for name, value in brief.memory[rank].items() if name != "context"}
    rows = [(name, size(parts.get(name)), size(found[name]) if name in found else "") for name in _STATE]
    rows += [(name, size(value), "") for name, value in parts.items() if name not in _STATE and value]
    has_peak = "peak" in found and all(name in found for name in _STATE)
    state = sum(found.get(name, 0.0) for name in _STATE)
    beside = sum(value for name, value in parts.items() if name not in _STATE)
    rows.append(("beside the state, at most", size(beside), size(found["peak"] - state) if has_peak else ""))
    rows.append(("tensors in all, at most", size(sum(parts.values())), size(found["peak"]) if "peak" in found else ""))
    return rows


def text_of(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return such rows as lines of text, "" for none."""
    if not rows:
        return ""
    shown = [("memory of the fullest rank", "planned", "measured"), *rows]
    widths = [max(len(row[column]) for row in shown) for column in range(3)]
    return "\n".join("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                     for row in shown)  # fmt: skip


def read_brief(path: Path) -> Brief | None:
    """Return the plan in a run's folder; None where there is none that can be read."""
    try:
        return Brief.model_validate_json(read_text(path / FILE, _MOST_BYTES))
    except (OSError, ValueError):
        return None


def peak_of_run(path: Path, device_name: str, dtype: str) -> Peak:
    """Return what the MFU of the run in a folder is a share of: the peak of the chip that its user named, or else the
    datasheet's of the device."""
    brief = read_brief(path)
    return peak_of(device_name, dtype) if brief is None or brief.peak is None else brief.peak


def size(count: float | None) -> str:
    """Return bytes for people."""
    if count is None:
        return "unknown"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 2**10:.1f} KiB"


def duration(seconds: float) -> str:
    """Return a duration for people."""
    for unit, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"
