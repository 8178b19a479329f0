"""The rules that tie the fields of a run spec together.

A rule states the fields that it needs, reads them and yields FieldErrors; it never raises. On a draft (a spec without
its invalid fields) exactly those rules are skipped that need a missing field.
"""

import math
from collections.abc import Iterator
from typing import Any, Final

from pydantic import BaseModel

from trimaran.kernels.limits import LARGEST_HEAD_DIM, TRITON_DTYPES
from trimaran.models.config import SHAPE_RULES, TransformerConfig
from trimaran.models.fields import FieldError, RuleTable, counted, nearest_divisors, nearest_multiples, one_of
from trimaran.models.presets import PRESETS
from trimaran.runtime.data.vocabulary import SMALLEST_MASKING_VOCABULARY, SMALLEST_VOCABULARY
from trimaran.runtime.grid import num_microbatches
from trimaran.runtime.pipeline.schedule import microbatches_fill_groups
from trimaran.runtime.pipeline.schedules import SCHEDULES
from trimaran.runtime.spec.errors import SpecError
from trimaran.runtime.spec.fields import RunFields, draft_transformer, num_predicted
from trimaran.runtime.train.lr_schedule import ENDING, REQUIRED_FIELDS, wsd_decay_steps

RULES: Final = RuleTable[[RunFields, TransformerConfig]]()
"""All rules but those of the shape alone. A need `model.x` is field x of the resolved shape, except model.preset."""

_RANKS: Final = ("parallel.tp", "parallel.pp", "parallel.dp", "parallel.cp")


def broken_rules(spec: RunFields) -> list[FieldError]:
    """Return every rule that `spec` breaks; it may be a draft, which lacks its invalid fields as attributes."""
    shape = draft_transformer(spec)
    sections = {**vars(spec), "model": shape}
    known = {f"{name}.{key}" for name, part in sections.items() if isinstance(part, BaseModel) for key in vars(part)}
    if hasattr(getattr(spec, "model", None), "preset"):
        known.add("model.preset")
    errors = [error.under("model") for error in SHAPE_RULES.broken(vars(shape), shape)]
    return errors + RULES.broken(known, spec, shape)


def check_world_size(spec: RunFields, world_size: int, name: str = "WORLD_SIZE") -> None:
    """Check that the processes that were started are the ranks that the spec lays out.

    Args:
        name: of the variable that has their number.

    Raises:
        SpecError: they are not; names dp degrees and world sizes that fit.
    """
    if spec.world_size == world_size:
        return
    parallel = spec.parallel
    one_replica = parallel.tp * parallel.pp * parallel.cp
    axes = f"tp({parallel.tp}) * pp({parallel.pp}) * dp({parallel.dp}) * cp({parallel.cp})"
    fix = f"start {counted(spec.world_size, 'rank')}"
    if world_size > 0 and world_size % one_replica == 0:
        fix += f", or set parallel.dp to {world_size // one_replica}"
    else:
        sizes = one_of(nearest_multiples(one_replica, world_size))
        replica = f"tp({parallel.tp}) * pp({parallel.pp}) * cp({parallel.cp})"
        fix += f"; with {replica} the world size must be a multiple of {one_replica}, such as {sizes}"
    rule = f"{axes} = {spec.world_size} != {name} {world_size}"
    raise SpecError([FieldError("parallel.dp", rule, parallel.dp, fix)])


_SIZES: Final = ("num_layers", "hidden_size", "num_heads")


