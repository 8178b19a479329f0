"""report.json: what was measured of a twin. No torch."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trimaran.runtime.twin.report.intervals import Estimate

VERSION = 1
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Figure(BaseModel):
    """A figure with its 95% interval, or why there is none."""

    model_config = _FROZEN

    value: float | None = None
    low: float | None = None
    high: float | None = None
    count: int = 0
    why_not: str = ""

    @classmethod
    def of(cls, estimate: Estimate) -> "Figure":
        """Return the figure of an estimate."""
        return cls(value=estimate.value, low=estimate.low, high=estimate.high, count=estimate.count)

    @property
    def shown(self) -> str:
        """The figure for people."""
        if self.value is None:
            return self.why_not
        bounds = "" if self.low is None or self.high is None else f" ({self.low:.3g} to {self.high:.3g})"
        return f"{self.value:.3g}{bounds}"


class Way(BaseModel):
    """One of the ways in which questions are answered: a model, with retrieval or without.

    Attributes:
        style: share of answers that the classifier takes for the author's.
        delta_author, delta_others: Burrows' Delta of all answers.
        cited, supported: share of answers with a citation; of citations whose sentence overlaps with the passage.
        invalid: citations of passages that were not there, which were taken out.
        quotes, verbatim: how many quotes, and how many of them are verbatim.
        refused: share of questions about absent topics that were answered by silence.
        answers: question and answer of each.
    """

    model_config = _FROZEN

    style: Figure
    delta_author: Figure
    delta_others: Figure
    cited: Figure
    supported: Figure
    invalid: int
    quotes: int
    verbatim: int
    refused: Figure
    answers: list[tuple[str, str]]


class Memory(BaseModel):
    """What a model repeats after prefixes of texts.

    Attributes:
        verbatim: share of prefixes that it continues by at least 50 tokens of the text.
        longest: the longest runs that stand in the training texts, the longest first.
        copied: tokens in a row that are the text's, on average.
    """

    model_config = _FROZEN

    verbatim: Figure
    copied: Figure
    longest: list[int]


class Step(BaseModel):
    """A checkpoint: bits a character of the author's held-out text and of others' texts."""

    model_config = _FROZEN

    step: int
    author: float
    others: float | None


class TwinReport(BaseModel):
    """What was measured.

    Attributes:
        base: bits a character of the base; None where the model is from scratch.
        steps: of the kept checkpoints, in their order.
        chosen: step of the checkpoint that was measured, and why.
        others: what the texts of others are.
        classifier: accuracy of the style classifier on held-out pieces, or why there is none.
        held_out_delta: Delta of the author's held-out text to the author: what answers can reach.
        recall, milliseconds: of the index.
        ways: by name: base, base + retrieval, tuned, tuned + retrieval.
        memory: by "base" or "tuned", and "training" or "held out".
        dialogues: turns of each, question and answer.
    """

    model_config = _FROZEN

    version: Literal[1] = 1
    author: str
    character: str | None
    model: str | None
    language: str
    base: Step | None
    steps: list[Step]
    chosen: int
    why: str
    others: str
    classifier: Figure
    held_out_delta: float | None
    recall: Figure
    milliseconds: float
    ways: Mapping[str, Way]
    memory: Mapping[str, Mapping[str, Memory]]
    dialogues: list[list[tuple[str, str]]]
    settings: Mapping[str, Any]
