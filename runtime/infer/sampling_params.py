"""Settings of sampling and of the end of a continuation, validated without torch."""

import sys
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

_LARGEST: Final = sys.float_info.max
_SMALLEST: Final = 1e-30  # of what logits are divided by, which may be in float32
# Largest value of each; the random numbers take a seed of 63 bits, and everything else is counted in 31.
_MOST: Final = MappingProxyType(
    {
        "max_new_tokens": 2**31 - 1,
        "min_new_tokens": 2**31 - 1,
        "top_k": 2**31 - 1,
        "seed": 2**63 - 1,
        "temperature": _LARGEST,
    }
)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when a continuation ends.

    The filters work in this order: penalties, temperature, top_k, top_p, min_p.

    Args:
        max_new_tokens: longest continuation.
        temperature: logits are divided by it; 0 takes the likeliest token, and then no filter has an effect.
        top_k: only the k likeliest tokens may be drawn; 0 for all.
        top_p: only the likeliest tokens that together have this probability may be drawn; 1 for all (Holtzman et al.
            2020, section 3.1).
        min_p: only tokens with at least this share of the likeliest token's probability may be drawn; 0 for all (Nguyen
            et al. 2024, section 3).
        repetition_penalty: logits of tokens already in the text are divided by it if positive, else multiplied; 1 for
            none (Keskar et al., CTRL, 2019, section 4.1).
        min_new_tokens: no stop token is drawn before that many tokens.
        seed: the draw of a token depends on (seed, sample, number of the new token) alone.
        stop_tokens: a continuation ends after any of them.
        context: what happens when a text fills the model's context: "slide" continues from its newer half, "stop" ends
            it.
        presence_penalty: subtracted from the logits of tokens that are among the new ones, the prompt's aside; from -2
            to 2, 0 for none (OpenAI's API, "Advanced usage: frequency and presence penalties").
        frequency_penalty: the same for each time that the token is there.

    Raises ValueError for a value out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    context: Literal["slide", "stop"] = "slide"
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        # Written so that NaN is rejected too.
        for name, most in _MOST.items():
            value = getattr(self, name)
            if not 0 <= value <= most:
                below = "a finite number" if most == _LARGEST else f"at most {most:,}"
                raise ValueError(f"{name} ({value}) must " + ("not be negative" if value < 0 else f"be {below}"))
        if 0 < self.temperature < _SMALLEST:
            rule = f"temperature ({self.temperature}) must be at least {_SMALLEST:g}, or 0"
            raise ValueError(f"{rule}; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1; 1 leaves every token")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p ({self.min_p}) must be from 0 to 1; 0 leaves every token")
        if not _SMALLEST <= self.repetition_penalty <= 1 / _SMALLEST:
            between = f"from {_SMALLEST:g} to {1 / _SMALLEST:g}"
            raise ValueError(f"repetition_penalty ({self.repetition_penalty}) must be {between}; 1 changes nothing")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} ({getattr(self, name)}) must be from -2 to 2; 0 changes nothing")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) must not be above max_new_tokens ({self.max_new_tokens})"
            )
        if self.context not in ("slide", "stop"):
            raise ValueError(f"context ({self.context!r}) must be 'slide' or 'stop'")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def counts_tokens(self) -> bool:
        """Whether a token's logit depends on how often it is among the new ones."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
