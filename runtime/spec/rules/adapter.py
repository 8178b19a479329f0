"""Rules of adapters: what they are beside, and how the frozen weights can be held."""

from collections.abc import Iterator
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError, at_most
from trimaran.models.targets import is_target, linear_shapes, unmatched
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules
from trimaran.runtime.spec.sections.finetune import AdapterSettings

RULES: Final = Rules()

_BLOCK: Final = 64  # elements of nf4 with one scale; kernels.nf4 has it too, but imports torch
_SIZES: Final = (
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.num_experts",
)


def _settings(spec: RunFields) -> AdapterSettings | None:
    return None if spec.finetune is None else spec.finetune.adapter


@RULES.needs("finetune.adapter", "checkpoint.init_from")
def _adapters_have_a_base(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if _settings(spec) is not None and spec.checkpoint.init_from is None:
        rule = "is needed by finetune.adapter, whose frozen weights it names"
        yield FieldError("checkpoint.init_from", rule, None, "set it to the folder of a trained or imported run")


@RULES.needs("finetune.adapter", "finetune.adapter.targets", "model.num_experts")
def _targets_match(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings = _settings(spec)
    if settings is None:
        return
    experts = ", whose feed-forward layers are experts, which get none" if shape.num_experts else ""
    for index, target, nearest in unmatched(settings.targets, shape):
        rule = f"{target!r} is no linear layer of a block of this model{experts}"
        yield FieldError(f"finetune.adapter.targets[{index}]", rule, target, f"did you mean {nearest}?")


@RULES.needs("finetune.adapter", "finetune.adapter.rank", "finetune.adapter.targets", *_SIZES)
def _rank_fits(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings = _settings(spec)
    if settings is None:
        return
    sizes = {name: min(sides) for name, sides in linear_shapes(shape).items() if is_target(name, settings.targets)}
    if sizes and settings.rank > min(sizes.values()):
        name = min(sizes, key=lambda each: sizes[each])
        inputs, outputs = linear_shapes(shape)[name]
        rule = f"rank ({settings.rank}) is larger than the rank of {name}, a matrix of {outputs} x {inputs}"
        fix = f"set finetune.adapter.rank to {at_most(sizes[name])}, or leave {name} out of finetune.adapter.targets"
        yield FieldError("finetune.adapter.rank", rule, settings.rank, fix)


@RULES.needs("finetune.adapter", "zero.backend")
def _who_trains_adapters(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if _settings(spec) is not None and spec.zero.backend != "native":
        rule = "DeepSpeed's engine takes all parameters of the model, and with finetune.adapter most are frozen"
        yield FieldError("zero.backend", rule, spec.zero.backend, "set zero.backend to native")


@RULES.needs("finetune.adapter", "finetune.adapter.base", "precision.dtype")
def _nf4_has_its_dtype(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings, dtype = _settings(spec), spec.precision.dtype
    if settings is not None and settings.base == "nf4" and dtype == "float64":
        rule = "nf4 holds 16 levels times a float32 scale, which float64 adds nothing to"
        fix = "set precision.dtype to bfloat16 or float32, or finetune.adapter.base to full"
        yield FieldError("finetune.adapter.base", rule, "nf4", fix)


@RULES.needs("finetune.adapter", "finetune.adapter.base", "finetune.rl", "finetune.rl.kl")
def _divergence_is_from_what_is_held(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings, rl = _settings(spec), None if spec.finetune is None else spec.finetune.rl
    if settings is not None and settings.base == "nf4" and rl is not None and rl.kl > 0:
        rule = f"kl ({rl.kl:g}) is from the weights of checkpoint.init_from, and nf4 starts from rounded ones"
        yield FieldError("finetune.rl.kl", rule, rl.kl, "set it to 0, or finetune.adapter.base to full")


@RULES.needs("finetune.adapter", "finetune.adapter.base", "parallel.tp", *_SIZES)
def _nf4_blocks_stay_whole(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    """A rank's part of a matrix has the bits that one process has where it is made of whole blocks."""
    settings, tp = _settings(spec), spec.parallel.tp
    if settings is None or settings.base != "nf4" or tp == 1:
        return
    runs = _contiguous(shape, tp)
    broken = [(name, length) for name, length in runs.items() if length % _BLOCK]
    if broken:
        name, length = broken[0]
        rule = (
            f"tp ({tp}) cuts {name} into pieces of {length} consecutive elements, and nf4 scales {_BLOCK} of them "
            "together, so pieces must be multiples of that"
        )
        fits = [each for each in range(tp - 1, 0, -1) if _can_be_cut(shape, each)]
        yield FieldError(
            "parallel.tp", rule, tp, f"set parallel.tp to {fits[0] if fits else 1}, or finetune.adapter.base to full"
        )


def _contiguous(shape: TransformerConfig, tp: int) -> dict[str, int]:
    """Return the consecutive elements of a rank's part of each linear layer: all of its rows, or its part of a row."""
    width = shape.heads_per_rank(tp) * shape.head_dim
    runs = {"attention.q": width * shape.hidden_size, "attention.out": width}
    if shape.cuts_kv_heads(tp):
        runs["attention.kv"] = shape.kv_heads_per_rank(tp) * shape.head_dim * shape.hidden_size
    if not shape.num_experts:
        inner = -(-shape.ffn_hidden_size // tp)
        runs |= {"mlp.up": inner * shape.hidden_size, "mlp.down": inner}
    return runs


def _can_be_cut(shape: TransformerConfig, tp: int) -> bool:
    fits = shape.num_heads % tp == 0 and shape.ffn_hidden_size % tp == 0
    return tp == 1 or (fits and all(length % _BLOCK == 0 for length in _contiguous(shape, tp).values()))
