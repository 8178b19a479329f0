"""What to try next: a pure function of the seed, the number of the proposal, and the trials that have finished.

Only this file imports optuna, cmaes and scipy. Nothing is kept between proposals: all of it is made anew from the
study, so a process that was killed has lost nothing.
"""

import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Final

from trimaran.runtime.plan.scaling.figures import INSTALL
from trimaran.runtime.tune.space import Dimension, Space, Values
from trimaran.runtime.tune.study import Trial
from trimaran.runtime.tune.tune_spec import ObjectiveSection, SearchSection

Coordinates = Sequence[float]
_MOST_DRAWS: Final = 1000


def propose(
    search: SearchSection, objectives: Sequence[ObjectiveSection], space: Space, part: int, trials: Sequence[Trial]
) -> Coordinates | None:
    """Return a coordinate for each dimension of the space; None where a grid is at its end.

    Values that a trial has had would give its losses again: where a sampler proposes such, others are drawn at random.

    Args:
        part: the number of the part of the study (`space.Part`).
        trials: those of the part so far.
    """
    found = _SAMPLERS[search.sampler](search, objectives, space, part, trials)
    tried = {_written(trial.values) for trial in trials}
    if found is None or _written(space.values_at(found)) not in tried:
        return found
    draw = _seed(search, part, len(trials))
    others = ([dimension.coordinate_at(draw.random()) for dimension in space.dimensions] for _ in range(_MOST_DRAWS))
    return next((each for each in others if _written(space.values_at(each)) not in tried), found)


def _written(values: Values) -> str:
    """Return the same text for the same values."""
    return repr(sorted(values.items()))


