"""The rules that tie the fields of a run spec together, each a generator of broken rules.

A rule reads attributes and yields FieldErrors; it never raises on its own. On a draft (a spec with invalid fields left
out) a rule that needs a missing attribute is skipped, so that the remaining rules still speak.
"""

import math
from collections.abc import Callable, Iterator
from typing import Final

from trimaran.models.config import SHAPE_RULES, TransformerConfig
from trimaran.models.fields import FieldError, nearest_divisors, nearest_multiples, one_of
from trimaran.models.presets import PRESETS
from trimaran.runtime.spec.errors import SpecError
from trimaran.runtime.spec.fields import RunFields, draft_transformer, num_predicted

MOST_TRITON_HEAD_DIM: Final = 256  # kernels/attention/function.py, which this room can't read without torch
SMALLEST_MASKING_TOKENIZER: Final = 258  # 256 bytes, end of text, mask: runtime/data/tokenizer.py

Rule = Callable[[RunFields, TransformerConfig], Iterator[FieldError]]


def broken_rules(spec: RunFields, draft: bool = False) -> list[FieldError]:
    """Return every rule that `spec` breaks.

    Args:
        spec: the fields, each valid by itself.
        draft: whether attributes may be missing, because they were invalid; rules that need them are skipped.
    """
    shape = draft_transformer(spec)
    checks = [(error.under("model") for error in rule(shape)) for rule in SHAPE_RULES]
    checks += [(error for error in rule(spec, shape)) for rule in RULES]
    errors: list[FieldError] = []
    for check in checks:
        try:
            errors.extend(check)
        except AttributeError:
            # A draft lacks the attribute; the error that removed it is already reported.
            if not draft and _is_complete(shape):
                raise
    return errors


def check_world_size(spec: RunFields, world_size: int) -> None:
    """Check that the processes that were started are the ranks that the spec lays out.

    Raises:
        SpecError: they are not; names dp degrees and world sizes that fit.
    """
    if spec.world_size == world_size:
        return
    parallel = spec.parallel
    one_replica = parallel.tp * parallel.pp * parallel.cp
    rule = f"tp({parallel.tp}) * pp({parallel.pp}) * dp({parallel.dp}) * cp({parallel.cp}) = {spec.world_size} != WORLD_SIZE {world_size}"
    fix = f"start {spec.world_size} ranks"
    if world_size > 0 and world_size % one_replica == 0:
        fix += f", or set parallel.dp to {world_size // one_replica}"
    else:
        sizes = one_of(nearest_multiples(one_replica, world_size))
        fix += f"; with tp({parallel.tp}) * pp({parallel.pp}) * cp({parallel.cp}) the world size must be a multiple of {one_replica}, such as {sizes}"
    raise SpecError([FieldError("parallel.dp", rule, parallel.dp, fix)])


def _is_complete(shape: TransformerConfig) -> bool:
    return set(vars(shape)) == set(TransformerConfig.model_fields)


