"""Constants of processors from measured points: least squares of logarithms, one kind after the other. No torch.

Products, copies and attention by themselves first; then, with those kept, what steps take beside them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np

from trimaran.runtime.plan.calibrate.costs import attention, model_step, product, update
from trimaran.runtime.plan.calibrate.record import Exchange, Point, Rates
from trimaran.runtime.plan.cases import Array

_ROUNDS: Final = 40
_HUBER: Final = 0.2  # log errors beyond which a point counts by its distance
_KEPT: Final = 0.01  # weight of a step of the logarithm away from where the fit begins, so that it can't run away


def fit_logs(errors: Callable[[Array], Array], start: Sequence[float]) -> list[float]:
    """Return positive numbers that make log errors small, in the sense of Huber, by Levenberg and Marquardt's method.

    Args:
        errors: of every point, of numbers like `start`.
    """
    center = np.log(np.array(start, dtype=np.float64))

    def residuals(x: Array) -> Array:
        found = errors(np.exp(x))
        far = np.maximum(np.abs(found), _HUBER)
        huber = np.where(np.abs(found) < _HUBER, found, np.sign(found) * np.sqrt(_HUBER * (2 * far - _HUBER)))
        return np.concatenate([huber, _KEPT * (x - center)])

    free, damping = center.copy(), 1e-2
    now = residuals(free)
    for _ in range(_ROUNDS):
        moves = 1e-4 * np.eye(len(free))
        slopes = np.stack([(residuals(free + each) - residuals(free - each)) / 2e-4 for each in moves], axis=1)
        square, downhill = slopes.T @ slopes, -slopes.T @ now
        move = np.clip(np.linalg.solve(square + damping * np.diag(np.diag(square)), downhill), -1.0, 1.0)
        then = residuals(free + move)
        gained = float(now @ now - then @ then)
        if gained > 0:
            free, now, damping = free + move, then, max(damping / 4, 1e-9)
            if gained < 1e-9 * float(now @ now):
                break
        else:
            damping *= 6
    return [float(each) for each in np.exp(free)]


def fit_rates(points: Iterable[Point], ranks: int, threads: int, dtype: str) -> Rates:
    """Return the constants of ranks that compute at once.

    Raises:
        ValueError: there are no points of one kind.
    """
    own = [each for each in points if (each.ranks, each.threads) == (ranks, threads)]
    by_kind = {
        kind: [each for each in own if each.what == kind and (each.dtype == dtype or kind == "copy")]
        for kind in ("copy", "product", "attention", "step", "update")
    }
    missing = [kind for kind, found in by_kind.items() if not found]
    if missing:
        raise ValueError(f"nothing was measured of {missing[0]} in {dtype} on {ranks} ranks of {threads} threads")
    copies = [2 * each.shape["bytes"] / each.taken for each in by_kind["copy"]]
    largest = max(by_kind["copy"], key=lambda each: each.shape["bytes"])
    peak = max(2 * each.shape["m"] * each.shape["n"] * each.shape["k"] / each.taken for each in by_kind["product"])
    rates = Rates(
        ranks=ranks, threads=threads, dtype=dtype, flops=peak, memory_rate=max(copies), gemm=0.95, half_depth=8.0,
        hbm=2 * largest.shape["bytes"] / largest.taken / max(copies), attention=0.5, call=2e-6, host=3e-4, traffic=1.0,
        stage=1e-3, update=1.0, residuals={},
    )  # fmt: skip
    for kind, names in _STAGES.items():
        rates = _fitted(rates, by_kind[kind], names)
    residuals = {kind: float(np.median(np.abs(np.expm1(_errors(rates, by_kind[kind]))))) for kind in _STAGES}
    return rates.model_copy(update={"residuals": residuals})


_STAGES: Final = {
    "product": ("gemm", "half_depth", "call"),
    "attention": ("attention",),
    "step": ("host", "traffic", "stage"),
    "update": ("update",),
}


def _fitted(rates: Rates, points: Sequence[Point], names: Sequence[str]) -> Rates:
    def errors(values: Array) -> Array:
        return _errors(rates.model_copy(update=dict(zip(names, map(float, values), strict=True))), points)

    found = fit_logs(errors, [getattr(rates, name) for name in names])
    return rates.model_copy(update=dict(zip(names, found, strict=True)))


def _errors(rates: Rates, points: Sequence[Point]) -> Array:
    return np.array([np.log(seconds_of(rates, each) / each.taken) for each in points])


def seconds_of(rates: Rates, point: Point) -> float:
    """Return what the constants say that a point takes.

    Raises:
        ValueError: it is a copy or an exchange, which other constants say.
    """
    shape = point.shape
    if point.what == "product":
        return product(rates, shape["m"], shape["n"], shape["k"])
    if point.what == "attention":
        passes = 1.0 if point.operation == "forward" else 3.5
        return attention(rates, shape["seq"], shape["seq"], shape["heads"] * shape["head_dim"], passes)
    if point.what == "step":
        return model_step(rates, shape)
    if point.what == "update":
        return update(rates, shape["elements"])
    raise ValueError(f"a {point.what} has no seconds by rates")


def fit_exchanges(points: Iterable[Point]) -> list[Exchange]:
    """Return latency and rate of every exchange that was measured, by axis, operation, ranks and nodes."""
    groups: dict[tuple[str, str, int, int], list[Point]] = {}
    for each in points:
        if each.what == "exchange":
            groups.setdefault((each.axis, each.operation, each.ranks, each.nodes), []).append(each)
    made = []
    for (axis, operation, ranks, nodes), own in groups.items():
        sizes = np.array([each.shape["bytes"] for each in own], dtype=np.float64)
        wall, residual = _line(sizes, np.array([each.seconds for each in own]))
        on_cpu = np.array([each.cpu_seconds for each in own])
        cpu = _line(sizes, on_cpu)[0] if on_cpu.all() else wall
        made.append(
            Exchange(
                axis=axis, operation=operation, ranks=ranks, nodes=nodes, latency=wall[0], rate=wall[1],
                cpu_latency=cpu[0], cpu_rate=cpu[1], residual=residual,
            )
        )  # fmt: skip
    return made


def _line(sizes: Array, seconds: Array) -> tuple[tuple[float, float], float]:
    """Return latency and rate, and the median error of latency + size / rate."""

    def errors(values: Array) -> Array:
        return np.asarray(np.log((values[0] + sizes / values[1]) / seconds))

    latency, rate = fit_logs(errors, [float(seconds.min()), float(sizes.max() / seconds.max())])
    return (latency, rate), float(np.median(np.abs(np.expm1(errors(np.array([latency, rate]))))))
