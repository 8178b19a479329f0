"""A valid run as rows of a table: its shape, layout, batch and length."""

from collections.abc import Mapping
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import counted
from trimaran.models.targets import num_adapter_rows
from trimaran.runtime.pipeline.schedules import SCHEDULES
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.sections import EvaluationSection

_BY_EXAMPLES: Final = "told once the examples are prepared, by finetune.epochs"


def describe(spec: RunFields) -> list[tuple[str, str]]:
    """Return (name, words) rows about a valid run: its shape, its layout, its batch, its length."""
    shape = spec.transformer
    rows = [
        ("model", _model(spec, shape)),
        ("parameters", _parameters(shape)),
        ("initial weights", _initial_weights(spec, shape)),
        ("vocabulary", _vocabulary(spec, shape)),
        ("layout", _layout(spec)),
        ("pipeline", _pipeline(spec)),
        ("layers per stage", _layers(spec)),
        ("batch", _batch(spec)),
        (
            "tokens per step",
            f"{spec.tokens_per_step:,} ({counted(spec.train.global_batch_size, 'sequence')} of {spec.train.seq_len})",
        ),
        ("total tokens", _total_tokens(spec, shape)),
        ("training compute", _compute(spec, shape)),
        ("optimizer", _optimizer(spec)),
        ("learning rate", _learning_rate(spec)),
        ("precision", spec.precision.dtype),
        *([("recompute", _recompute(spec, shape))] if spec.train.recompute != "none" else []),
        (
            "kernels",
            f"{spec.kernels.backend}, {'deterministic' if spec.kernels.deterministic else 'not deterministic'}",
        ),
        ("data", f"{_data(spec)}; {spec.data.held_out_fraction:.3g} of it held out"),
        *([("recipe", recipe)] if (recipe := _recipe(spec)) else []),
        ("objective", _objective(spec, shape)),
        *([("adapters", adapters)] if (adapters := _adapters(spec, shape)) else []),
        *([("evaluation", _evaluation(spec.evaluation))] if spec.evaluation is not None else []),
        ("checkpoints", _every(spec.checkpoint.interval)),
        ("output", spec.train.output_dir),
    ]
    return rows


def _model(spec: RunFields, shape: TransformerConfig) -> str:
    heads = f"{counted(shape.num_heads, 'head')} of {shape.head_dim}"
    if shape.num_kv_heads != shape.num_heads:
        heads += f" ({shape.num_kv_heads} for keys and values)"
    name = f"{spec.model.preset}: " if spec.model.preset else ""
    kinds = f"{shape.position} positions, {shape.norm}, {shape.activation}"
    experts = f", {shape.experts_per_token} of {shape.num_experts} experts" if shape.num_experts else ""
    layers = counted(shape.num_layers, "layer")
    sizes = f"{layers}, hidden {shape.hidden_size}, {heads}, feed-forward {shape.ffn_hidden_size}"
    return f"{name}{sizes}{experts}, {kinds}"


def _parameters(shape: TransformerConfig) -> str:
    used = f", {shape.num_active_parameters():,} of them used by each token" if shape.num_experts else ""
    return f"{shape.num_parameters():,}{used}"


def _initial_weights(spec: RunFields, shape: TransformerConfig) -> str:
    if spec.checkpoint.init_from is not None:
        return f"those of {spec.checkpoint.init_from}"
    widths = f", base width {shape.mup_base_width}" if shape.init == "mup" else ""
    spread = f", standard deviation {shape.init_std:g}" if shape.init in ("normal", "depth_scaled", "mup") else ""
    return f"{shape.init}{spread}{widths}"


def _objective(spec: RunFields, shape: TransformerConfig) -> str:
    if shape.is_causal:
        return "every token predicts the next"
    return f"{shape.objective}: {spec.labels_per_sample} of a sequence's {spec.train.seq_len} tokens are predicted"


def _vocabulary(spec: RunFields, shape: TransformerConfig) -> str:
    tp = spec.parallel.tp
    padded = shape.padded_vocab_size(tp)
    if padded == shape.vocab_size:
        return f"{shape.vocab_size:,} tokens"
    rows = f"each of the {tp} tp ranks holds {padded // tp:,} rows"
    return f"{shape.vocab_size:,} tokens, padded to {padded:,} so that {rows}"


def _layout(spec: RunFields) -> str:
    parallel = spec.parallel
    grid = f"tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp} x cp {parallel.cp}"
    ranks = f"{grid} = {counted(spec.world_size, 'rank')}"
    shape = spec.transformer
    kv_heads = shape.num_kv_heads
    if shape.cuts_kv_heads(parallel.tp) and kv_heads % parallel.tp:
        each = shape.kv_heads_per_rank(parallel.tp)
        ranks += f", {kv_heads} key-value heads with their query heads as {each} a tp rank, fewer on the last"
    elif not shape.cuts_kv_heads(parallel.tp) and shape.num_heads % parallel.tp:
        each = shape.heads_per_rank(parallel.tp)
        ranks += f", {shape.num_heads} query heads as {each} a tp rank, fewer on the last"
    if parallel.ep > 1:
        ranks += f", experts shared by {parallel.ep} dp ranks"
        ranks += f" and {parallel.tp} tp ranks" if parallel.tp > 1 else ""
    if parallel.sequence_parallel:
        ranks += ", sequence parallel" + (" (nothing to cut at tp 1)" if parallel.tp == 1 else "")
    return ranks


