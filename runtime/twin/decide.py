"""How a twin is trained, by the size and the language of its texts and by the model that is given. No torch."""

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

Method = Literal["adapter", "scratch"]
TOKENS_PER_PARAMETER: Final = 20
"""Hoffmann et al. 2022, Training Compute-Optimal Large Language Models."""
MOST_EPOCHS: Final = 4
"""Passes over the same text that teach about as much as new text (Muennighoff et al. 2023)."""
_SMALLEST_VOCABULARY, _LARGEST_VOCABULARY = 512, 32768
_CHARACTERS_PER_TOKEN: Final = 3.5
"""Of a tokenizer trained on the texts themselves, at the sizes chosen here; what counts are powers of two."""
_ENOUGH_TOKENS: Final = 50_000_000
"""A model of 10 million parameters, the least that writes connected sentences of its own."""
_MOST_TOKENS_PER_WORD: Final = 3.5
"""A tokenizer that cuts words into more than that has seen little of their language; English in its own has 1.3."""
_SHAPES: Final = ((2, 64), (2, 96), (3, 128), (4, 192), (6, 256), (8, 384), (10, 512), (12, 640), (12, 768))
_LANGUAGES: Final = MappingProxyType({"en": "English", "tr": "Turkish"})


@dataclass(frozen=True)
class Texts:
    """The texts that may be trained on.

    Args:
        language: ISO 639-1 code.
    """

    characters: int
    words: int
    language: str


@dataclass(frozen=True)
class GivenModel:
    """What the run of `--model` holds.

    Args:
        has_template: whether it takes turns.
        tokens: of a sample of the texts in its tokenizer.
        sample_words: words of that sample.
    """

    parameters: int
    has_template: bool
    tokens: int
    sample_words: int

    @property
    def tokens_per_word(self) -> float:
        """How finely its tokenizer cuts the texts' words."""
        return self.tokens / max(1, self.sample_words)


class Decision(BaseModel):
    """How a twin is trained, and why.

    Attributes:
        talks: whether it learns to take turns; else it learns to continue.
        reason: one sentence or more, for a user.
        vocabulary, num_layers, hidden_size: of a model from scratch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    talks: bool
    reason: str
    vocabulary: int | None = None
    num_layers: int | None = None
    hidden_size: int | None = None


def decide(texts: Texts, model: GivenModel | None, method: Method | None = None) -> Decision:
    """Return how a twin of these texts is trained.

    Args:
        model: None where none is given.
        method: the user's choice; None for ours.

    Raises:
        ValueError: an adapter is asked for and there is no model that it could be of.
    """
    if method == "adapter" and model is None:
        raise ValueError("--method adapter changes a model: name its run by --model RUN, or take --method scratch")
    if model is None or method == "scratch":
        why = "no --model is given" if model is None else "--method scratch is given"
        return _scratch(texts, why)
    tokens = texts.words * model.tokens_per_word
    cuts_finely = model.tokens_per_word > _MOST_TOKENS_PER_WORD
    language = _LANGUAGES.get(texts.language, f"language {texts.language!r}")
    if method is None and cuts_finely and _tokens(texts) >= _ENOUGH_TOKENS:
        return _scratch(
            texts,
            f"the model's tokenizer cuts a word of these texts ({language}) into {model.tokens_per_word:.1f} tokens, "
            f"so it knows little of the language, and {_tokens(texts) / 1e6:,.0f} M tokens are enough to learn it from",
        )
    why = (
        f"--method adapter is given: {tokens:,.0f} tokens of {language}"
        if method is not None
        else f"{tokens:,.0f} tokens of {language} are too few to learn a language from, and the model knows one already"
    )
    if cuts_finely:
        why += (
            f"; its tokenizer cuts a word into {model.tokens_per_word:.1f} tokens, so it may know little of this "
            "language: a model that was trained on it would do better"
        )
    if not model.has_template:
        why += "; it has no chat template, so it learns to continue passages and will not answer questions"
    return Decision(method="adapter", talks=model.has_template, reason=f"adapter on the model of --model: {why}")


def _tokens(texts: Texts) -> float:
    return texts.characters / _CHARACTERS_PER_TOKEN


def _scratch(texts: Texts, why: str) -> Decision:
    """Return a tokenizer and a model of the sizes that the texts can fill."""
    exponent = round(math.log2(math.sqrt(max(1, texts.characters))))
    vocabulary = min(_LARGEST_VOCABULARY, max(_SMALLEST_VOCABULARY, 1 << exponent))
    tokens = _tokens(texts)
    wanted = MOST_EPOCHS * tokens / TOKENS_PER_PARAMETER
    fitting = [shape for shape in _SHAPES if _parameters(*shape, vocabulary) <= wanted]
    layers, hidden = fitting[-1] if fitting else _SHAPES[0]
    size = _parameters(layers, hidden, vocabulary)
    bound = "" if fitting else ", which is the smallest model that is made: expect scraps of sentences"
    return Decision(
        method="scratch",
        talks=False,
        vocabulary=vocabulary,
        num_layers=layers,
        hidden_size=hidden,
        reason=f"tokenizer and model from scratch, because {why}: about {tokens:,.0f} tokens, read {MOST_EPOCHS} "
        f"times, suit {wanted:,.0f} parameters at {TOKENS_PER_PARAMETER} tokens each; taken: {layers} layers of "
        f"{hidden}, vocabulary {vocabulary}, {size:,} parameters{bound}; it continues texts and will not answer "
        "questions",
    )


def _parameters(layers: int, hidden: int, vocabulary: int) -> int:
    """Return the parameters of a LLaMA-like block (4 h^2 of attention, 8 h^2 of the feed-forward) and the table."""
    return 12 * layers * hidden * hidden + vocabulary * hidden


def shape_of(decision: Decision) -> dict[str, Any]:
    """Return the section `model` of a run from scratch."""
    assert decision.hidden_size is not None, "a decision for a model from scratch"
    heads = max(2, decision.hidden_size // 64)
    return {
        "num_layers": decision.num_layers,
        "hidden_size": decision.hidden_size,
        "num_heads": heads,
        "ffn_hidden_size": 8 * decision.hidden_size // 3 // 32 * 32,
        "position": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": True,
    }
