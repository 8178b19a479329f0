"""Published laws of the best learning rate and batch, as data, to stand beside a fitted one.

Each was found on other text, with another schedule and tokenizer, on models far larger than a ladder's first rungs:
they tell the order of magnitude.
"""

from dataclasses import dataclass
from typing import Final, Literal

Quantity = Literal["rate", "batch"]


@dataclass(frozen=True)
class Scale:
    """How large a run is, in the counts that the laws are written in.

    Attributes:
        parameters: all of them.
        parameters_without_embeddings: without the tables of tokens and positions and an untied head.
        tokens: of the whole run.
        flops_without_embeddings: of the whole run, of its layers alone.
    """

    parameters: float
    parameters_without_embeddings: float
    tokens: float
    flops_without_embeddings: float


@dataclass(frozen=True)
class PublishedLaw:
    """One law: ``factor`` times powers of the scale; a batch is in tokens.

    Attributes:
        exponents: by attribute of `Scale`.
        formula: as it was published.
        source: the paper or file, and the place in it.
        read_in: where the formula was read for this table: the code that computes it, or texts that print it.
    """

    name: str
    quantity: Quantity
    factor: float
    exponents: dict[str, float]
    formula: str
    source: str
    read_in: str

    def at(self, scale: Scale) -> float:
        """Return what the law says of a run."""
        value = self.factor
        for name, exponent in self.exponents.items():
            value *= float(getattr(scale, name)) ** exponent
        return value


_OLMO: Final = "OLMo's model ladder (Bhagia et al. 2024), after Porian et al. 2024"
_OLMO_FILE: Final = "allenai/OLMo: scripts/ladder.py, config_from_args"
_DEEPSEEK: Final = "DeepSeek LLM (DeepSeek-AI 2024, arXiv 2401.02954), section 3.1, equation 1; C of equation 2"
_DEEPSEEK_TEXT: Final = "notes that print it: mrshaw01/software-engineer, docs/deepseek/1-DeepSeek-V1.md"
_STEP: Final = "Step Law (Li et al. 2025, arXiv 2503.04715), the law that its abstract announces"
_STEP_TEXT: Final = "summaries of the paper that print both and say that N is without embeddings"
_SEQUENCE: Final = 2048  # tokens of a sequence of OLMo's ladder

PUBLISHED: Final = (
    PublishedLaw(
        "OLMo ladder",
        "rate",
        0.0047 * 108e6 ** (1 / 3),
        {"parameters": -1 / 3},
        "0.0047 (N / 108e6)^(-1/3)",
        _OLMO,
        _OLMO_FILE,
    ),
    PublishedLaw(
        "OLMo ladder",
        "batch",
        160 * _SEQUENCE * 108e6 ** (-2 / 3),
        {"parameters": 2 / 3},
        "160 (N / 108e6)^(2/3) sequences of 2048 tokens",
        _OLMO,
        _OLMO_FILE,
    ),
    PublishedLaw(
        "DeepSeek LLM",
        "rate",
        0.3118,
        {"flops_without_embeddings": -0.1250},
        "0.3118 C^-0.1250",
        _DEEPSEEK,
        _DEEPSEEK_TEXT,
    ),
    PublishedLaw(
        "DeepSeek LLM",
        "batch",
        0.2920,
        {"flops_without_embeddings": 0.3271},
        "0.2920 C^0.3271 tokens",
        _DEEPSEEK,
        _DEEPSEEK_TEXT,
    ),
    PublishedLaw(
        "Step Law",
        "rate",
        1.79,
        {"parameters_without_embeddings": -0.713, "tokens": 0.307},
        "1.79 N^-0.713 D^0.307",
        _STEP,
        _STEP_TEXT,
    ),
    PublishedLaw("Step Law", "batch", 0.58, {"tokens": 0.571}, "0.58 D^0.571 tokens", _STEP, _STEP_TEXT),
)