def _pipeline(spec: RunFields) -> str:
    """The schedule and its ideal bubble, (p-1) / (v*m + p-1) of the step (Narayanan et al. 2021, section 2.2)."""
    pp, virtual_stages, count = spec.parallel.pp, spec.parallel.virtual_stages, spec.num_microbatches
    if pp == 1:
        return "one stage" if virtual_stages == 1 else f"{virtual_stages} stages on one pipeline rank"
    each = f", {virtual_stages} a rank" if virtual_stages > 1 else ""
    stages = f"{spec.parallel.schedule}, {spec.num_stages} stages{each}"
    if spec.parallel.schedule_file is not None:
        return f"{spec.parallel.schedule_file}, {spec.num_stages} stages, {counted(count, 'microbatch', 'es')}"
    if SCHEDULES[spec.parallel.schedule].splits_backward:
        return f"{stages}, {counted(count, 'microbatch', 'es')}; `trimaran schedules` tells its bubble"
    bubble = (pp - 1) / (virtual_stages * count + pp - 1)
    return f"{stages}, {counted(count, 'microbatch', 'es')}, bubble {bubble:.1%} for equal stages"


def _recompute(spec: RunFields, shape: TransformerConfig) -> str:
    every = spec.train.recompute_every
    if every == 0:
        return "norms, activations and attention scores of every block"
    if every >= shape.num_layers > 1:
        return f"the first of {shape.num_layers} blocks alone, for train.recompute is {every}"
    return "every block" if every == 1 else f"one block in {every}"


def _layers(spec: RunFields) -> str:
    layers = spec.parallel.layers_per_stage
    return ", ".join(map(str, layers)) if layers else "balanced by cost"


def _batch(spec: RunFields) -> str:
    train = spec.train
    count = counted(spec.num_microbatches, "microbatch", "es")
    parts = f"{train.micro_batch_size} micro_batch_size x {count} x {spec.parallel.dp} dp"
    return f"{counted(train.global_batch_size, 'sequence')} = {parts}"


def _total_tokens(spec: RunFields, shape: TransformerConfig) -> str:
    if not spec.train.num_steps:
        return _BY_EXAMPLES
    tokens = spec.tokens_per_step * spec.train.num_steps
    return f"{tokens:,} in {counted(spec.train.num_steps, 'step')}, {tokens / shape.num_parameters():.3g} a parameter"


def _compute(spec: RunFields, shape: TransformerConfig) -> str:
    flops = shape.flops_per_token(spec.train.seq_len)
    if not spec.train.num_steps:
        return f"{flops:.3g} FLOP a token"
    return f"{flops * spec.tokens_per_step * spec.train.num_steps:.3g} FLOP, {flops:.3g} a token"


def _data(spec: RunFields) -> str:
    corpora, stages = spec.data.corpora, spec.data.stages
    if not corpora:
        return ", ".join(spec.data.source)
    if stages is None:
        return f"{_shares({name: corpus.weight for name, corpus in corpora.items()})} of the samples"
    return "; ".join(f"from {counted(stage.tokens, 'token')} on {_shares(stage.weights)}" for stage in stages)


def _recipe(spec: RunFields) -> str:
    """Return the stages of the recipe, each with what is on in it; "" without one."""
    told = []
    for name in ("clean", "filter", "dedup"):
        section = getattr(spec.data, name)
        if section is not None:
            off: tuple[object, ...] = (None, False, "keep", [])
            # A float is a threshold, which does nothing by itself.
            on = [field for field, value in section if value not in off and not isinstance(value, float)]
            told.append(f"{name} ({', '.join(on)})" if on else name)
    if spec.data.decontaminate is not None:
        told.append(f"decontaminate ({counted(len(spec.data.decontaminate.against), 'evaluation set')})")
    return "; ".join(told)


def _adapters(spec: RunFields, shape: TransformerConfig) -> str:
    """Return what learns of a run with adapters; "" for another."""
    settings = None if spec.finetune is None else spec.finetune.adapter
    if settings is None:
        return ""
    count = settings.rank * num_adapter_rows(settings.targets, shape)
    held = "" if settings.base == "full" else ", which are held in 4 bits"
    beside = f"beside {', '.join(settings.targets)} of the frozen weights{held}"
    return f"{counted(count, 'parameter')} of rank {settings.rank} {beside}; scale {settings.scale:.4g}"


def _every(interval: int) -> str:
    return f"every {counted(interval, 'step')} and at the end" if interval else "at the end"


def _evaluation(section: EvaluationSection) -> str:
    when = _every(section.interval)
    limit = "" if section.limit is None else f", {counted(section.limit, 'document')} of each"
    return f"{', '.join(section.tasks)}, {when}{limit}"


def _shares(weights: Mapping[str, float]) -> str:
    """Return each corpus with its share of the samples."""
    largest = max(weights.values())  # divided by first, for a sum of the largest numbers is none
    total = sum(weight / largest for weight in weights.values())
    return ", ".join(f"{name} {weight / largest / total * 100:.3g}%" for name, weight in weights.items() if weight)


def _optimizer(spec: RunFields) -> str:
    clipping = (
        f"gradients clipped to {spec.optimizer.max_grad_norm:g}" if spec.optimizer.max_grad_norm else "no clipping"
    )
    zero = f"ZeRO stage {spec.zero.stage}"
    if spec.zero.shard_size is not None:
        zero += f", shared out over {spec.zero.shard_size} of {spec.parallel.dp} dp ranks"
    if spec.zero.backend == "deepspeed":
        zero += " by DeepSpeed" + (", offloaded to the CPU" if spec.zero.offload == "cpu" else "")
    return f"{spec.optimizer.name}, weight decay {spec.optimizer.weight_decay:g}, {clipping}, {zero}"


def _learning_rate(spec: RunFields) -> str:
    schedule = spec.lr_schedule
    return f"{spec.optimizer.lr:g}, {schedule.name} after {counted(schedule.warmup_steps, 'warmup step')}"
