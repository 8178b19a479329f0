"""muP's transfer (Yang et al. 2022): what is found at the base width is carried to wider models. No torch.

With `model.init: mup` the best learning rate does not depend on the width. The rate is searched at the width of the
smallest rung, and the target gets it as it is; initial deviations, rates of matrices and the factors of attention and
logits follow from `mup_base_width` (models/init.py). Weight decay, batch and length of training are not carried by the
theory, nor is depth.
"""

import math
from collections.abc import Sequence
from typing import Any

from trimaran.models.config import TransformerConfig
from trimaran.runtime.plan.scaling.figures import ScalingError
from trimaran.runtime.plan.scaling.optima import Optimum, find_optimum
from trimaran.runtime.tune.study import Trial


def carried_fields(base: TransformerConfig) -> dict[str, Any]:
    """Return the fields, by path, that make a model of any width the muP model whose base is `base`."""
    return {
        "model.init": "mup",
        "model.init_std": base.init_std,
        "model.mup_base_width": base.hidden_size,
        "model.mup_base_head_dim": base.head_dim,
    }


def optimum_of(keys: Sequence[str], trials: Sequence[Trial]) -> Optimum:
    """Return the best values of a rung's trials by a parabola over their logarithms.

    Args:
        keys: of the space, one or two.

    Raises ScalingError where the best is at an edge, or the trials are too few.
    """
    told = [trial for trial in trials if trial.state in ("complete", "diverged")]
    points = [tuple(float(str(trial.values[key])) for key in keys) for trial in told]
    losses = [trial.objectives[0] if trial.state == "complete" and trial.objectives else math.inf for trial in told]
    if not told:
        raise ScalingError("no trial has ended with a loss; see why in `trimaran tune status`")
    return find_optimum(keys, points, losses)


def carried_values(keys: Sequence[str], base_trials: Sequence[Trial]) -> dict[str, Any] | None:
    """Return the values that the other rungs get from the base rung; None while trials of it still run.

    Raises ScalingError as `optimum_of`.
    """
    if any(trial.state == "running" for trial in base_trials):
        return None
    at = optimum_of(keys, base_trials).at
    return {key: float(f"{best.value:.6g}") for key, best in zip(keys, at, strict=True)}
