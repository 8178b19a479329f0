"""What a rank holds of a microbatch between two actions."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Flight:
    """What this rank holds of one microbatch in one stage, from one action to the next.

    Attributes:
        hidden: the stage's input, [batch, local seq, hidden]; None on the first stage.
        output: the stage's output (on the last stage the loss, a scalar) with its graph.
        grad: the gradient of `output` where a stage of this rank has computed it; after the backward, the gradient of
            `hidden` until it is sent.
        later: after an I, what computes the weight gradients.
    """

    hidden: Tensor | None = None
    output: Tensor | None = None
    grad: Tensor | None = None
    later: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether nothing is held any more."""
        return self.hidden is None and self.output is None and self.grad is None and not self.later
