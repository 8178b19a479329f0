"""The law of a loss over parameters and tokens, with its intervals.

The loss of a run of N parameters and D tokens is E + A / N^a + B / D^b (Hoffmann et al. 2022, equation 10). At one
ratio of D to N the two terms can't be told apart, and the loss is E + C / N^c. As in the paper's section 3.3, the
logarithm of a law is a log-sum-exp of terms that are linear in its constants, the Huber loss of the residuals of
log(loss) is minimised by L-BFGS, and the best of many starts counts.

Every number has a 95% interval. It comes from a parametric bootstrap: losses are drawn anew around the fit, with a
scatter that is itself drawn from what the residuals leave open, and fitted again. So a fit needs more runs than it has
constants, and is refused without them.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from trimaran.runtime.plan.scaling.figures import (
    DRAWS,
    LEAST_SPREAD,
    SEED,
    Array,
    Interval,
    Run,
    ScalingError,
    check_ratio,
    exp,
    interval_of,
    is_one_ratio,
    scipy_is_needed,
)

ONE_RATIO: Final = "E + C/N^c"
SEVERAL_RATIOS: Final = "E + A/N^a + B/D^b"
_NAMES: Final = {ONE_RATIO: ("E", "C", "c"), SEVERAL_RATIOS: ("E", "A", "a", "B", "b")}
_HUBER: Final = 1.345  # in deviations: 95 % of the efficiency of least squares (Huber 1981)
_LEAST_DELTA: Final = 1e-3  # Hoffmann et al. 2022, section 3.3
_MOST_STEPS: Final = 50
_FIRST_STEPS: Final = 8  # of every start, after which the lowest go on
_KEPT_STARTS: Final = 20


@dataclass(frozen=True)
class LossLaw:
    """A fitted law of the loss.

    Attributes:
        form: ONE_RATIO or SEVERAL_RATIOS.
        constants: by the name they have in `form`.
        scatter: standard deviation of log(loss) around the law.
        ratio: tokens a parameter of the runs, of a law of ONE_RATIO.
        largest: parameters of the largest run, for telling how far a prediction reaches.
        center: [2, 1], means of the logarithms of the runs' parameters and tokens.
        draws: [draws, constants], of the bootstrap; see `_features`.
    """

    form: str
    constants: Mapping[str, Interval]
    scatter: float
    ratio: float | None
    largest: float
    center: Array = field(repr=False)
    _point: Array = field(repr=False)
    draws: Array = field(repr=False)
    _noise: Array = field(repr=False)

    def curve(self, parameters: float, tokens: float) -> Interval:
        """Return the law's loss, with the interval of the law itself.

        Raises ScalingError where the law says nothing of this ratio of tokens to parameters.
        """
        return self._at(parameters, tokens, 0.0)

    def predict(self, parameters: float, tokens: float) -> Interval:
        """Return the loss to expect of a run, with an interval that one more run lies in, its own scatter included.

        Raises ScalingError where the law says nothing of this ratio of tokens to parameters.
        """
        return self._at(parameters, tokens, 1.0)

    def _at(self, parameters: float, tokens: float, noise: float) -> Interval:
        check_ratio(self.ratio, tokens / parameters)
        features = _features(self.form, np.log([[parameters], [tokens]]) - self.center)
        drawn = _log_loss(self.draws, features)[:, 0] + noise * self._noise
        return interval_of(float(_log_loss(self._point[None], features)[0, 0]), drawn, exp)


def fit_loss(runs: Sequence[Run], delta: float | None = None, draws: int = DRAWS) -> LossLaw:
    """Return the law of the runs: SEVERAL_RATIOS where their tokens and parameters differ apart, else ONE_RATIO.

    Args:
        delta: residual of log(loss) from which on the Huber loss is linear; by default 1.345 deviations of the
            residuals, and 0.001 at least.
        draws: of the bootstrap.

    Raises ScalingError where the runs are too few.
    """
    return _fit(ONE_RATIO if is_one_ratio([run.ratio for run in runs]) else SEVERAL_RATIOS, runs, delta, draws)


def fit_two_variables(runs: Sequence[Run], delta: float | None = None, draws: int = DRAWS) -> LossLaw:
    """Return E + A/N^a + B/D^b; see `fit_loss`.

    Raises ScalingError where N and D can't be told apart, or the runs are too few.
    """
    return _fit(SEVERAL_RATIOS, runs, delta, draws)


@dataclass(frozen=True)
class HeldOut:
    """A run that a law was fitted without, beside what the law says of it."""

    run: Run
    predicted: Interval

    @property
    def error(self) -> float:
        """How far the predicted loss lies above the measured one, as a share of it."""
        return self.predicted.value / self.run.loss - 1


def hold_out(runs: Sequence[Run], parameters: float, delta: float | None = None) -> list[HeldOut]:
    """Return the runs of one size, each with the loss that a law of the other sizes predicts.

    Raises ScalingError where the other runs are too few.
    """
    law = fit_loss([run for run in runs if run.parameters != parameters], delta)
    return [HeldOut(run, law.predict(run.parameters, run.tokens)) for run in runs if run.parameters == parameters]


def runs_needed(form: str) -> int:
    """Return how many runs a law needs, one more than its constants: with as many it goes through each of them, and
    nothing says how far off it is."""
    return len(_NAMES[form]) + 1


def _check_runs(form: str, runs: Sequence[Run]) -> None:
    needed, sizes = runs_needed(form), len({run.parameters for run in runs})
    if form == ONE_RATIO and sizes < needed:
        raise ScalingError(
            f"{form} has {needed - 1} constants and needs {needed} sizes of the model or more for an interval, "
            f"got {sizes}; add rungs"
        )
    if form == ONE_RATIO:
        return
    logs = np.log([(run.parameters, run.tokens) for run in runs]).reshape(-1, 2)
    if len(runs) >= 2:
        line = np.column_stack([np.ones(len(runs)), logs[:, 0]])
        apart = logs[:, 1] - line @ np.linalg.lstsq(line, logs[:, 1], rcond=None)[0]
        if np.abs(apart).max() <= math.log(LEAST_SPREAD) / 2:
            raise ScalingError(
                "the tokens of the runs follow from their parameters, so that A/N^a and B/D^b can't be told apart; "
                "give several values of tokens_per_parameter, such as [10, 20, 40]"
            )
    if len(runs) < needed or sizes < 3 or len({run.tokens for run in runs}) < 3:
        raise ScalingError(
            f"{form} has {needed - 1} constants and needs {needed} runs or more, of 3 sizes of the model and 3 counts "
            f"of tokens, got {len(runs)} of {sizes} sizes; add rungs, or values of tokens_per_parameter"
        )


def _fit(form: str, runs: Sequence[Run], delta: float | None, draws: int) -> LossLaw:
    _check_runs(form, runs)
    logs = np.log([(run.parameters, run.tokens) for run in runs]).T
    losses = np.log([run.loss for run in runs])
    center = logs.mean(axis=1, keepdims=True)
    features = _features(form, logs - center)
    free = len(runs) - len(_NAMES[form])
    point = _best_of_starts(features, losses, delta or _LEAST_DELTA)
    if delta is None:
        delta = max(_LEAST_DELTA, _HUBER * _scatter(point, features, losses, free))
    point = _polished(point, features, losses, delta)
    scatter = _scatter(point, features, losses, free)
    random = np.random.default_rng(SEED)
    deviations = scatter * np.sqrt(free / random.chisquare(free, draws))
    fitted = _log_loss(point[None], features)
    drawn_losses = fitted + deviations[:, None] * random.standard_normal((draws, len(runs)))
    drawn = _refit(np.tile(point, (draws, 1)), features, drawn_losses, delta)
    constants = {}
    for index, name in enumerate(_NAMES[form]):
        both = np.vstack([point, drawn])
        column = both[:, index]
        if name in ("A", "B", "C"):
            column = column + both[:, index + 1] * center[int(name == "B"), 0]
        constants[name] = interval_of(float(column[0]), column[1:], exp if name.isupper() else np.asarray)
    ratio = float(np.exp(np.mean(logs[1] - logs[0]))) if form == ONE_RATIO else None
    noise = deviations * random.standard_normal(draws)
    largest = max(run.parameters for run in runs)
    return LossLaw(form, constants, scatter, ratio, largest, center, point, drawn, noise)


def _features(form: str, logs: Array) -> Array:
    """Return [constant, term, run]: the logarithm of each term of a law is the sum of constants times features.

    The constants are log E and, of every further term, the logarithm of its factor and its exponent.

    Args:
        logs: [2, run], the logarithms of parameters and tokens, less their means: a factor is not determined by itself
            where the exponent's power of a large number stands beside it.
    """
    names = _NAMES[form]
    features = np.zeros((len(names), (len(names) + 1) // 2, logs.shape[1]))
    features[0, 0] = 1.0
    for term in range(1, features.shape[1]):
        features[2 * term - 1, term] = 1.0
        features[2 * term, term] = -logs[term - 1]
    return features


def _shares(constants: Array, features: Array) -> tuple[Array, Array]:
    """Return the logarithm of the loss, [fit, run], of each fit's constants, and the share of each term in it, [fit,
    term, run]."""
    terms = (constants @ features.reshape(len(features), -1)).reshape(-1, *features.shape[1:])
    largest = terms.max(axis=1)
    parts = np.exp(terms - largest[:, None])
    total = parts.sum(axis=1)
    return largest + np.log(total), parts / total[:, None]


def _log_loss(constants: Array, features: Array) -> Array:
    """Return the logarithm of the loss, [fit, run], of each fit's constants."""
    return _shares(constants, features)[0]


