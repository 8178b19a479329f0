"""Ladders on a trainer whose law is known: quick, and the best rate, batch and loss of every model are too."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trimaran.runtime.tune.ladder import FIELDS, Ladder, ladder_of
from trimaran.runtime.tune.space import Part, Space, space_of
from trimaran.runtime.tune.study import CurvePoint, Trial
from trimaran.runtime.tune.transfer import carried_values
from trimaran.runtime.tune.tune_spec import TuneSpec

BASE: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 160},
    "data": {"tokenizer_vocab_size": 257, "held_out_fraction": 0.02},
    "optimizer": {"lr": 3e-3},
    "lr_schedule": {"warmup_steps": 20},
    "train": {
        "num_steps": 200, "global_batch_size": 8, "micro_batch_size": 2, "seq_len": 32, "eval_interval": 50,
        "output_dir": "runs/base",
    },
    "launcher": {"device": "cpu"},
}  # fmt: skip
WIDTHS = (32, 48, 64, 96, 128)
RATES = {"low": 1e-4, "high": 0.1024, "log": True, "step": 2}
BATCHES = {"values": [2, 4, 8, 16, 32, 64]}


def shape(width: int) -> dict[str, Any]:
    return {"hidden_size": width, "num_heads": width // 16, "ffn_hidden_size": width * 5 // 2}


def record(**changes: Any) -> TuneSpec:
    ladder = {"rungs": [shape(width) for width in WIDTHS], "vary": ["rate"], "target": shape(256)} | changes.pop(
        "ladder", {}
    )
    fields = {"base": "base.yaml", "space": {"optimizer.lr": RATES}, "search": {"sampler": "grid"}} | changes
    return TuneSpec.model_validate({**fields, "ladder": ladder})


def read(**changes: Any) -> tuple[Ladder, Space]:
    tune = record(**changes)
    space, errors = space_of(tune.space, BASE, "base.yaml", is_grid=True)
    assert not errors
    ladder, errors = ladder_of(tune, space)
    assert ladder is not None, errors
    return ladder, space


def best_rate(n: float, d: float) -> float:
    return float(40 * n**-0.7 * (d / n) ** 0.2)


def best_batch(n: float, d: float) -> float:
    return float(0.02 * d**0.45)


def loss_of(n: float, d: float) -> float:
    return float(1.5 + 60 / n**0.35 + 80 / d**0.35)


def trials_of(ladder: Ladder, space: Space, noise: float = 0.0) -> list[Trial]:
    """Every grid point of every part, trained by a trainer with a known law; the highest rates diverge."""
    random, trials = np.random.default_rng(0), list[Trial]()
    for part in ladder.parts(None):
        (n,) = (rung.parameters for rung in ladder.rungs if rung.name == part.rung)
        for values in values_of(part, ladder, space, trials):
            trials.append(trained(len(trials), values, n, space, part, noise * random.standard_normal()))
    return trials


def values_of(part: Part, ladder: Ladder, space: Space, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    if part.follows is not None:
        base = [trial for trial in trials if trial.rung == part.follows]
        return [carried_values([FIELDS[name] for name in ladder.names], base) or {}]
    points = itertools.product(*(range(dimension.num_points or 0) for dimension in space.dimensions))
    return [space.values_at(point) for point in points]


def trained(number: int, values: dict[str, Any], n: int, space: Space, part: Part, noise: float) -> Trial:
    rate, batch = values["optimizer.lr"], values.get("train.global_batch_size", 8)
    tokens_per_step = batch * 32
    d = round((part.tokens or 0) / tokens_per_step) * tokens_per_step
    off = math.log(rate / best_rate(n, d))
    loss = loss_of(n, d) + 0.03 * off**2 + noise
    if "train.global_batch_size" in values:
        loss += 0.02 * math.log(batch / best_batch(n, d)) ** 2
    diverged = off > math.log(20)
    return Trial(
        number=number, values=values, state="diverged" if diverged else "complete", flops=6.0 * n * d,
        objectives=None if diverged else (loss,), folder=f"trials/{number:05d}", tokens=d, parameters=n, rung=part.rung,
        curve=tuple(CurvePoint(step=k, tokens=k * d // 4, held_out_loss=loss * (4 / k) ** 0.3) for k in range(1, 5)),
    )  # fmt: skip
