"""How much of a long run is progress: failures, the best interval between checkpoints, restarts.

failures      GPU-hours x rate; by default one in 50,700 GPU-hours (Llama 3, section 3.3.4: 419 in 54 days on 16,384)
Young 1974    interval = sqrt(2 x save x MTBF)
Daly 2006     equation 37: sqrt(2 d M) (1 + sqrt(d / (2 M)) / 3 + d / (18 M)) - d; the MTBF where d >= 2 M
goodput       1 - save / interval - (interval / 2 + restart) / MTBF
"""

import math
from typing import Final

import numpy as np

HOURS_PER_FAILURE: Final = 50_700.0
"""GPU-hours between two failures."""


def mean_time_between_failures(gpus: int, gpu_hours_per_failure: float = HOURS_PER_FAILURE) -> float:
    """Return the seconds between two failures of a run."""
    return gpu_hours_per_failure * 3600 / gpus


def young(save: float, mtbf: float) -> float:
    """Return the seconds between two checkpoints, for a save and a mean time between failures in seconds."""
    return math.sqrt(2 * save * mtbf)


def daly(save: float, mtbf: float) -> float:
    """Return the seconds between two checkpoints by the higher-order estimate."""
    if save >= 2 * mtbf:
        return mtbf
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(save / (2 * mtbf)) / 3 + save / (18 * mtbf)) - save


def goodput(interval: float, save: float, restart: float, mtbf: float) -> float:
    """Return the share of the time that is progress, by the first-order formula; 0 where it would be less."""
    return max(0.0, 1 - save / interval - (interval / 2 + restart) / mtbf)


def simulated_goodput(
    interval: float, save: float, restart: float, mtbf: float, *, failures: int = 2000, seed: int = 0
) -> float:
    """Return the share of progress over as many failures, at times that are drawn from an exponential distribution.

    Work since the last checkpoint is lost; a failure during a save or a restart costs that too.
    """
    up = np.random.default_rng(seed).exponential(mtbf, failures)
    working = np.maximum(0.0, up - restart)
    saved = np.floor(working / (interval + save)) * interval
    return float(saved.sum() / up.sum())