def _jacobian(shares: Array, features: Array) -> Array:
    """Return the derivatives of the logarithm of the loss by the constants, [fit, constant, run].

    Args:
        shares: of each term, from `_shares`.
    """
    # a constant stands in one term alone
    term_of = [(constant + 1) // 2 for constant in range(len(features))]
    return np.asarray(shares[:, term_of] * features[range(len(features)), term_of])


def _huber(residuals: Array, delta: float) -> Array:
    sizes = np.abs(residuals)
    return np.asarray(np.where(sizes <= delta, 0.5 * residuals**2, delta * (sizes - 0.5 * delta)))


def _scatter(point: Array, features: Array, losses: Array, free: int) -> float:
    residuals = losses - _log_loss(point[None], features)[0]
    return math.sqrt(float(residuals @ residuals) / free)


def _best_of_starts(features: Array, losses: Array, delta: float) -> Array:
    """Return about the constants with the least Huber loss: of many starts the one that comes lowest."""
    found, kept = _starts(features, losses), _KEPT_STARTS
    for steps in (_FIRST_STEPS, _MOST_STEPS):
        found = _refit(found, features, np.tile(losses, (len(found), 1)), delta, steps)
        order = np.argsort(_huber(_log_loss(found, features) - losses, delta).sum(-1), kind="stable")
        found, kept = found[order[:kept]], 1
    return np.asarray(found[0])


def _polished(start: Array, features: Array, losses: Array, delta: float) -> Array:
    """Return the constants with the least Huber loss near `start`, by L-BFGS."""
    with scipy_is_needed():
        from scipy.optimize import minimize

    def objective(constants: Array) -> tuple[float, Array]:
        (logs,), shares = _shares(constants[None], features)
        residuals = logs - losses
        scale = 1 / delta**2  # so that the optimizer's tolerances fit
        slope = _jacobian(shares, features)[0] @ np.clip(residuals, -delta, delta)
        return scale * float(_huber(residuals, delta).sum()), scale * slope

    options: dict[str, Any] = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20}
    return np.asarray(minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x)


