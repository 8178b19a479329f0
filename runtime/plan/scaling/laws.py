"""Published laws of the loss over parameters and tokens, and what they say is best. No torch.

The loss is E + A/N^a + B/D^b. At a compute of C = 6 N D it is least where a A/N^a = b B/D^b (Hoffmann et al. 2022,
equation 4), so N = G (C/6)^(b/(a+b)) with G = (a A / (b B))^(1/(a+b)).
"""

import math
import re
from dataclasses import dataclass
from typing import Final

FLOPS_PER_PARAMETER_AND_TOKEN: Final = 6.0
TOKENS_PER_PARAMETER: Final = 20.0
"""The rule that is drawn from Hoffmann et al. 2022."""
LARGEST_RUN: Final = 1.3e22
"""FLOP of the largest of the runs that both laws are fits of (Hoffmann et al. 2022, figure 4)."""
_UNITS: Final = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class LossFormula:
    """A law of the loss with its constants.

    Attributes:
        note: what a reader must know of it; "" for nothing.
    """

    name: str
    e: float
    a_factor: float
    a: float
    b_factor: float
    b: float
    source: str
    note: str = ""

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss, in nats a token of the law's own text."""
        return float(self.e + self.a_factor / parameters**self.a + self.b_factor / tokens**self.b)

    def tokens_for(self, parameters: float) -> float:
        """Return the tokens at which a model of this size is the best of its compute."""
        return float((self.b * self.b_factor * parameters**self.a / (self.a * self.a_factor)) ** (1 / self.b))

    def parameters_for(self, tokens: float) -> float:
        """Return the parameters for which so many tokens are the best of their compute."""
        return float((self.a * self.a_factor * tokens**self.b / (self.b * self.b_factor)) ** (1 / self.a))

    def best(self, flops: float) -> tuple[float, float]:
        """Return the parameters and tokens with the least loss at this compute."""
        both = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        factor = (self.a * self.a_factor / (self.b * self.b_factor)) ** (1 / (self.a + self.b))
        parameters = factor * both ** (self.b / (self.a + self.b))
        return parameters, both / parameters

    def flops_for(self, loss: float) -> float:
        """Return the least compute that reaches a loss above E, to 1e-9 relative, by bisection of its logarithm."""
        low, high = math.log(1e6), math.log(1e40)
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self.loss(*self.best(math.exp(middle))) > loss else (low, middle)
        return math.exp(high)

    def waste(self, parameters: float, tokens: float) -> float:
        """Return the compute of a run over the least compute that reaches its loss."""
        return FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens / self.flops_for(self.loss(parameters, tokens))


DEFAULT: Final = LossFormula(
    "Besiroglu 2024", 1.8172, 482.01, 0.3478, 2085.43, 0.3658, "Besiroglu et al. 2024, fit of Hoffmann's 240 runs"
)
LAWS: Final = (
    DEFAULT,
    LossFormula(
        "Hoffmann 2022, rounded", 1.69, 406.4, 0.34, 410.7, 0.28, "Hoffmann et al. 2022, equation 10",
        "its rounded constants give 32B at 5.76e23 FLOP, where the paper's other approaches say 63B to 67B",
    ),
)  # fmt: skip


def read_count(text: str, name: str) -> float:
    """Return the number in `7e9`, `7b`, `1.4T` or `400M`.

    Raises:
        ValueError: it is none of at least 1; bytes are told apart.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?) ?([kmbgt]?)", text.strip(), re.IGNORECASE)
    value = float(found[1]) * _UNITS[found[2].lower()] if found else math.nan
    if not (math.isfinite(value) and value >= 1):
        is_bytes = re.search(r"[0-9] ?[kmgt]i?b$", text.strip(), re.IGNORECASE)
        hint = "that is a size in bytes; write a count" if is_bytes else "write a count"
        raise ValueError(f"{name} {text!r}: {hint}, such as 7b or 7e9")
    return value