def _model_is_given(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.model.preset is not None:
        return
    required = ("num_layers", "hidden_size", "num_heads")
    missing = [name for name in required if vars(spec.model).get(name, "invalid") is None]
    if missing:
        rule = f"needs num_layers, hidden_size and num_heads, or a preset; missing: {', '.join(missing)}"
        fix = (
            f"set model.{', model.'.join(missing)}, or model.preset to one of {len(PRESETS)} shapes such as llama-tiny"
        )
        yield FieldError("model", rule, None, fix)


def _only_what_is_built(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    cp = vars(spec.parallel).get("cp", 1)
    if cp > 1:
        yield FieldError("parallel.cp", f"context parallelism is not built yet, got {cp}", cp, "set parallel.cp to 1")
    if spec.zero.stage > 1:
        rule = f"must be 0 or 1, got {spec.zero.stage} (stages 2 and 3 are not built yet)"
        yield FieldError("zero.stage", rule, spec.zero.stage, "set zero.stage to 1")


def _triton_can_run(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    # What only the machine can say (no GPU, too old a GPU) is refused where the kernels are chosen:
    # kernels/dispatch.py.
    if spec.kernels.backend != "triton":
        return
    fix = "set kernels.backend to auto or torch"
    if spec.precision.dtype == "float64":
        yield FieldError(
            "kernels.backend", "triton has no float64 kernels, and precision.dtype is float64", "triton", fix
        )
    if spec.launcher.device == "cpu":
        yield FieldError("kernels.backend", "triton needs a GPU, and launcher.device is cpu", "triton", fix)
    if shape.head_dim > MOST_TRITON_HEAD_DIM:
        rule = f"triton attention takes a head_dim of at most {MOST_TRITON_HEAD_DIM}, got {shape.head_dim}"
        yield FieldError("kernels.backend", rule, "triton", f"{fix}, or give the model narrower heads")


def _nodes_share_the_ranks(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    nodes = spec.slurm.nodes
    if spec.world_size % nodes:
        rule = f"nodes ({nodes}) must divide the number of ranks ({spec.world_size} = tp * pp * dp * cp), for every node gets equally many"
        yield FieldError(
            "slurm.nodes", rule, nodes, f"set slurm.nodes to {one_of(nearest_divisors(spec.world_size, nodes))}"
        )


def _nodes_by_hand(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    launcher = spec.launcher
    if launcher.nodes == 1:
        return
    if launcher.kind != "local":
        rule = f"nodes ({launcher.nodes}) is for kind local, got kind {launcher.kind}"
        yield FieldError(
            "launcher.nodes", rule, launcher.nodes, "set launcher.nodes to 1; under slurm the nodes are slurm.nodes"
        )
    elif launcher.rendezvous is None:
        rule = f"nodes ({launcher.nodes}) must meet somewhere, and launcher.rendezvous is not set"
        yield FieldError(
            "launcher.nodes", rule, launcher.nodes, "set launcher.rendezvous to HOST:PORT, such as n1:29400"
        )
    if spec.world_size % launcher.nodes:
        rule = f"nodes ({launcher.nodes}) must divide the number of ranks ({spec.world_size} = tp * pp * dp * cp)"
        fix = f"set launcher.nodes to {one_of(nearest_divisors(spec.world_size, launcher.nodes))}"
        yield FieldError("launcher.nodes", rule, launcher.nodes, fix)


def valid_tensor_degrees(shape: TransformerConfig, wanted: int) -> str:
    """Return the tp degrees nearest to `wanted` that the heads, the kv heads and the feed-forward width allow."""
    known = vars(shape)
    widths = [known[name] for name in ("num_heads", "ffn_hidden_size") if name in known] or [known["num_kv_heads"]]
    degrees = nearest_divisors(math.gcd(*widths), wanted, count=2**31)
    degrees = [degree for degree in degrees if _kv_heads_allow(known.get("num_kv_heads", degree), degree)]
    return one_of(sorted(sorted(degrees, key=lambda degree: abs(math.log(degree / wanted)))[:6]))


def _kv_heads_allow(num_kv_heads: int, tp: int) -> bool:
    """Whether each tp rank's queries read whole kv heads: a share of them, or one that several ranks read."""
    return num_kv_heads % tp == 0 or tp % num_kv_heads == 0


def _can_be_uneven(num_kv_heads: int, tp: int) -> bool:
    """Whether every tp rank gets a kv head of its own where each but the last takes its share rounded up."""
    return -(-num_kv_heads // tp) * (tp - 1) < num_kv_heads


def _heads_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    heads, kv_heads, tp = shape.num_heads, shape.num_kv_heads, spec.parallel.tp
    if heads % tp == 0 and _kv_heads_allow(kv_heads, tp):
        return
    can_be_uneven = _can_be_uneven(kv_heads, tp)
    if spec.parallel.uneven_heads and can_be_uneven:
        return
    uneven = ", or parallel.uneven_heads to true" if can_be_uneven else ""
    if heads % tp:
        yield _tp_error(spec, shape, f"num_heads ({heads}) must be divisible by tp ({tp})", uneven)
    if not _kv_heads_allow(kv_heads, tp) and kv_heads != heads:
        yield _tp_error(
            spec, shape, f"num_kv_heads ({kv_heads}) must be divisible by tp ({tp}), or tp by num_kv_heads", uneven
        )


def _ffn_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if vars(spec.parallel).get("ep", 1) > 1:  # experts stay whole
        return
    if shape.ffn_hidden_size % spec.parallel.tp:
        yield _tp_error(
            spec, shape, f"ffn_hidden_size ({shape.ffn_hidden_size}) must be divisible by tp ({spec.parallel.tp})"
        )


def _experts_by_ep(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    ep, tp, dp, experts = spec.parallel.ep, spec.parallel.tp, spec.parallel.dp, shape.num_experts
    if ep == 1:
        return
    if experts == 0:
        yield FieldError(
            "parallel.ep", f"ep ({ep}) shares experts, and model.num_experts is 0", ep, "set parallel.ep to 1"
        )
        return
    # At ep 1 the experts are cut instead, whatever their number.
    degrees = [
        degree for degree in nearest_divisors(dp, ep, count=2**31) if degree == 1 or experts % (degree * tp) == 0
    ]
    fix = f"set parallel.ep to {one_of(degrees)}"
    if dp % ep:
        yield FieldError(
            "parallel.ep", f"ep ({ep}) must divide dp ({dp}), for the ep ranks are data-parallel ranks", ep, fix
        )
    elif experts % (ep * tp):
        rule = f"num_experts ({experts}) must be divisible by ep ({ep}) * tp ({tp}), for each of these ranks holds some of them whole"
        yield FieldError("parallel.ep", rule, ep, fix)


def _vocabulary_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if shape.vocab_size < spec.parallel.tp:
        rule = f"vocab_size ({shape.vocab_size}) must be at least tp ({spec.parallel.tp}), or a tp rank would hold padding only"
        yield FieldError(
            "model.vocab_size", rule, shape.vocab_size, f"set model.vocab_size to {spec.parallel.tp} or more"
        )


def _tp_error(spec: RunFields, shape: TransformerConfig, rule: str, otherwise: str = "") -> FieldError:
    tp = spec.parallel.tp
    return FieldError("parallel.tp", rule, tp, f"set parallel.tp to {valid_tensor_degrees(shape, tp)}{otherwise}")


def _vocabulary_holds_tokenizer(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tokens = spec.data.tokenizer_vocab_size
    if spec.data.tokenizer is None and shape.vocab_size < tokens:
        rule = f"vocab_size ({shape.vocab_size}) must be at least data.tokenizer_vocab_size ({tokens})"
        fix = f"set model.vocab_size to {tokens} or more"
        # Byte-level tokenizers do not get smaller than 257 tokens (sections.py).
        fix += f", or data.tokenizer_vocab_size to {shape.vocab_size} or less" if shape.vocab_size >= 257 else ""
        yield FieldError("model.vocab_size", rule, shape.vocab_size, fix)


def _masks_need_an_objective(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    fraction = spec.data.mask_fraction
    if fraction is not None and shape.is_causal:
        rule = (
            f"mask_fraction ({fraction}) says something only where tokens are hidden, got objective {shape.objective}"
        )
        yield FieldError(
            "data.mask_fraction",
            rule,
            fraction,
            "set model.objective to masked_lm or permutation_lm, or data.mask_fraction to null",
        )


def _predicted_tokens_have_a_context(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    predicted, seq_len = _predicted(spec, shape), spec.train.seq_len
    if not shape.is_causal and predicted >= seq_len:
        rule = f"the {predicted} tokens that are predicted must be fewer than the {seq_len} of a sequence"
        yield FieldError(
            "data.mask_fraction", rule, spec.data.mask_fraction, "lower data.mask_fraction, or raise train.seq_len"
        )


def _predicted(spec: RunFields, shape: TransformerConfig) -> int:
    """RunFields.labels_per_sample of a draft."""
    return (
        spec.train.seq_len
        if shape.is_causal
        else num_predicted(shape.objective, spec.data.mask_fraction, spec.train.seq_len)
    )


def _query_stream_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tp, seq_len = spec.parallel.tp, spec.train.seq_len
    if not (spec.parallel.sequence_parallel and shape.has_query_stream) or seq_len % tp:
        return
    predicted = _predicted(spec, shape)
    if predicted % tp:
        rule = f"the {predicted} tokens of a sequence that are predicted must be divisible by tp ({tp}) with sequence_parallel"
        fix = f"set data.mask_fraction so that it is {one_of(nearest_multiples(tp, predicted))} of {seq_len}, or parallel.sequence_parallel to false"
        yield FieldError("data.mask_fraction", rule, spec.data.mask_fraction, fix)


def _tokenizer_has_room_for_a_mask(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tokens = spec.data.tokenizer_vocab_size
    if shape.objective == "masked_lm" and spec.data.tokenizer is None and tokens < SMALLEST_MASKING_TOKENIZER:
        rule = f"tokenizer_vocab_size ({tokens}) must be at least {SMALLEST_MASKING_TOKENIZER}, for masked_lm needs a mask token too"
        yield FieldError(
            "data.tokenizer_vocab_size",
            rule,
            tokens,
            f"set data.tokenizer_vocab_size to {SMALLEST_MASKING_TOKENIZER} or more",
        )


def _sequence_by_tp(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    tp, seq_len = spec.parallel.tp, spec.train.seq_len
    if spec.parallel.sequence_parallel and seq_len % tp:
        rule = f"seq_len ({seq_len}) must be divisible by tp ({tp}) with sequence_parallel"
        fix = f"set train.seq_len to {one_of(nearest_multiples(tp, seq_len))}, or parallel.sequence_parallel to false"
        yield FieldError("train.seq_len", rule, seq_len, fix)


def _sequence_has_positions(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if shape.position == "learned" and spec.train.seq_len > shape.max_seq_len:
        rule = (
            f"seq_len ({spec.train.seq_len}) must be at most max_seq_len ({shape.max_seq_len}) with learned positions"
        )
        fix = f"set train.seq_len to {shape.max_seq_len} or less, or model.max_seq_len to {spec.train.seq_len} or more"
        yield FieldError("train.seq_len", rule, spec.train.seq_len, fix)


def _layers_fill_stages(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    pp, virtual_stages = spec.parallel.pp, spec.parallel.virtual_stages
    if shape.num_layers < spec.num_stages:
        stages = f"pp ({pp}) * virtual_stages ({virtual_stages}) = {spec.num_stages} stages"
        fix = f"set model.num_layers to {spec.num_stages} or more"
        fix += (
            f", or parallel.pp to {shape.num_layers // virtual_stages} or less"
            if shape.num_layers >= virtual_stages
            else ""
        )
        fix += (
            f", or parallel.virtual_stages to {shape.num_layers // pp} or less"
            if virtual_stages > 1 and shape.num_layers >= pp
            else ""
        )
        rule = f"num_layers ({shape.num_layers}) must be at least {stages}, one layer a stage"
        yield FieldError("parallel.pp", rule, pp, fix)


def _layers_per_stage_length(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    layers = spec.parallel.layers_per_stage
    if layers is not None and len(layers) != spec.num_stages:
        stages = f"pp ({spec.parallel.pp}) * virtual_stages ({spec.parallel.virtual_stages}) = {spec.num_stages}"
        rule = f"layers_per_stage must have {stages} entries, got {len(layers)}"
        yield FieldError(
            "parallel.layers_per_stage",
            rule,
            layers,
            f"write {spec.num_stages} numbers, or null to balance them by cost",
        )


def _layers_per_stage_sum(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    layers = spec.parallel.layers_per_stage
    if layers is not None and sum(layers) != shape.num_layers:
        total = f"{' + '.join(map(str, layers))} = {sum(layers)}" if len(layers) <= 16 else f"the sum {sum(layers)}"
        rule = f"layers_per_stage must add up to num_layers ({shape.num_layers}), got {total}"
        change = shape.num_layers - sum(layers)
        fix = f"{'add' if change > 0 else 'take away'} {abs(change)}, or write null to balance them by cost"
        yield FieldError("parallel.layers_per_stage", rule, layers, fix)


def _virtual_stages_are_interleaved(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    virtual_stages, schedule = spec.parallel.virtual_stages, spec.parallel.schedule
    if virtual_stages > 1 and schedule != "interleaved_1f1b":
        rule = f"virtual_stages ({virtual_stages}) above 1 needs schedule interleaved_1f1b, got {schedule}"
        fix = "set parallel.schedule to interleaved_1f1b, or parallel.virtual_stages to 1"
        yield FieldError("parallel.schedule", rule, schedule, fix)


def _interleaved_microbatches(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    parallel, train = spec.parallel, spec.train
    per_microbatch = train.micro_batch_size * parallel.dp
    if (
        parallel.virtual_stages == 1
        or train.global_batch_size % per_microbatch
        or spec.num_microbatches % parallel.pp == 0
    ):
        return
    counts = nearest_multiples(parallel.pp, spec.num_microbatches)
    rule = (
        f"num_microbatches ({spec.num_microbatches}) = global_batch_size ({train.global_batch_size}) / (micro_batch_size "
        f"({train.micro_batch_size}) * dp ({parallel.dp})) must be divisible by pp ({parallel.pp}) with virtual_stages above 1"
    )
    sizes = one_of(count * per_microbatch for count in counts)
    yield FieldError(
        "train.global_batch_size", rule, train.global_batch_size, f"set train.global_batch_size to {sizes}"
    )


def _batch_divides(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    batch, micro, dp = spec.train.global_batch_size, spec.train.micro_batch_size, spec.parallel.dp
    if batch % (micro * dp):
        rule = (
            f"global_batch_size ({batch}) must be micro_batch_size ({micro}) * num_microbatches * dp ({dp}), "
            f"a multiple of {micro} * {dp} = {micro * dp}"
        )
        fix = f"set train.global_batch_size to {one_of(nearest_multiples(micro * dp, batch))}"
        yield FieldError("train.global_batch_size", rule, batch, fix)


def _evaluation_has_text(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.train.eval_interval > 0 and spec.data.held_out_fraction == 0:
        rule = f"eval_interval ({spec.train.eval_interval}) needs held-out text, but held_out_fraction is 0"
        fix = "set data.held_out_fraction to 0.02, or train.eval_interval to 0"
        yield FieldError("train.eval_interval", rule, spec.train.eval_interval, fix)


def _warmup_ends(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    warmup, steps = spec.lr_schedule.warmup_steps, spec.train.num_steps
    if warmup >= steps:
        rule = f"warmup_steps ({warmup}) must be smaller than num_steps ({steps})"
        fix = f"set lr_schedule.warmup_steps to {steps - 1} or less, or train.num_steps to {warmup + 1} or more"
        yield FieldError("lr_schedule.warmup_steps", rule, warmup, fix)


def _decay_follows_warmup(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    schedule = spec.lr_schedule
    decays = schedule.name in ("cosine", "linear", "wsd")
    if decays and schedule.decay_steps is not None and schedule.decay_steps <= schedule.warmup_steps:
        rule = f"decay_steps ({schedule.decay_steps}) must be larger than warmup_steps ({schedule.warmup_steps}), which it includes"
        fix = f"set lr_schedule.decay_steps to {schedule.warmup_steps + 1} or more, or null for train.num_steps"
        yield FieldError("lr_schedule.decay_steps", rule, schedule.decay_steps, fix)


def _step_has_interval(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.lr_schedule.name == "step" and spec.lr_schedule.step_interval is None:
        fix = "set it to the steps between two drops, such as a third of train.num_steps"
        yield FieldError("lr_schedule.step_interval", "is required by the step schedule", None, fix)


def _exponential_has_rate(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.lr_schedule.name == "exponential" and spec.lr_schedule.decay_rate is None:
        fix = "set it to the factor of every step, such as 0.999"
        yield FieldError("lr_schedule.decay_rate", "is required by the exponential schedule", None, fix)


def _wsd_parts_fit(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    schedule = spec.lr_schedule
    if schedule.name != "wsd":
        return
    total = schedule.decay_steps if schedule.decay_steps is not None else spec.train.num_steps
    decay = math.ceil(schedule.wsd_decay_fraction * total)
    # Without a warmup that ends inside the run, the rules above have the better words.
    if schedule.warmup_steps < total < schedule.warmup_steps + decay:
        largest = math.floor((total - schedule.warmup_steps) / total * 1000) / 1000
        rule = (
            f"warmup_steps ({schedule.warmup_steps}) and the decay of wsd_decay_fraction ({schedule.wsd_decay_fraction}) * {total} = "
            f"{decay} steps must fit into {total} steps"
        )
        fix = f"set lr_schedule.wsd_decay_fraction to {largest} or less, or lr_schedule.warmup_steps to {total - decay} or less"
        yield FieldError("lr_schedule.wsd_decay_fraction", rule, schedule.wsd_decay_fraction, fix)


RULES: Final[tuple[Rule, ...]] = (
    _model_is_given,
    _only_what_is_built,
    _heads_by_tp,
    _ffn_by_tp,
    _experts_by_ep,
    _vocabulary_by_tp,
    _vocabulary_holds_tokenizer,
    _masks_need_an_objective,
    _predicted_tokens_have_a_context,
    _query_stream_by_tp,
    _tokenizer_has_room_for_a_mask,
    _sequence_by_tp,
    _sequence_has_positions,
    _layers_fill_stages,
    _layers_per_stage_length,
    _layers_per_stage_sum,
    _virtual_stages_are_interleaved,
    _interleaved_microbatches,
    _batch_divides,
    _evaluation_has_text,
    _warmup_ends,
    _decay_follows_warmup,
    _step_has_interval,
    _exponential_has_rate,
    _wsd_parts_fit,
    _triton_can_run,
    _nodes_share_the_ranks,
    _nodes_by_hand,
)