def _starts(features: Array, losses: Array) -> Array:
    """Return a grid over E and the exponents, [start, constant]; each term's factor is as large as the loss allows."""
    shares, exponents = (0.02, 0.4, 0.7, 0.9, 0.97), (0.05, 0.15, 0.3, 0.6, 1.2)
    starts = []
    for share, *powers in itertools.product(shares, *([exponents] * (features.shape[1] - 1))):
        rest = math.log((1 - share) * float(np.exp(losses.min())) / len(powers))
        starts.append([losses.min() + math.log(share), *itertools.chain(*((rest, power) for power in powers))])
    return np.array(starts)


def _refit(starts: Array, features: Array, losses: Array, delta: float, most_steps: int = _MOST_STEPS) -> Array:
    """Return the constants fitted from each row of `starts` to the same row of `losses`, all rows at once.

    By Levenberg and Marquardt's steps on the squares that the Huber loss equals at each step.
    """
    fits, moving = starts.copy(), np.arange(len(starts))
    here, goal, damping = starts, losses, np.full(len(starts), 1e-3)
    logs, shares = _shares(here, features)
    value = _huber(logs - goal, delta).sum(-1)
    for _ in range(most_steps):
        residuals, slopes = goal - logs, _jacobian(shares, features)
        weighted = np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))[:, None] * slopes
        normal = weighted @ slopes.swapaxes(1, 2)
        diagonal = np.maximum(np.diagonal(normal, axis1=1, axis2=2), 1e-12)
        damped = normal + (damping[:, None] * diagonal)[..., None] * np.eye(fits.shape[1])
        steps = np.clip(np.linalg.solve(damped, weighted @ residuals[..., None])[..., 0], -2.0, 2.0)
        new_logs, new_shares = _shares(here + steps, features)
        new = _huber(new_logs - goal, delta).sum(-1)
        gain = value - new
        better = gain > 0
        here = np.where(better[:, None], here + steps, here)
        logs = np.where(better[:, None], new_logs, logs)
        shares = np.where(better[:, None, None], new_shares, shares)
        value = np.where(better, new, value)
        damping = np.clip(damping * np.where(better, 0.2, 5.0), 1e-9, 1e9)
        fits[moving] = here
        goes_on = ~np.where(better, gain <= 1e-6 * new, damping > 1e3)
        if not goes_on.all():
            moving, here, goal, logs = moving[goes_on], here[goes_on], goal[goes_on], logs[goes_on]
            shares, value, damping = shares[goes_on], value[goes_on], damping[goes_on]
        if not len(moving):
            break
    return fits
