"""The score head: one number for a position, from the state that the output projection reads; rewards and values."""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimaran.kernels.random import fill_normal_
from trimaran.models.config import TransformerConfig
from trimaran.models.parallel.collectives import gather_sequence
from trimaran.models.parallel.parameter import InitSpec, LayerContext, new_parameter

SCORE_WEIGHT: Final = "score.weight"
"""Global name of the head's parameter."""


def drawn_score_weight(hidden_size: int, seed: int) -> Tensor:
    """Return the weight of a new head [1, hidden], float32, as `initialize` draws it."""
    shape = (1, hidden_size)
    place: dict[str, Any] = {"global_shape": shape, "dim": None, "offset": 0}
    out = torch.empty(shape, dtype=torch.float32)
    fill_normal_(out, seed=seed, name=SCORE_WEIGHT, std=_deviation(hidden_size), **place)
    return out


def _deviation(hidden_size: int) -> float:
    return float((hidden_size + 1) ** -0.5)


class ScoreHead(nn.Module):
    """hidden -> 1, without a bias.

    Every tp rank holds all of it and computes the same: it is one row. Its deviation is (hidden + 1) ** -0.5 (Stiennon
    et al. 2020, appendix B.1), which is about 1 for a score of normed states.
    """

    def __init__(self, config: TransformerConfig, context: LayerContext) -> None:
        super().__init__()
        self.context = context
        start = InitSpec(_deviation(config.hidden_size))
        self.weight = new_parameter((1, config.hidden_size), context, init_spec=start)

    def forward(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the scores of positions [rows], float32 (float64 for float64), the same on all tp ranks.

        Args:
            hidden: [batch, local seq, hidden], the output of the last stage's layers.
            rows: [rows] int64, positions in the flattened batch * seq.
        Collective over tp with sequence parallelism, in the forward and in the backward pass.
        """
        if self.context.sequence_parallel:
            hidden = gather_sequence(hidden, self.context.tp)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        chosen = hidden.flatten(0, 1).index_select(0, rows)
        return F.linear(chosen.to(dtype), self.weight.to(dtype)).squeeze(1)