def importances(objectives: Sequence[ObjectiveSection], space: Space, trials: Sequence[Trial]) -> dict[str, float]:
    """Return the share of the first objective's variance that each dimension explains (fANOVA, Hutter et al. 2014).

    Only finished trials count; empty where they are fewer than the dimensions and two, or all alike.

    Raises ValueError where optuna or scikit-learn is missing.
    """
    told = [trial for trial in trials if trial.state == "complete" and trial.objectives is not None]
    varied = [
        each for each in space.dimensions if not each.when and len({repr(trial.values[each.key]) for trial in told}) > 1
    ]
    if not varied or len(told) < len(varied) + 2 or len({trial.objectives for trial in told}) < 2:
        return {}
    if find_spec("optuna") is None or find_spec("sklearn") is None:
        raise ValueError(f"importance needs the packages optuna and scikit-learn; {INSTALL}")
    optuna = _package("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {dimension.key: _distribution(optuna, dimension) for dimension in varied}
    study = optuna.create_study()
    for trial, losses in zip(told, losses_of(objectives, told), strict=True):
        params = {each.key: each.coordinate_of(trial.values[each.key]) for each in varied}
        assert losses is not None, "a complete trial has objectives"
        study.add_trial(optuna.trial.create_trial(value=losses[0], params=params, distributions=distributions))
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=16, seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def check_sampler(search: SearchSection, space: Space) -> None:
    """Raise ValueError where the sampler's package is missing, or it can't do anything with the space."""
    needed = {"tpe": "optuna", "cmaes": "cmaes", "qmc": "scipy"}.get(search.sampler)
    if needed is not None and find_spec(needed) is None:  # to import it takes a third of a second
        raise ValueError(f"search.sampler {search.sampler} needs the package {needed}; {INSTALL}")
    if search.sampler == "cmaes" and not any(dimension.is_ordered for dimension in space.dimensions):
        raise ValueError("search.sampler cmaes moves in ranges, and space has none; take tpe or random")


def draws(space: Space, count: int) -> Iterator[Coordinates]:
    """Yield random coordinates of the space, the same every time."""
    draw = random.Random(0)
    for _ in range(count):
        yield [dimension.coordinate_at(draw.random()) for dimension in space.dimensions]


def _package(name: str) -> Any:
    """Return a package whose types mypy does not know; `check_sampler` has found it."""
    return import_module(name)


def _seed(search: SearchSection, part: int, number: int) -> random.Random:
    return random.Random(f"{search.seed} {part} {number}")


def _random(search: SearchSection, _: object, space: Space, part: int, trials: Sequence[Trial]) -> Coordinates:
    draw = _seed(search, part, len(trials))
    return [dimension.coordinate_at(draw.random()) for dimension in space.dimensions]


def _grid(search: SearchSection, _: object, space: Space, part: int, trials: Sequence[Trial]) -> Coordinates | None:
    """Return the first point that no trial has tried, of a grid that may have been widened since.

    Where only some are wanted, in a shuffled order.
    """
    ranges = [range(dimension.num_points or 0) for dimension in space.dimensions]
    points: Iterable[Coordinates] = (
        point for point in itertools.product(*ranges) if _is_first_of_its_values(space, point)
    )
    if search.trials is not None and search.trials < math.prod(map(len, ranges)):
        shuffled = list(points)
        _seed(search, part, -1).shuffle(shuffled)
        points = shuffled
    tried = {_written(trial.values) for trial in trials}
    return next((point for point in points if _written(space.values_at(point)) not in tried), None)


def _is_first_of_its_values(space: Space, point: Coordinates) -> bool:
    """Whether dimensions that don't exist at this point are at their first coordinate: one point for equal values."""
    values = space.values_at(point)
    return all(
        not coordinate or dimension.key in values for dimension, coordinate in zip(space.dimensions, point, strict=True)
    )


def _qmc(search: SearchSection, _: object, space: Space, part: int, trials: Sequence[Trial]) -> Coordinates:
    """Return the next point of a scrambled Sobol sequence (Owen 1998)."""
    engine = _package("scipy.stats").qmc.Sobol(
        len(space.dimensions), scramble=True, rng=_seed(search, part, -1).getrandbits(32)
    )
    if trials:
        engine.fast_forward(len(trials))
    (shares,) = engine.random(1)
    return [dimension.coordinate_at(float(share)) for dimension, share in zip(space.dimensions, shares, strict=True)]


def losses_of(objectives: Sequence[ObjectiveSection], trials: Sequence[Trial]) -> list[list[float] | None]:
    """Return what is to be made small of each trial, None of one that has told nothing.

    Of one that diverged, can't be started or was ended before it had a figure, it is worse than the worst by as much as
    lies between the worst and the best.
    """
    signs = [1.0 if objective.is_better_lower else -1.0 for objective in objectives]
    known = [
        [sign * value for sign, value in zip(signs, trial.objectives, strict=True)]
        for trial in trials
        if trial.objectives is not None and all(map(math.isfinite, trial.objectives))
    ]
    columns = list(zip(*known, strict=True)) or [(0.0,)] * len(signs)
    worst = [max(column) + (max(column) - min(column) or 1.0) for column in columns]
    found: list[list[float] | None] = []
    for trial in trials:
        if trial.objectives is not None and all(map(math.isfinite, trial.objectives)):
            found.append([sign * value for sign, value in zip(signs, trial.objectives, strict=True)])
        else:
            found.append(None if trial.state in ("running", "failed") else worst)
    return found


def _tpe(
    search: SearchSection,
    objectives: Sequence[ObjectiveSection],
    space: Space,
    part: int,
    trials: Sequence[Trial],
) -> Coordinates:
    """Return what the tree-structured Parzen estimator proposes (Bergstra et al. 2011; Watanabe 2023)."""
    optuna = _package("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {dimension.key: _distribution(optuna, dimension) for dimension in space.dimensions}
    sampler = optuna.samplers.TPESampler(multivariate=True, seed=_seed(search, part, len(trials)).getrandbits(32))
    study = optuna.create_study(directions=["minimize"] * len(objectives), sampler=sampler)
    for trial, losses in zip(trials, losses_of(objectives, trials), strict=True):
        if trial.state == "failed":
            continue
        given = {
            each.key: each.coordinate_of(trial.values[each.key])
            for each in space.dimensions
            if each.key in trial.values
        }
        states = optuna.trial.TrialState
        study.add_trial(
            optuna.trial.create_trial(
                state=states.RUNNING if losses is None else states.COMPLETE,
                values=losses,
                params=given,
                distributions={key: distributions[key] for key in given},
            )
        )
    # What does not exist beside the other values is asked for too, and left out by `Space.values_at`.
    params = study.ask(fixed_distributions=distributions).params
    return [float(params[dimension.key]) for dimension in space.dimensions]


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    count = dimension.num_points
    if count is None:
        return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    if dimension.is_ordered:
        return optuna.distributions.IntDistribution(0, count - 1)
    return optuna.distributions.CategoricalDistribution(range(count))


def _cmaes(
    search: SearchSection,
    objectives: Sequence[ObjectiveSection],
    space: Space,
    part: int,
    trials: Sequence[Trial],
) -> Coordinates:
    """Return what CMA-ES proposes for the ranges (Hansen 2016), and drawn values for the lists.

    Its state follows from the finished trials, told in their order, a generation at a time.
    """
    cmaes, numpy = _package("cmaes"), _package("numpy")
    ranges = [dimension for dimension in space.dimensions if dimension.is_ordered]
    seed = _seed(search, part, len(trials)).getrandbits(31)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy = cmaes.CMA(
            mean=numpy.full(len(ranges), 0.5),
            sigma=1 / 6,
            bounds=numpy.tile([0.0, 1.0], (len(ranges), 1)),
            seed=seed + 1,
            n_max_resampling=10 * len(ranges),
        )
    told: list[tuple[Any, float]] = []
    for trial, losses in zip(trials, losses_of(objectives, trials), strict=True):
        if losses is not None and all(dimension.key in trial.values for dimension in ranges):
            shares = [dimension.share_of(trial.values[dimension.key]) for dimension in ranges]
            told.append((numpy.array(shares), losses[0]))
            if len(told) == strategy.population_size:
                strategy.tell(told)
                told = []
    shares_by_key = dict(zip((dimension.key for dimension in ranges), strategy.ask(), strict=True))
    drawn = _random(search, objectives, space, part, trials)
    return [
        dimension.coordinate_at(min(float(shares_by_key[dimension.key]), math.nextafter(1, 0)))
        if dimension.is_ordered
        else coordinate
        for dimension, coordinate in zip(space.dimensions, drawn, strict=True)
    ]


_SAMPLERS: Final = MappingProxyType[str, Callable[..., Coordinates | None]](
    {"random": _random, "grid": _grid, "qmc": _qmc, "tpe": _tpe, "cmaes": _cmaes}
)
