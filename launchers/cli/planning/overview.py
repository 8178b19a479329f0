"""What `trimaran check` tells of a run on one screen, and the same facts for programs. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trimaran.launchers.chip_option import is_file
from trimaran.launchers.data.run_plan import gpu_name, place_of
from trimaran.models.fields import counted, printable
from trimaran.runtime.grid import coordinates
from trimaran.runtime.pipeline.partition import stage_layers
from trimaran.runtime.plan.brief import Brief, Place, brief_of, duration, lines_of, size, warning_of
from trimaran.runtime.spec import RunSpec, describe
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.zero.costs import describe_state, held_by_ranks

if TYPE_CHECKING:
    from rich.table import Table

VERSION: Final = 1
"""Of the facts; a key whose meaning changes raises it."""
_BYTES: Final = {"bfloat16": 2, "float32": 4, "float64": 8}
_MOST_RANKS, _MOST_CORPORA = 4, 5  # rows of each kind that a screen has room for
# Group -> rows of `describe` in it; the rest are of "run".
_GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "model": ("model", "parameters", "initial weights", "vocabulary", "adapters"),
    "where": ("layout", "pipeline", "state of a rank", "sent to dp peers", "zero.stage 3"),
    "plan": ("memory", "time", "cost"),
    "files": ("checkpoints", "output"),
}
_ELSEWHERE: Final = ("layers per stage", "checkpoints")  # told by the pipeline ranks, and by the plan


@dataclass(frozen=True)
class Overview:
    """A run before it starts.

    Attributes:
        rows: (group, name, words).
        facts: the same as numbers, for `--json`; docs/check.md names the keys.
        warning: that the plan doesn't fit, with what would; None where it does.
    """

    rows: list[tuple[str, str, str]]
    facts: dict[str, Any]
    warning: str | None = None


@dataclass(frozen=True)
class Where:
    """What a plan is made for, and whether its ranks run on GPUs."""

    place: Place
    gpus: bool


def overview_of(
    spec: RunSpec, kind: str, chip: str | None, price: float | None, corpora: list[tuple[str, str]]
) -> Overview:
    """Return what is known of a run.

    Args:
        kind: the launcher.
        chip: as of `--chip`; None: this machine's, or for a run on other machines the planner's own.
        price: of a GPU-hour.
        corpora: rows about them.

    Raises:
        ValueError, OSError: the chip is not known, or its file is no calibration of such a run.
    """
    where = _where(spec, kind, chip, price)
    brief = brief_of(spec, where.place)
    memory, time, saves = (line.removeprefix("plan: ") for line in lines_of(spec, brief))
    told = dict([*describe(spec), *describe_state(spec)])
    told["parameters"] += f"; {size(_model_bytes(spec))} in {spec.precision.dtype}"
    rows = [(_group_of(name), name, words) for name, words in told.items() if name not in _ELSEWHERE]
    rows += [("run", name, words) for name, words in _first(corpora, _MOST_CORPORA, "corpora")]
    rows += [("where", "starts", _starts(spec, kind, where.gpus))]
    rows += [("where", name, words) for name, words in _first(_pipeline_ranks(spec), _MOST_RANKS, "pipeline ranks")]
    rows += [("plan", "memory", memory), ("plan", "time", time)]
    if brief.seconds is not None and brief.num_steps:
        rows.append(("plan", "cost", _cost(spec, brief, price)))
    rows.append(("files", "checkpoints", saves))
    order = [*_GROUPS, "run"]
    order.insert(1, order.pop())
    rows.sort(key=lambda row: order.index(row[0]))  # keeps the order in a group
    return Overview(rows, _facts(spec, kind, where, brief, price, rows), warning_of(spec, brief, where.place))


def table_of(overview: Overview) -> "Table":
    """Return the rows as a table: groups and names in colour, where there is any."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for group, name, words in overview.rows:
        style = "yellow" if overview.warning is not None and (group, name) == ("plan", "memory") else ""
        table.add_row(group if group != before else "", name, Text(printable(words), style=style))
        before = group
    return table


def _group_of(name: str) -> str:
    return next((group for group, names in _GROUPS.items() if name in names), "run")


def _first(rows: list[tuple[str, str]], most: int, what: str) -> Iterator[tuple[str, str]]:
    yield from rows[:most]
    if len(rows) > most:
        yield "", f"and {len(rows) - most} more {what}; --json has all"


def _where(spec: RunSpec, kind: str, chip: str | None, price: float | None) -> Where:
    """Return what the plan is for: `--chip`, this machine, or the planner's own chip for GPUs of other machines."""
    wish, is_job = spec.launcher.device, kind == "slurm" and spec.slurm.gpus_per_node > 0
    has_gpu = gpu_name() is not None
    gpus = wish == "cuda" or (wish == "auto" and (is_job or (has_gpu and kind != "slurm")))
    if chip is None and not (gpus and (is_job or not has_gpu)):
        return Where(place_of(spec, None), gpus)
    from trimaran.launchers.cli.planning.plan import DEFAULT_CHIP, plan_by

    name = DEFAULT_CHIP if chip is None else chip
    try:
        found, setting = plan_by(spec, name, price)
    except ValueError:
        if chip is not None:
            raise
        return Where(place_of(spec, None), gpus)  # of DeepSpeed's ZeRO, which says why itself
    shown = setting.chip.name if chip is not None else f"{setting.chip.name} (another: --chip)"
    context = found.memory[0]["context"]
    place = Place(shown, float(setting.chip.memory_bytes), context, found.seconds, found.error, found.parts)
    return Where(place, gpus or (wish == "auto" and not is_file(name)))


