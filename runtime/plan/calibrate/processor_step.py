"""A step's seconds on the processors of one calibrated machine, whose ranks share the cores. No torch.

The step takes the larger of two: the makespan of the list that will be executed, as if every rank had its cores, with
what comes after it; and the processor time of all ranks over the cores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.runtime.pipeline.partition import stage_layers
from trimaran.runtime.pipeline.simulate import Costs, simulate
from trimaran.runtime.plan.calibrate.costs import (
    ITEM,
    LayerSize,
    between,
    ends,
    exchange_of,
    exchange_seconds,
    layer,
    update,
)
from trimaran.runtime.plan.calibrate.record import Machine, Rates
from trimaran.runtime.plan.memory.ranks import shortened
from trimaran.runtime.plan.memory.state import buckets_of
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.pipeline import placement_of, schedule_of

_CHUNK_BYTES, _CHUNK_ROWS = 8 << 20, 256  # of logits that the head computes at once, on a CPU
_STATISTIC_BYTES: Final = 12  # of a row, that tp ranks gather of the head
_NEEDED: Final = {
    "tp": ("all_reduce", "all_gather", "reduce_scatter"), "dp": ("all_gather", "reduce_scatter"), "pp": ("transfer",),
    "ep": ("all_to_all",),
}  # fmt: skip


@dataclass(frozen=True)
class ProcessorStep:
    """What a step takes.

    Attributes:
        seconds: the larger of `makespan` and of `cpu_seconds` over `cores`.
        cpu_seconds: of all ranks together.
        parts: of `seconds`, by what they go to; they add up.
        bubble: share of the pipeline's makespan in which a rank does not compute.
        rates: that were taken.
    """

    seconds: float
    makespan: float
    cpu_seconds: float
    cores: int
    parts: Mapping[str, float]
    bubble: float
    rates: Rates


@dataclass
class _Cost:
    """Seconds by what they go to: by the wall clock where a rank has its cores, and of the processor."""

    wall: dict[str, float]
    cpu: dict[str, float]

    @classmethod
    def nothing(cls) -> "_Cost":
        return cls({}, {})

    def add(self, name: str, wall: float, cpu: float) -> None:
        self.wall[name] = self.wall.get(name, 0.0) + wall
        self.cpu[name] = self.cpu.get(name, 0.0) + cpu

    def add_all(self, other: "_Cost", times: float = 1.0) -> None:
        for name, value in other.wall.items():
            self.add(name, value * times, other.cpu[name] * times)

    @property
    def seconds(self) -> float:
        """By the wall clock."""
        return sum(self.wall.values())


def threads_of(spec: RunSpec, machine: Machine) -> int:
    """Return the threads of a rank: what the spec says, or its share of the cores."""
    return spec.launcher.threads_per_rank or max(1, machine.cores // spec.world_size)


def processor_step(spec: RunSpec, machine: Machine) -> ProcessorStep:
    """Return what a step takes.

    Raises:
        ValueError: the calibration lacks the dtype or an exchange of the layout, or the run has several nodes.
    """
    if spec.launcher.nodes > 1:
        raise ValueError(
            f"launcher.nodes is {spec.launcher.nodes}, and the calibration of {machine.name} is of one machine; plan "
            "with launcher.nodes=1"
        )
    for axis, operations in _NEEDED.items():
        size = getattr(spec.parallel, axis)
        for operation in operations if size > 1 else ():
            if exchange_of(machine.exchanges, axis, operation, size) is None:
                raise ValueError(
                    f"parallel.{axis} is {size}, and the calibration of {machine.name} has no exchanges over {axis}; "
                    "run trimaran calibrate --ranks 2"
                )
    rates = between(machine.rates_of(spec.precision.dtype), threads_of(spec, machine))
    stages = _stages(spec, machine, rates)
    tails = [_tail(spec, machine, rates, rank) for rank in range(spec.parallel.pp)]
    makespan, bubble = _makespan(spec, machine, stages)
    makespan += max(tail.seconds for tail in tails)
    by_rank = [_Cost.nothing() for _ in tails]
    for stage, rank in enumerate(placement_of(spec)):
        by_rank[rank].add_all(stages[stage], spec.num_microbatches)
    for rank, tail in enumerate(tails):
        by_rank[rank].add_all(tail)
    threads, copies = threads_of(spec, machine), spec.parallel.tp * spec.parallel.dp
    whole = _Cost.nothing()
    for each in by_rank:
        whole.add_all(each, copies)
    used = sum(whole.cpu.values()) * threads
    shared = used / machine.cores
    if shared > makespan:
        parts = {name: value * threads / machine.cores for name, value in whole.cpu.items()}
    else:
        busiest = max(by_rank, key=lambda each: each.seconds)
        parts = {**busiest.wall, "bubble": makespan - busiest.seconds}
    return ProcessorStep(max(makespan, shared), makespan, used, machine.cores, parts, bubble, rates)


def _stages(spec: RunSpec, machine: Machine, rates: Rates) -> list[_Cost]:
    """Return what every stage's forward and backward of a microbatch take on one rank."""
    parallel, every = spec.parallel, spec.train.recompute_every
    layers = stage_layers(spec.transformer, spec.train.seq_len, spec.num_stages, parallel.layers_per_stage)
    found = []
    for stage, held in enumerate(layers):
        cost = _Cost.nothing()
        cost.add("host", rates.stage, rates.stage)
        for index in held:
            again = float(bool(every) and index % every == 0)
            cost.add_all(_layer(spec, machine, rates, again))
        is_ends = (stage == 0, stage == spec.num_stages - 1)
        for is_here, has_head in zip(is_ends, (False, True), strict=True):
            if is_here:
                cost.add_all(_end(spec, machine, rates, has_head=has_head))
        neighbours = 2 - sum(is_ends)
        if parallel.pp > 1 and neighbours:
            size = _tokens(spec) // (parallel.tp if parallel.sequence_parallel else 1)
            # a forward and a backward with each neighbour; the wire's time is the simulator's
            _, cpu = _exchange(machine, "pp", "transfer", parallel.pp, size * _row(spec))
            cost.add("transfers", 2 * neighbours * cpu, 2 * neighbours * cpu)
        found.append(cost)
    return found


