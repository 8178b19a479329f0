"""Constants of a GPU from measured points, those of `time.step`'s formulas. No torch.

The host's seconds are those of the smallest model's layers, and what is bound by memory is what larger layers take
beside products and attention.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, fields, replace
from typing import Final

import numpy as np

from trimaran.runtime.plan.calibrate.fitted import fit_logs
from trimaran.runtime.plan.calibrate.record import ChipConstants, Exchange, Point
from trimaran.runtime.plan.cases import Array, Case, Cases
from trimaran.runtime.plan.chips import find_chip
from trimaran.runtime.plan.time.calibrations import shipped
from trimaran.runtime.plan.time.constants import NAMES, Constants
from trimaran.runtime.plan.time.step import product, step_time

_LEAST, _MOST_SHARE = 1e-3, 0.999


def fit_constants(
    points: Iterable[Point], exchanges: Sequence[Exchange], name: str, processors: int, dtype: str
) -> ChipConstants:
    """Return the constants of a GPU.

    Raises:
        ValueError: there are no points of one kind.
    """
    own = [each for each in points if each.dtype == dtype or each.what == "copy"]
    by_kind = {kind: [each for each in own if each.what == kind] for kind in ("copy", "product", "attention", "step")}
    missing = [kind for kind, found in by_kind.items() if not found]
    if missing:
        raise ValueError(f"nothing was measured of {missing[0]} in {dtype} on {name}")
    chip, pair = find_chip(name), _tensor_pair(exchanges)
    peak = max(2 * each.shape["m"] * each.shape["n"] * each.shape["k"] / each.taken for each in by_kind["product"])
    datasheet = None if chip is None else chip.peak(dtype)
    largest = max(by_kind["copy"], key=lambda each: each.shape["bytes"])
    streamed = 2 * largest.shape["bytes"] / largest.taken
    link_rate = chip.link_rate if chip is not None and chip.link_rate else 1.0 if pair is None else pair.rate
    case = Case(**{**BLANK, "flops": datasheet or peak, "processors": float(processors), "link_rate": link_rate,
                   "memory_rate": streamed if chip is None else chip.memory_rate})  # fmt: skip
    start = shipped().default.values()
    found = replace(start, hbm=_share(streamed / case.memory_rate))
    measured = ["gemm", "half_depth", "hbm", "attention", "host", "traffic"]
    if pair is not None:
        measured += ["link", "link_latency"]
        ring = 2 * (pair.ranks - 1) / pair.ranks
        found = replace(
            found, link=_share(ring * pair.rate / link_rate), link_latency=pair.latency / max(1, pair.ranks - 1)
        )
    found = _fitted(found, ("gemm", "half_depth"), lambda k: _products(case, k, by_kind["product"]))
    found = _fitted(found, ("attention",), lambda k: _attention(case, k, by_kind["attention"]))
    layers = _layers(by_kind["step"])
    found = replace(found, host=max(1e-7, min(layers, key=lambda each: each[1])[1] / 3))
    found = _fitted(found, ("traffic",), lambda k: _of_layers(case, k, layers))
    residuals = {
        "product": _products(case, found, by_kind["product"]),
        "attention": _attention(case, found, by_kind["attention"]),
        "layer": _of_layers(case, found, layers),
    }  # fmt: skip
    return ChipConstants(
        dtype=dtype, flops=case.flops, memory_rate=case.memory_rate, link_rate=link_rate,
        is_datasheet=datasheet is not None, constants=dict(zip(NAMES, astuple(found), strict=True)), measured=measured,
        residuals={kind: float(np.median(np.abs(np.expm1(errors)))) for kind, errors in residuals.items()},
    )  # fmt: skip


_ABSENT: Final = ("tied", "sequence_parallel", "zero", "recompute", "selective", "unfused", "overlap", "experts")
BLANK: Final = {each.name: float(each.name not in _ABSENT) for each in fields(Case)}
"""A case of one rank and nothing in it."""


def _share(value: float) -> float:
    return float(np.clip(value, _LEAST, _MOST_SHARE))


def _tensor_pair(exchanges: Iterable[Exchange]) -> Exchange | None:
    """Return the sum over most tp ranks of a node; None where one GPU of a node was measured."""
    sums = [each for each in exchanges if (each.axis, each.operation, each.nodes) == ("tp", "all_reduce", 1)]
    return max(sums, key=lambda each: each.ranks, default=None)


def _fitted(constants: Constants, names: Sequence[str], errors_of: Callable[[Constants], Array]) -> Constants:
    def changed(values: Sequence[float] | Array) -> Constants:
        return replace(constants, **dict(zip(names, map(float, values), strict=True)))

    found = changed(fit_logs(lambda values: errors_of(changed(values)), [getattr(constants, name) for name in names]))
    shares = {name: _share(getattr(found, name)) for name in ("gemm", "attention") if name in names}
    return replace(found, **shares)


def _products(case: Case, constants: Constants, points: Sequence[Point]) -> Array:
    """Return ln(fitted / measured) of products."""
    sizes = [np.array([each.shape[name] for each in points], dtype=np.float64) for name in ("m", "n", "k")]
    seconds = product(Cases.of([case] * len(points)), constants, *sizes)
    return np.asarray(np.log(seconds / [each.taken for each in points]))


def _attention(case: Case, constants: Constants, points: Sequence[Point]) -> Array:
    found = []
    for each in points:
        shape, passes = each.shape, 1.0 if each.operation == "forward" else 3.5
        flops = 2.0 * shape["seq"] ** 2 * shape["heads"] * shape["head_dim"] * passes
        found.append(np.log(flops / (case.flops * constants.attention) / each.taken))
    return np.array(found)


def _layers(points: Sequence[Point]) -> list[tuple[dict[str, int], float]]:
    """Return the seconds of one layer of every model: the difference of its two steps over that of their layers."""
    models: dict[tuple[tuple[str, int], ...], list[Point]] = {}
    for each in points:
        key = tuple(sorted((name, value) for name, value in each.shape.items() if name != "layers"))
        models.setdefault(key, []).append(each)
    found = []
    for key, (few, many) in ((key, sorted(own, key=lambda each: each.shape["layers"])) for key, own in models.items()):
        seconds = (many.taken - few.taken) / (many.shape["layers"] - few.shape["layers"])
        found.append((dict(key), max(seconds, 1e-7)))
    return found


def _of_layers(case: Case, constants: Constants, layers: Sequence[tuple[dict[str, int], float]]) -> Array:
    """Return ln(fitted / measured) of layers: the larger of the chip's and the host's seconds."""
    cases = Cases.of(
        replace(
            case, hidden=shape["hidden"], ffn=shape["ffn"], heads=shape["heads"], kv_heads=shape["heads"],
            head_dim=shape["hidden"] // shape["heads"], gated=1.0, seq=shape["seq"], microbatch=shape["microbatch"],
            batch=shape["microbatch"],
        )
        for shape, _ in layers
    )  # fmt: skip
    found = step_time(cases, constants)
    return np.asarray(np.log(np.maximum(found.layer, found.host) / [seconds for _, seconds in layers]))
