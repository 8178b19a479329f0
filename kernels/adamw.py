"""AdamW (Loshchilov and Hutter 2019, algorithm 2) over flat tensors: torch's fused operator, one pass over memory.

m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p = p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim.adamw import adamw


@dataclass(frozen=True, eq=False)
class AdamWState:
    """What AdamW works on, four tensors of one shape and dtype, and the number of steps taken [scalar float32]."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def adamw_(states: Sequence[AdamWState], *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """Take one step in place: `param`, `exp_avg`, `exp_avg_sq` and `step` change, `grad` does not."""
    adamw(
        [state.param for state in states],
        [state.grad for state in states],
        [state.exp_avg for state in states],
        [state.exp_avg_sq for state in states],
        [],
        [state.step for state in states],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