def _tokens(spec: RunSpec) -> int:
    return spec.train.micro_batch_size * spec.train.seq_len


def _row(spec: RunSpec) -> int:
    return spec.transformer.hidden_size * ITEM[spec.precision.dtype]


def _layer(spec: RunSpec, machine: Machine, rates: Rates, again: float) -> _Cost:
    config, parallel = spec.transformer, spec.parallel
    tp, tokens = parallel.tp, _tokens(spec)
    keys = config.kv_heads_per_rank(tp) if config.cuts_kv_heads(tp) else config.num_kv_heads
    routed = config.experts_per_token if config.num_experts else 1
    size = LayerSize(
        tokens=tokens, own=tokens // (tp if parallel.sequence_parallel else 1), seq=spec.train.seq_len,
        hidden=config.hidden_size, queries=config.heads_per_rank(tp) * config.head_dim, keys=keys * config.head_dim,
        head_dim=config.head_dim, inner=-(-config.ffn_hidden_size // tp), is_gated=config.is_gated, again=again,
        held=_held(config, spec), routed=routed,
    )  # fmt: skip
    cost = _Cost.nothing()
    for name, seconds in layer(rates, size).items():
        cost.add(name, seconds, seconds)
    whole = tokens * _row(spec)
    branches = 1 if config.block != "sequential" else 2
    if tp > 1 and parallel.sequence_parallel:
        # each branch gathers and scatters, its backward the reverse, and gathers its input again for the weights
        for operation, count in (("all_gather", 3 + again), ("reduce_scatter", 2 + again)):
            wall, cpu = _exchange(machine, "tp", operation, tp, whole)
            cost.add("tensor-parallel", branches * count * wall, branches * count * cpu)
    elif tp > 1:
        wall, cpu = _exchange(machine, "tp", "all_reduce", tp, whole)
        cost.add("tensor-parallel", branches * (2 + again) * wall, branches * (2 + again) * cpu)
    if parallel.ep > 1:
        wall, cpu = _exchange(machine, "ep", "all_to_all", parallel.ep, whole * routed)
        cost.add("experts' exchange", (4 + 2 * again) * wall, (4 + 2 * again) * cpu)
    return cost


def _held(config: TransformerConfig, spec: RunSpec) -> float:
    """Return the parameters of a layer on a rank, experts included."""
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    experts = config.num_experts / spec.parallel.ep if config.num_experts else 1
    inner = (3 if config.is_gated else 2) * config.hidden_size * config.ffn_hidden_size * experts
    return (attention + inner) / spec.parallel.tp


def _end(spec: RunSpec, machine: Machine, rates: Rates, *, has_head: bool) -> _Cost:
    """Return what the embedding, or the head and its loss, take of a microbatch."""
    tp, tokens, item = spec.parallel.tp, _tokens(spec), ITEM[spec.precision.dtype]
    rows = -(-spec.transformer.vocab_size // tp)
    cost = _Cost.nothing()
    seconds = ends(rates, tokens, rows, spec.transformer.hidden_size, has_head=has_head)
    cost.add("head and loss" if has_head else "embedding", seconds, seconds)
    if tp > 1:
        cost.add("tensor-parallel", *_exchange(machine, "tp", "all_reduce", tp, tokens * _row(spec)))
        if has_head:
            chunk = max(_CHUNK_ROWS, _CHUNK_BYTES // (rows * item))
            chunks = -(-tokens // chunk)
            size = min(tokens, chunk) * _STATISTIC_BYTES * tp
            wall, cpu = _exchange(machine, "tp", "all_gather", tp, size)
            cost.add("tensor-parallel", chunks * wall, chunks * cpu)
    return cost


def _tail(spec: RunSpec, machine: Machine, rates: Rates, rank: int) -> _Cost:
    """Return what dp's exchanges and the optimizer take of a step on one rank of a pipeline rank.

    Stages 2 and 3 reduce every microbatch, and 3 gathers twice for each.
    """
    narrow, stage, count = ITEM[spec.precision.dtype], spec.zero.stage, spec.num_microbatches
    cost, owned = _Cost.nothing(), 0.0
    for bucket in buckets_of(spec, rank):
        owned += bucket.length / bucket.shard
        group = spec.parallel.dp // (spec.parallel.ep if bucket.is_expert else 1)
        if group == 1:
            continue
        reduced, gathered = bucket.length * max(4, narrow), bucket.length * narrow
        times = (count if stage >= 2 else 1, 2 * count if stage == 3 else 1)
        if bucket.shard == 1:  # the sum is an exchange of both kinds
            gathered, times = reduced, (1, 1)
        for operation, size, number in (
            ("reduce_scatter", reduced, times[0]), ("all_gather", gathered, times[1]),
        ):  # fmt: skip
            wall, cpu = _exchange(machine, "dp", operation, group, size)
            cost.add("data-parallel", number * wall, number * cpu)
    seconds = update(rates, owned)
    cost.add("optimizer", seconds, seconds)
    return cost


def _exchange(machine: Machine, axis: str, operation: str, ranks: int, size: float) -> tuple[float, float]:
    found = exchange_of(machine.exchanges, axis, operation, ranks)
    assert found is not None, "looked for at the beginning"
    wall, cpu = exchange_seconds(found, size)
    return max(wall, cpu), cpu


def _makespan(spec: RunSpec, machine: Machine, stages: Sequence[_Cost]) -> tuple[float, float]:
    """Return the seconds of the pipeline's list, and the share of them in which a rank waits."""
    busy = [each.seconds for each in stages]
    if spec.parallel.pp == 1 and spec.num_stages == 1:
        return busy[0] * spec.num_microbatches, 0.0
    size = _tokens(spec) // (spec.parallel.tp if spec.parallel.sequence_parallel else 1) * _row(spec)
    wire = _exchange(machine, "pp", "transfer", spec.parallel.pp, size)[0] if spec.parallel.pp > 1 else 0.0
    passes = 3.0 + (1 / spec.train.recompute_every if spec.train.recompute_every else 0.0)
    forward = [1e3 * each / passes for each in busy]
    backward = [1e3 * each * (passes - 1) / passes for each in busy]
    short = shortened(spec)
    found = simulate(schedule_of(short), Costs.of_stages(forward, backward, forward, transfer=1e3 * wire))
    by_rank = [0.0] * spec.parallel.pp
    for rank, each in zip(placement_of(spec), busy, strict=True):
        by_rank[rank] += each
    seconds = found.makespan / 1e3 + (spec.num_microbatches - short.num_microbatches) * max(by_rank)
    return seconds, 1 - sum(by_rank) / len(by_rank) * spec.num_microbatches / seconds
