"""The layouts of so many GPUs that a run may have, and which rule refused the others. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final

from pydantic import ValidationError

from trimaran.models.config import TransformerConfig
from trimaran.runtime.pipeline.schedules import SCHEDULES
from trimaran.runtime.spec import RunSpec, SpecError, parse_spec

FIELDS: Final = {
    "parallel.tp": "tp", "parallel.pp": "pp", "parallel.dp": "dp", "parallel.ep": "ep",
    "parallel.virtual_stages": "virtual_stages", "parallel.schedule": "schedule",
    "parallel.sequence_parallel": "sequence_parallel", "train.micro_batch_size": "microbatch", "zero.stage": "zero",
    "train.recompute": "recompute",
}  # fmt: skip
"""What is searched: field of the spec -> name in a layout."""
_MICROBATCHES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_VIRTUAL: Final = (1, 2, 3, 4, 5, 6, 8, 10)


@dataclass(frozen=True)
class Layout:
    """One way to lay a run out."""

    tp: int
    pp: int
    dp: int
    ep: int
    virtual_stages: int
    schedule: str
    sequence_parallel: bool
    microbatch: int
    zero: int
    recompute: str

    @property
    def gpus(self) -> int:
        """GPUs of it."""
        return self.tp * self.pp * self.dp

    @property
    def recompute_every(self) -> int:
        """Every layer whose number is a multiple of this is computed again; 0: none is."""
        return int(self.recompute) if self.recompute.isdigit() else int(self.recompute == "full")

    def content(self) -> dict[str, dict[str, object]]:
        """Return the fields of a spec, by section."""
        found: dict[str, dict[str, object]] = {"parallel": {}, "train": {}, "zero": {}}
        for path, name in FIELDS.items():
            section, _, key = path.partition(".")
            found[section][key] = getattr(self, name)
        return found

    def __str__(self) -> str:
        stages = f" virtual_stages {self.virtual_stages}" if self.virtual_stages > 1 else ""
        experts = f" ep {self.ep}" if self.ep > 1 else ""
        return (
            f"tp {self.tp} pp {self.pp}{stages} dp {self.dp}{experts} micro_batch_size {self.microbatch} "
            f"zero {self.zero} recompute {self.recompute}"
        )


@dataclass
class Sieve:
    """Counts what each rule refuses. A layout meets the rules in one order, so the last of them emptied what was left.

    Attributes:
        refused: by rule, a sentence, what it refused; in the order in which rules were met.
    """

    refused: dict[str, int] = field(default_factory=dict)
    _ranks: dict[str, int] = field(default_factory=dict)

    def lets(self, holds: bool, rank: int, rule: str) -> bool:
        """Return whether a rule holds, and count it where it doesn't.

        Args:
            rank: of the rule in the order.
        """
        if not holds:
            self.refused[rule] = self.refused.get(rule, 0) + 1
            self._ranks[rule] = rank
        return holds

    def last(self) -> str:
        """Return the sentence of the last rule that refused something; of two, the one that refused more."""
        return max(self.refused, key=lambda rule: (self._ranks[rule], self.refused[rule]))


def layouts_of(
    spec: RunSpec, gpus: int, gpus_per_node: int, fixed: Mapping[str, object], sieve: Sieve | None = None
) -> Iterator[Layout]:
    """Yield the layouts of so many GPUs, with the values that are fixed.

    tp stays within a node unless it is fixed, and pipelines are 1F1B or interleaved unless a schedule is fixed.

    Args:
        sieve: counts what is refused, and by which rule.
    """
    model, batch, sieve = spec.transformer, spec.train.global_batch_size, sieve or Sieve()
    for tp, pp, dp in _grids(spec, gpus, gpus_per_node, fixed, sieve):
        experts = [ep for ep in _divisors(dp) if model.num_experts and model.num_experts % (ep * tp) == 0]
        dividing = [each for each in _MICROBATCHES if batch % (each * dp) == 0]
        microbatches = _chosen(fixed, "microbatch", dividing or [1])
        for microbatch, (schedule, virtual) in product(microbatches, _schedules(fixed, pp)):
            if not _pipeline_runs(spec, (pp, dp, microbatch), schedule, virtual, sieve):
                continue
            rest = (
                _chosen(fixed, "zero", (0, 1, 2, 3) if dp > 1 else (0,)),
                _chosen(fixed, "recompute", ("none", "selective", "full")),
                _chosen(fixed, "ep", experts or [1]),
                _chosen(fixed, "sequence_parallel", (tp > 1 and spec.train.seq_len % tp == 0,)),
            )
            for zero, again, ep, parallel in product(*rest):
                yield Layout(tp, pp, dp, ep, virtual, schedule, parallel, microbatch, zero, again)


def check_value(spec: RunSpec, path: str, value: object) -> None:
    """Check that a field of `FIELDS` can have a value at all, whatever the rest of the layout is.

    Raises:
        ValueError: it can't; the sentence is the spec's.
    """
    section, _, name = path.partition(".")
    own = getattr(spec, section)
    try:
        type(own).model_validate(own.model_dump() | {name: value})
    except ValidationError as error:
        content = spec.model_dump(mode="json")
        content[section][name] = value
        try:
            parse_spec(content)
        except SpecError as found:
            told = next((str(each) for each in found.errors if each.field == path), str(found.errors[0]))
            raise ValueError(told) from error
        raise


def _chosen(fixed: Mapping[str, object], name: str, every: Sequence[Any]) -> Sequence[Any]:
    return [fixed[name]] if name in fixed else every


def _grids(
    spec: RunSpec, gpus: int, gpus_per_node: int, fixed: Mapping[str, object], sieve: Sieve
) -> Iterator[tuple[int, int, int]]:
    """Yield tp, pp and dp."""
    model = spec.transformer
    inside = [tp for tp in _divisors(gpus) if tp <= gpus_per_node]
    for tp, pp in product(_chosen(fixed, "tp", inside), _chosen(fixed, "pp", _divisors(gpus))):
        if not sieve.lets(gpus % (tp * pp) == 0, 0, f"tp ({tp}) x pp ({pp}) must divide the GPUs ({gpus})"):
            continue
        dp = gpus // (tp * pp)
        wanted = fixed.get("dp", dp)
        grid = f"tp ({tp}) x pp ({pp}) x dp ({wanted}) must be the GPUs ({gpus})"
        if (
            sieve.lets(wanted == dp, 1, grid)
            and sieve.lets(pp <= model.num_layers, 2, f"pp ({pp}) must be at most num_layers ({model.num_layers})")
            and sieve.lets(_cuts(model, tp, spec.parallel.uneven_heads), 3, _sentence_of_tp(model, tp))
        ):
            yield tp, pp, dp


def _cuts(model: TransformerConfig, tp: int, uneven: bool) -> bool:
    """Whether tp ranks can share the heads. The feed-forward width is left to the spec's rules: ep matters there."""
    kv = model.num_kv_heads
    even = model.num_heads % tp == 0 and (kv % tp == 0 or tp % kv == 0)
    return even or (uneven and model.heads_can_be_cut(tp))


