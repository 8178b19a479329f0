"""Rules of the model's shape and of how the tensor-, context- and expert-parallel ranks share it."""

import math
from collections.abc import Iterator
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError, nearest_divisors, one_of
from trimaran.models.presets import PRESETS
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules

RULES: Final = Rules()


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