def _model_bytes(spec: RunSpec) -> int:
    return spec.transformer.num_parameters() * _BYTES[spec.precision.dtype]


def _starts(spec: RunSpec, kind: str, gpus: bool) -> str:
    launcher = spec.launcher
    each = spec.world_size // launcher.nodes
    on = "a GPU each, NCCL" if gpus else "on the CPU, gloo"
    ranks = counted(spec.world_size if launcher.nodes == 1 else each, "rank")
    if kind == "slurm":
        return f"a Slurm job of {counted(launcher.nodes, 'node')} with {counted(each, 'rank')} each, {on}"
    if launcher.nodes > 1:
        return f"{ranks} on each of {launcher.nodes} nodes, {on}; they meet at {launcher.rendezvous}"
    return f"{ranks} on this machine by {'mpirun' if kind == 'mpi' else 'torchrun'}, {on}"


def _pipeline_ranks(spec: RunSpec) -> list[tuple[str, str]]:
    """Return for each pipeline rank its ranks of the run, its layers, and the parameters that one of them holds."""
    rows = []
    for rank, (first, last, layers, parameters) in enumerate(_held(spec)):
        ranks = f"rank {first}" if first == last else f"ranks {first}-{last}"
        ends = [*(["embedding"] if rank == placement_of(spec)[0] else []), _spans(layers)]
        ends += ["head"] if rank == placement_of(spec)[-1] and spec.transformer.has_head else []
        rows.append((f"pipeline rank {rank}", f"{ranks}: {', '.join(ends)}; {parameters:,.0f} parameters each"))
    return rows


def _held(spec: RunSpec) -> list[tuple[int, int, list[int], float]]:
    """Return by pipeline rank its first and last rank, its layers, and about how many parameters one of them holds."""
    layers = stage_layers(spec.transformer, spec.train.seq_len, spec.num_stages, spec.parallel.layers_per_stage)
    placement, parameters = placement_of(spec), held_by_ranks(spec)
    of_rank: list[list[int]] = [[] for _ in range(spec.parallel.pp)]
    for rank in range(spec.world_size):
        of_rank[coordinates(rank, spec.axis_sizes)["pp"]].append(rank)
    return [
        (
            ranks[0],
            ranks[-1],
            sorted(layer for stage, held in enumerate(layers) if placement[stage] == number for layer in held),
            sum(each.parameters for each in parameters[number]),
        )
        for number, ranks in enumerate(of_rank)
    ]


def _spans(numbers: list[int]) -> str:
    """Return layers in words, such as `layers 0-3 and 8-11`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    words = " and ".join("-".join(map(str, span)) for span in spans)
    return f"layer{'s' if len(numbers) != 1 else ''} {words}"


def _cost(spec: RunSpec, brief: Brief, price: float | None) -> str:
    assert brief.seconds is not None, "asked where a time is planned"
    seconds = brief.seconds * brief.num_steps
    hours = seconds * spec.world_size / 3600
    words = f"{duration(seconds)} of {counted(spec.world_size, 'rank')}: {hours:,.4g} rank-hours"
    return f"{words}, {hours * price:,.2f} at {price:g} an hour" if price is not None else words


def _facts(
    spec: RunSpec, kind: str, where: Where, brief: Brief, price: float | None, rows: list[tuple[str, str, str]]
) -> dict[str, Any]:
    shape, steps = spec.transformer, spec.train.num_steps
    tokens = spec.tokens_per_step * steps if steps else None
    seconds = None if brief.seconds is None or not steps else brief.seconds * steps
    hours = None if seconds is None else seconds * spec.world_size / 3600
    fullest = brief.memory[brief.fullest] if brief.memory else None
    return {
        "version": VERSION,
        "parameters": shape.num_parameters(),
        "active_parameters": shape.num_active_parameters(),
        "model_bytes": _model_bytes(spec),
        "dtype": spec.precision.dtype,
        "tokens": tokens,
        "tokens_per_step": spec.tokens_per_step,
        "tokens_per_parameter": None if tokens is None else tokens / shape.num_parameters(),
        "num_steps": steps or None,
        "flops": None if tokens is None else shape.flops_per_token(spec.train.seq_len) * tokens,
        "layout": spec.axis_sizes | {"ep": spec.parallel.ep, "ranks": spec.world_size},
        "launcher": {"kind": kind, "nodes": spec.launcher.nodes, "device": "cuda" if where.gpus else "cpu"},
        "pipeline_ranks": [
            {"ranks": [first, last], "layers": layers, "parameters_each": round(parameters)}
            for first, last, layers, parameters in _held(spec)
        ],
        "plan": {
            "place": brief.place,
            "fullest_pipeline_rank": None if fullest is None else brief.fullest,
            "memory_bytes": None if fullest is None else sum(fullest.values()),
            "memory_limit_bytes": brief.rank_bytes,
            "fits": None if fullest is None or brief.rank_bytes is None else not brief.missing,
            "step_seconds": brief.seconds,
            "step_error_p90": brief.error,
            "tokens_per_second": None if brief.seconds is None else spec.tokens_per_step / brief.seconds,
            "total_seconds": seconds,
            "rank_hours": hours,
            "money": None if hours is None or price is None else hours * price,
            "checkpoint_bytes": brief.checkpoint_bytes,
            "why_not": brief.why_not,
        },
        "output_dir": str(Path(spec.train.output_dir)),
        "rows": {f"{group}: {name}": words for group, name, words in rows if name},
    }