def _sentence_of_tp(model: TransformerConfig, tp: int) -> str:
    return f"tp ({tp}) must divide num_heads ({model.num_heads}), and num_kv_heads ({model.num_kv_heads}) or be divided"


def _schedules(fixed: Mapping[str, object], pp: int) -> Iterator[tuple[str, int]]:
    """Yield schedules with their virtual stages: 1F1B, and interleaved with more of them, unless one is fixed."""
    row = next((row for name, row in SCHEDULES.items() if name == fixed.get("schedule")), None)
    own = _VIRTUAL if pp > 1 else (1,)
    if row is not None and row.virtual_stages is not None:
        own = (row.virtual_stages,)
    for virtual in _chosen(fixed, "virtual_stages", own):
        yield str(fixed.get("schedule", "1f1b" if virtual == 1 else "interleaved_1f1b")), virtual


def _pipeline_runs(spec: RunSpec, sizes: tuple[int, int, int], schedule: str, virtual: int, sieve: Sieve) -> bool:
    pp, dp, microbatch = sizes
    batch, layers = spec.train.global_batch_size, spec.transformer.num_layers
    row = next(row for name, row in SCHEDULES.items() if name == schedule)
    shared = f"micro_batch_size ({microbatch}) x dp ({dp}) must divide global_batch_size ({batch})"
    if not sieve.lets(batch % (microbatch * dp) == 0, 4, shared):
        return False
    count, fewest, wanted = batch // (microbatch * dp), row.fewest_microbatches(pp), row.virtual_stages
    stages = f"schedule {schedule} takes virtual_stages {wanted}, not {virtual}"
    held = f"pp ({pp}) x virtual_stages ({virtual}) must be at most num_layers ({layers})"
    filled = f"schedule {schedule} needs {fewest} microbatches or more with pp {pp}, and there are {count}"
    grouped = f"microbatches ({count}) must be a multiple of pp ({pp}) with virtual_stages above 1"
    return (
        sieve.lets(wanted in (None, virtual), 5, stages)
        and sieve.lets(pp * virtual <= layers, 6, held)
        and sieve.lets(count >= fewest, 7, filled)
        and sieve.lets(not row.in_groups or virtual == 1 or count % pp == 0, 8, grouped)
    )


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def layout_of(spec: RunSpec) -> Layout:
    """Return the layout that a spec has."""
    values: dict[str, Any] = {}
    for path, name in FIELDS.items():
        section, _, key = path.partition(".")
        values[name] = getattr(getattr(spec, section), key)
    return Layout(**values)


def spec_of(spec: RunSpec, layout: Layout | None) -> RunSpec:
    """Return the spec with a layout; with None on one rank.

    Raises:
        SpecError: the spec with that layout breaks a rule.
    """
    content = spec.model_dump(mode="json")
    content["parallel"] |= {"layers_per_stage": None, "schedule_file": None}
    content["zero"]["shard_size"] = None
    nodes = spec.launcher.nodes
    if layout is None:
        content["parallel"] |= {"tp": 1, "pp": 1, "dp": 1, "ep": 1, "virtual_stages": 1, "schedule": "1f1b"}
        content["parallel"]["sequence_parallel"] = False
        content["train"]["micro_batch_size"] = 1
        content["zero"]["stage"] = 0
        content["launcher"]["nodes"] = 1
    else:
        for section, values in layout.content().items():
            content[section] |= values
        if nodes > 1 and layout.gpus != spec.world_size:
            of_node = spec.world_size // nodes
            content["launcher"]["nodes"] = max(1, layout.gpus // of_node) if layout.gpus % of_node == 0 else 1
    return parse_spec(content)
