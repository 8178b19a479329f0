"""Records of the data section: the corpora of a run, and how their weights change as it goes on."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field

from trimaran.models.fields import INTEGRAL, NonNegative, Positive
from trimaran.runtime.spec.errors import show
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, FilePath

Format = Literal[
    "warc", "wet", "html", "txt", "lines", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "megatron"
]  # fmt: skip
Sources = Annotated[list[FilePath], Field(min_length=1, max_length=1000)]
Key = Annotated[str, Field(min_length=1)]
# 63 bits, the numbers that every reader of a spec has.
NumBytes = Annotated[int, Field(ge=1, lt=2**63), INTEGRAL]
NumTokens = Annotated[int, Field(ge=0, lt=2**63), INTEGRAL]
_LONGEST_NAME = 100
"""Of a corpus, which names folders and files too."""


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or len(name) > _LONGEST_NAME:
        rule = f"a name must be a plain word of at most {_LONGEST_NAME} letters, digits, - and _"
        raise ValueError(f"{rule}, got {show(name)}; write one such as web-2024")
    return name


def _check_weights(weights: dict[str, float]) -> dict[str, float]:
    if not any(weights.values()):
        raise ValueError("must have a weight above 0, and all are 0; give one corpus 1")
    return weights


CorpusName = Annotated[str, AfterValidator(_check_name)]
Weights = Annotated[dict[CorpusName, NonNegative], Field(max_length=1000), AfterValidator(_check_weights)]


class CorpusSection(BaseModel):
    """One corpus of a run."""

    model_config = SECTION_CONFIG

    source: Sources = Field(description="Files, folders or globs of its text, also addresses such as s3://.")
    format: Format | None = Field(default=None, description="What its files hold (null: what each one's name says).")
    text_field: Key = Field(default="text", description="Key or column of the text in its records.")
    weight: Positive = Field(
        default=1.0, description="Its share of the samples is this, divided by the sum of all corpora's."
    )
    max_epochs: Positive | None = Field(
        default=None, description="How often its text may be read, at most; a run that would exceed it is refused."
    )


class StageSection(BaseModel):
    """The weights of the corpora from a count of trained tokens on."""

    model_config = SECTION_CONFIG

    tokens: NumTokens = Field(description="Trained tokens at which these weights begin; 0 for the first stage.")
    weights: Weights = Field(
        description="Weight of every corpus that is drawn from, in place of its own; one that is not named has 0."
    )


Corpora = Annotated[dict[CorpusName, CorpusSection], Field(max_length=1000)]
Stages = Annotated[list[StageSection], Field(min_length=1, max_length=1000)]