@RULES.needs("model.preset", may_read=tuple(f"model.{name}" for name in _SIZES))
def _model_is_given(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.model.preset is not None:
        return
    missing = [name for name in _SIZES if getattr(spec.model, name, "invalid") is None]
    if missing:
        rule = f"needs num_layers, hidden_size and num_heads, or a preset; missing: {', '.join(missing)}"
        presets = f"{len(PRESETS)} shapes such as llama-tiny"
        yield FieldError(
            "model", rule, None, f"set model.{', model.'.join(missing)}, or model.preset to one of {presets}"
        )


@RULES.needs("parallel.cp")
def _context_parallelism_is_not_built(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    cp = spec.parallel.cp
    if cp > 1:
        yield FieldError("parallel.cp", f"context parallelism is not built yet, got {cp}", cp, "set parallel.cp to 1")


@RULES.needs("zero.stage")
def _zero_stages_that_are_built(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    stage = spec.zero.stage
    if stage > 1:
        rule = f"must be 0 or 1, got {stage} (stages 2 and 3 are not built yet)"
        yield FieldError("zero.stage", rule, stage, "set zero.stage to 1")


def valid_tensor_degrees(shape: TransformerConfig, wanted: int) -> str:
    """Return the tp degrees nearest to `wanted` that the heads, the kv heads and the feed-forward width allow."""
    widths = [getattr(shape, name) for name in ("num_heads", "ffn_hidden_size") if hasattr(shape, name)]
    degrees = nearest_divisors(math.gcd(*widths), wanted, count=2**31)
    degrees = [degree for degree in degrees if _kv_heads_allow(getattr(shape, "num_kv_heads", degree), degree)]
    return one_of(sorted(sorted(degrees, key=lambda degree: abs(math.log(degree / wanted)))[:6]))


def _kv_heads_allow(num_kv_heads: int, tp: int) -> bool:
    """Whether each tp rank's queries read whole kv heads: a share of them, or one that several ranks read."""
    return num_kv_heads % tp == 0 or tp % num_kv_heads == 0


@RULES.needs(
    "model.num_heads", "model.num_kv_heads", "parallel.tp", "parallel.uneven_heads", may_read=("model.ffn_hidden_size",)
)
def _heads_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    heads, kv_heads, tp = shape.num_heads, shape.num_kv_heads, spec.parallel.tp
    if heads % tp == 0 and _kv_heads_allow(kv_heads, tp):
        return
    can_be_uneven = shape.heads_can_be_cut(tp)
    if spec.parallel.uneven_heads and can_be_uneven:
        return
    uneven = ", or parallel.uneven_heads to true" if can_be_uneven else ""
    if heads % tp:
        yield _tp_error(spec, shape, f"num_heads ({heads}) must be divisible by tp ({tp})", uneven)
    if not _kv_heads_allow(kv_heads, tp) and kv_heads != heads:
        rule = f"num_kv_heads ({kv_heads}) must be divisible by tp ({tp}), or tp by num_kv_heads"
        yield _tp_error(spec, shape, rule, uneven)


@RULES.needs("model.ffn_hidden_size", "parallel.tp", may_read=("parallel.ep", "model.num_heads", "model.num_kv_heads"))
def _ffn_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    width, tp = shape.ffn_hidden_size, spec.parallel.tp
    if getattr(spec.parallel, "ep", 1) == 1 and width % tp:  # with ep the experts stay whole
        yield _tp_error(spec, shape, f"ffn_hidden_size ({width}) must be divisible by tp ({tp})")


@RULES.needs("parallel.ep", "parallel.tp", "parallel.dp", "model.num_experts")
def _experts_by_ep(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    ep, tp, dp, experts = spec.parallel.ep, spec.parallel.tp, spec.parallel.dp, shape.num_experts
    if ep == 1:
        return
    if experts == 0:
        rule = f"ep ({ep}) shares experts, and model.num_experts is 0"
        yield FieldError("parallel.ep", rule, ep, "set parallel.ep to 1")
        return
    # At ep 1 the experts are cut instead, whatever their number.
    degrees = nearest_divisors(dp, ep, count=2**31)
    fix = f"set parallel.ep to {one_of(each for each in degrees if each == 1 or experts % (each * tp) == 0)}"
    if dp % ep:
        rule = f"ep ({ep}) must divide dp ({dp}), for the ep ranks are data-parallel ranks"
        yield FieldError("parallel.ep", rule, ep, fix)
    elif experts % (ep * tp):
        rule = f"num_experts ({experts}) must be divisible by ep ({ep}) * tp ({tp})"
        yield FieldError("parallel.ep", f"{rule}, for each of these ranks holds some of them whole", ep, fix)


@RULES.needs("model.vocab_size", "parallel.tp")
def _vocabulary_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    size, tp = shape.vocab_size, spec.parallel.tp
    if size < tp:
        rule = f"vocab_size ({size}) must be at least tp ({tp}), or a tp rank would hold padding only"
        yield FieldError("model.vocab_size", rule, size, f"set model.vocab_size to {tp} or more")


def _tp_error(spec: RunFields, shape: TransformerConfig, rule: str, otherwise: str = "") -> FieldError:
    tp = spec.parallel.tp
    return FieldError("parallel.tp", rule, tp, f"set parallel.tp to {valid_tensor_degrees(shape, tp)}{otherwise}")


def _trains_tokenizer(spec: RunFields) -> bool:
    return spec.data.tokenizer is None and spec.checkpoint.init_from is None


@RULES.needs("data.tokenizer", "checkpoint.init_from", "data.tokenizer_vocab_size", "model.vocab_size")
def _vocabulary_holds_tokenizer(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tokens, size = spec.data.tokenizer_vocab_size, shape.vocab_size
    if _trains_tokenizer(spec) and size < tokens:
        rule = f"vocab_size ({size}) must be at least data.tokenizer_vocab_size ({tokens})"
        fix = f"set model.vocab_size to {tokens} or more"
        fix += f", or data.tokenizer_vocab_size to {size} or less" if size >= SMALLEST_VOCABULARY else ""
        yield FieldError("model.vocab_size", rule, size, fix)


@RULES.needs("data.tokenizer", "checkpoint.init_from", "data.end_of_text")
def _end_of_text_is_one_of_a_tokenizer(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    token = spec.data.end_of_text
    if token is not None and _trains_tokenizer(spec):
        rule = f"end_of_text ({token}) is for data.tokenizer, which is null; a tokenizer that is trained has its own"
        yield FieldError("data.end_of_text", rule, token, "set data.tokenizer to a tokenizer.json, or this to null")


@RULES.needs("data.mask_fraction", "model.objective")
def _masks_need_an_objective(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    fraction, objective = spec.data.mask_fraction, shape.objective
    if fraction is not None and shape.is_causal:
        rule = f"mask_fraction ({fraction}) says something only where tokens are hidden, got objective {objective}"
        fix = "set model.objective to masked_lm or permutation_lm, or data.mask_fraction to null"
        yield FieldError("data.mask_fraction", rule, fraction, fix)


@RULES.needs("model.objective", "data.mask_fraction", "train.seq_len")
def _predicted_tokens_have_a_context(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    fraction, seq_len = spec.data.mask_fraction, spec.train.seq_len
    predicted = num_predicted(shape.objective, fraction, seq_len)
    if not shape.is_causal and predicted >= seq_len:
        rule = f"the {predicted} tokens that are predicted must be fewer than the {seq_len} of a sequence"
        yield FieldError("data.mask_fraction", rule, fraction, "lower data.mask_fraction, or raise train.seq_len")


@RULES.needs("parallel.sequence_parallel", "parallel.tp", "train.seq_len", "model.objective", "data.mask_fraction")
def _query_stream_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tp, seq_len, fraction = spec.parallel.tp, spec.train.seq_len, spec.data.mask_fraction
    if not (spec.parallel.sequence_parallel and shape.has_query_stream) or seq_len % tp:
        return
    predicted = num_predicted(shape.objective, fraction, seq_len)
    if predicted % tp:
        tokens = f"the {predicted} tokens of a sequence that are predicted"
        rule = f"{tokens} must be divisible by tp ({tp}) with sequence_parallel"
        counts = f"{one_of(nearest_multiples(tp, predicted))} of {seq_len}"
        fix = f"set data.mask_fraction so that it is {counts}, or parallel.sequence_parallel to false"
        yield FieldError("data.mask_fraction", rule, fraction, fix)


@RULES.needs("data.tokenizer", "checkpoint.init_from", "data.tokenizer_vocab_size", "model.objective")
def _tokenizer_has_room_for_a_mask(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tokens, smallest = spec.data.tokenizer_vocab_size, SMALLEST_MASKING_VOCABULARY
    if shape.objective == "masked_lm" and _trains_tokenizer(spec) and tokens < smallest:
        rule = f"tokenizer_vocab_size ({tokens}) must be at least {smallest}, for masked_lm needs a mask token too"
        fix = f"set data.tokenizer_vocab_size to {smallest} or more"
        yield FieldError("data.tokenizer_vocab_size", rule, tokens, fix)


@RULES.needs("parallel.sequence_parallel", "parallel.tp", "train.seq_len")
def _sequence_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tp, seq_len = spec.parallel.tp, spec.train.seq_len
    if spec.parallel.sequence_parallel and seq_len % tp:
        rule = f"seq_len ({seq_len}) must be divisible by tp ({tp}) with sequence_parallel"
        fix = f"set train.seq_len to {one_of(nearest_multiples(tp, seq_len))}, or parallel.sequence_parallel to false"
        yield FieldError("train.seq_len", rule, seq_len, fix)


@RULES.needs("model.position", "model.max_seq_len", "train.seq_len")
def _sequence_has_positions(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    seq_len, longest = spec.train.seq_len, shape.max_seq_len
    if shape.position == "learned" and seq_len > longest:
        rule = f"seq_len ({seq_len}) must be at most max_seq_len ({longest}) with learned positions"
        fix = f"set train.seq_len to {longest} or less, or model.max_seq_len to {seq_len} or more"
        yield FieldError("train.seq_len", rule, seq_len, fix)


@RULES.needs("parallel.pp", "parallel.virtual_stages", "model.num_layers")
def _layers_fill_stages(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    pp, virtual_stages, layers = spec.parallel.pp, spec.parallel.virtual_stages, shape.num_layers
    if layers < spec.num_stages:
        stages = f"pp ({pp}) * virtual_stages ({virtual_stages}) = {spec.num_stages} stages"
        rule = f"num_layers ({layers}) must be at least {stages}, one layer a stage"
        fix = f"set model.num_layers to {spec.num_stages} or more"
        if layers >= virtual_stages:
            fix += f", or parallel.pp to {layers // virtual_stages} or less"
        if virtual_stages > 1 and layers >= pp:
            fix += f", or parallel.virtual_stages to {layers // pp} or less"
        yield FieldError("parallel.pp", rule, pp, fix)


@RULES.needs("parallel.layers_per_stage", "parallel.pp", "parallel.virtual_stages")
def _layers_per_stage_length(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    layers = spec.parallel.layers_per_stage
    if layers is not None and len(layers) != spec.num_stages:
        stages = f"pp ({spec.parallel.pp}) * virtual_stages ({spec.parallel.virtual_stages}) = {spec.num_stages}"
        rule = f"layers_per_stage must have {stages} entries, got {len(layers)}"
        fix = f"write {spec.num_stages} numbers, or null to balance them by cost"
        yield FieldError("parallel.layers_per_stage", rule, layers, fix)


@RULES.needs("parallel.layers_per_stage", "model.num_layers")
def _layers_per_stage_sum(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    layers = spec.parallel.layers_per_stage
    if layers is not None and sum(layers) != shape.num_layers:
        total = f"{' + '.join(map(str, layers))} = {sum(layers)}" if len(layers) <= 16 else f"the sum {sum(layers)}"
        rule = f"layers_per_stage must add up to num_layers ({shape.num_layers}), got {total}"
        change = shape.num_layers - sum(layers)
        fix = f"{'add' if change > 0 else 'take away'} {abs(change)}, or write null to balance them by cost"
        yield FieldError("parallel.layers_per_stage", rule, layers, fix)


@RULES.needs("parallel.virtual_stages", "parallel.schedule", "parallel.schedule_file")
def _virtual_stages_fit_schedule(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    virtual_stages, schedule = spec.parallel.virtual_stages, spec.parallel.schedule
    wanted = SCHEDULES[schedule].virtual_stages if spec.parallel.schedule_file is None else None
    if wanted not in (None, virtual_stages):
        others = [name for name, row in SCHEDULES.items() if row.virtual_stages in (None, virtual_stages)]
        rule = f"schedule {schedule} needs virtual_stages {wanted}, got {virtual_stages}"
        fix = f"set parallel.virtual_stages to {wanted}, or parallel.schedule to {one_of(others)}"
        yield FieldError("parallel.schedule", rule, schedule, fix)


_MOST_FORWARDS: Final = 1 << 20  # of a step: the list of a schedule is held and proved whole, on every rank
_BATCH: Final = ("train.global_batch_size", "train.micro_batch_size", "parallel.dp")


@RULES.needs("parallel.virtual_stages", "parallel.pp", "parallel.schedule", "parallel.schedule_file", *_BATCH)
def _microbatches_fit_schedule(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    batch, micro, dp, pp = spec.train.global_batch_size, spec.train.micro_batch_size, spec.parallel.dp, spec.parallel.pp
    count, row = num_microbatches(batch, micro, dp), SCHEDULES[spec.parallel.schedule]
    if count is None or spec.parallel.schedule_file is not None:
        return
    made_of = f"num_microbatches ({count}) = global_batch_size ({batch}) / (micro_batch_size ({micro}) * dp ({dp}))"
    fewest = row.fewest_microbatches(pp)
    if row.in_groups and not microbatches_fill_groups(count, pp, spec.parallel.virtual_stages):
        rule = f"{made_of} must be divisible by pp ({pp}) with virtual_stages above 1"
        sizes = one_of(each * micro * dp for each in nearest_multiples(pp, count))
        yield FieldError("train.global_batch_size", rule, batch, f"set train.global_batch_size to {sizes}")
    elif count < fewest:
        rule = f"{made_of} must be at least {fewest} = 2 * pp ({pp}) with schedule {spec.parallel.schedule}"
        fix = f"set train.global_batch_size to {fewest * micro * dp} or more"
        yield FieldError("train.global_batch_size", rule, batch, fix)


@RULES.needs("parallel.virtual_stages", "parallel.pp", *_BATCH)
def _schedule_is_bounded(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    batch, micro, dp = spec.train.global_batch_size, spec.train.micro_batch_size, spec.parallel.dp
    count = num_microbatches(batch, micro, dp) or 0
    if count * spec.num_stages > _MOST_FORWARDS:
        rule = f"num_microbatches ({count:,}) * {spec.num_stages} stages must be at most {_MOST_FORWARDS:,}"
        most = _MOST_FORWARDS // spec.num_stages * micro * dp
        yield FieldError("train.global_batch_size", rule, batch, f"set train.global_batch_size to {most} or less")


@RULES.needs(*_BATCH)
def _batch_divides(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    batch, micro, dp = spec.train.global_batch_size, spec.train.micro_batch_size, spec.parallel.dp
    if num_microbatches(batch, micro, dp) is None:
        product = f"micro_batch_size ({micro}) * num_microbatches * dp ({dp})"
        rule = f"global_batch_size ({batch}) must be {product}, a multiple of {micro} * {dp} = {micro * dp}"
        fix = f"set train.global_batch_size to {one_of(nearest_multiples(micro * dp, batch))}"
        yield FieldError("train.global_batch_size", rule, batch, fix)


@RULES.needs("train.eval_interval", "data.held_out_fraction")
def _evaluation_has_text(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    interval = spec.train.eval_interval
    if interval > 0 and spec.data.held_out_fraction == 0:
        rule = f"eval_interval ({interval}) needs held-out text, but held_out_fraction is 0"
        fix = "set data.held_out_fraction to 0.02, or train.eval_interval to 0"
        yield FieldError("train.eval_interval", rule, interval, fix)


@RULES.needs("lr_schedule.warmup_steps", "train.num_steps")
def _warmup_ends(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    warmup, steps = spec.lr_schedule.warmup_steps, spec.train.num_steps
    if warmup >= steps:
        rule = f"warmup_steps ({warmup}) must be smaller than num_steps ({steps})"
        fix = f"set lr_schedule.warmup_steps to {steps - 1} or less, or train.num_steps to {warmup + 1} or more"
        yield FieldError("lr_schedule.warmup_steps", rule, warmup, fix)


@RULES.needs("lr_schedule.name", "lr_schedule.decay_steps", "lr_schedule.warmup_steps")
def _decay_follows_warmup(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    end, warmup = spec.lr_schedule.decay_steps, spec.lr_schedule.warmup_steps
    if spec.lr_schedule.name in ENDING and end is not None and end <= warmup:
        rule = f"decay_steps ({end}) must be larger than warmup_steps ({warmup}), which it includes"
        fix = f"set lr_schedule.decay_steps to {warmup + 1} or more, or null for train.num_steps"
        yield FieldError("lr_schedule.decay_steps", rule, end, fix)


_EXAMPLES: Final = {"step_interval": "a third of train.num_steps", "decay_rate": "0.999"}


@RULES.needs("lr_schedule.name", may_read=tuple(f"lr_schedule.{name}" for name in _EXAMPLES))
def _schedule_has_its_field(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    schedule = spec.lr_schedule.name
    name, meaning = REQUIRED_FIELDS.get(schedule, ("", ""))
    if name and getattr(spec.lr_schedule, name, "invalid") is None:
        fix = f"set it to {meaning}, such as {_EXAMPLES[name]}"
        yield FieldError(f"lr_schedule.{name}", f"is required by the {schedule} schedule", None, fix)


_WSD: Final = ("name", "warmup_steps", "decay_steps", "wsd_decay_fraction")


@RULES.needs(*(f"lr_schedule.{name}" for name in _WSD), may_read=("train.num_steps",))
def _wsd_parts_fit(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    schedule = spec.lr_schedule
    warmup, fraction = schedule.warmup_steps, schedule.wsd_decay_fraction
    total: Any = schedule.decay_steps or getattr(getattr(spec, "train", None), "num_steps", None)
    if schedule.name != "wsd" or total is None:
        return
    decay = wsd_decay_steps(fraction, total)
    # Without a warmup that ends inside the run, the rules above have the better words.
    if warmup < total < warmup + decay:
        parts = f"warmup_steps ({warmup}) and the decay of wsd_decay_fraction ({fraction}) * {total} = {decay} steps"
        largest = math.floor((total - warmup) / total * 1000) / 1000
        fix = f"set lr_schedule.wsd_decay_fraction to {largest} or less"
        fix += f", or lr_schedule.warmup_steps to {total - decay} or less"
        yield FieldError("lr_schedule.wsd_decay_fraction", f"{parts} must fit into {total} steps", fraction, fix)


# What only the machine can say (no GPU, too old a GPU) is refused where the kernels are chosen: kernels/dispatch.py.
_OTHER_BACKEND: Final = "set kernels.backend to auto or torch"


@RULES.needs("kernels.backend", "precision.dtype")
def _triton_has_the_dtype(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    dtype = spec.precision.dtype
    if spec.kernels.backend == "triton" and dtype not in TRITON_DTYPES:
        rule = f"triton has no {dtype} kernels, and precision.dtype is {dtype}"
        yield FieldError("kernels.backend", rule, "triton", _OTHER_BACKEND)


@RULES.needs("kernels.backend", "launcher.device")
def _triton_has_a_gpu(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.kernels.backend == "triton" and spec.launcher.device == "cpu":
        rule = "triton needs a GPU, and launcher.device is cpu"
        yield FieldError("kernels.backend", rule, "triton", _OTHER_BACKEND)


@RULES.needs("kernels.backend", "model.head_dim")
def _triton_takes_the_heads(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.kernels.backend == "triton" and shape.head_dim > LARGEST_HEAD_DIM:
        rule = f"triton attention takes a head_dim of at most {LARGEST_HEAD_DIM}, got {shape.head_dim}"
        yield FieldError("kernels.backend", rule, "triton", f"{_OTHER_BACKEND}, or give the model narrower heads")


@RULES.needs("slurm.nodes", *_RANKS)
def _nodes_share_the_ranks(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    nodes, ranks = spec.slurm.nodes, spec.world_size
    if ranks % nodes:
        product = f"the number of ranks ({ranks} = tp * pp * dp * cp)"
        rule = f"nodes ({nodes}) must divide {product}, for every node gets equally many"
        yield FieldError("slurm.nodes", rule, nodes, f"set slurm.nodes to {one_of(nearest_divisors(ranks, nodes))}")


@RULES.needs("launcher.nodes", "launcher.kind")
def _nodes_by_hand_are_local(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    nodes, kind = spec.launcher.nodes, spec.launcher.kind
    if nodes > 1 and kind != "local":
        rule = f"nodes ({nodes}) is for kind local, got kind {kind}"
        fix = "set launcher.nodes to 1; under slurm the nodes are slurm.nodes"
        yield FieldError("launcher.nodes", rule, nodes, fix)


@RULES.needs("launcher.nodes", "launcher.kind", "launcher.rendezvous")
def _nodes_by_hand_meet(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    launcher = spec.launcher
    if launcher.nodes > 1 and launcher.kind == "local" and launcher.rendezvous is None:
        rule = f"nodes ({launcher.nodes}) must meet somewhere, and launcher.rendezvous is not set"
        fix = "set launcher.rendezvous to HOST:PORT, such as n1:29400"
        yield FieldError("launcher.nodes", rule, launcher.nodes, fix)


@RULES.needs("launcher.nodes", *_RANKS)
def _nodes_by_hand_share_the_ranks(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    nodes, ranks = spec.launcher.nodes, spec.world_size
    if ranks % nodes:
        rule = f"nodes ({nodes}) must divide the number of ranks ({ranks} = tp * pp * dp * cp)"
        fix = f"set launcher.nodes to {one_of(nearest_divisors(ranks, nodes))}"
        yield FieldError("launcher.nodes", rule, nodes, fix)
