"""The sections `data.dedup` and `data.decontaminate`: which copies are removed, and which evaluation sets."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from trimaran.models.fields import INTEGRAL
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, FilePath, Folder, switch


class NearSection(BaseModel):
    """What near copies are."""

    model_config = SECTION_CONFIG

    threshold: Annotated[float, Field(ge=0.7, le=1, allow_inf_nan=False)] = Field(
        default=0.7,
        description="Least Jaccard similarity of a document to the kept one that it is a copy of; below 0.7 too few "
        "pairs would be found (14 bands of 8 hashes, used four times).",
    )
    words: Annotated[int, Field(ge=1, le=32), INTEGRAL] = Field(
        default=5,
        description="Words of a shingle; a document is the set of its shingles (Broder 1997; 5 words as in FineWeb, "
        "Penedo et al. 2024).",
    )


class LinesSection(BaseModel):
    """Which repeated lines and paragraphs are cut."""

    model_config = SECTION_CONFIG

    min_characters: Annotated[int, Field(ge=1, le=100_000), INTEGRAL] = Field(
        default=30, description="Characters from which on a repeated line or paragraph is cut; shorter ones stay."
    )


class SubstringSection(BaseModel):
    """Which repeated substrings are cut."""

    model_config = SECTION_CONFIG

    min_bytes: Annotated[int, Field(ge=16, le=65_535), INTEGRAL] = Field(
        default=200,
        description="Bytes of UTF-8 from which on a repeated substring is cut (EXACTSUBSTR, Lee et al. 2022: 50 "
        "tokens, about 200 bytes of English).",
    )


class DedupSection(BaseModel):
    """Which copies are removed; the first in source order is kept."""

    model_config = SECTION_CONFIG

    url: bool = Field(
        default=True, description="Whether to remove documents from the address of an earlier one (Penedo et al. 2023)."
    )
    exact: bool = Field(
        default=True,
        description="Whether to remove documents with the text of an earlier one, but for case and white space.",
    )
    near: Annotated[NearSection | None, switch(NearSection)] = Field(
        default_factory=NearSection,
        description="Near copies by MinHash, verified by exact similarity (Broder 1997): a record, true or false.",
    )
    lines: Annotated[LinesSection | None, switch(LinesSection)] = Field(
        default=None,
        description="Lines and paragraphs that occurred before, as CCNet cuts them (Wenzek et al. 2020): a record, "
        "true or false.",
    )
    substring: Annotated[SubstringSection | None, switch(SubstringSection)] = Field(
        default=None,
        description="Long substrings that occurred before, by suffix array (EXACTSUBSTR, Lee et al. 2022): a record, "
        "true or false.",
    )
    against: Annotated[list[Folder], Field(max_length=1000)] = Field(
        default=[],
        description="Runs, or index folders of them, whose documents count as earlier ones for url, exact and near.",
    )


class EvaluationFile(BaseModel):
    """An evaluation set."""

    model_config = SECTION_CONFIG

    file: FilePath = Field(
        description="File of the set: .json, .jsonl, .csv, .parquet, or .gz of one; of a known set the folder."
    )
    fields: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=100)] = Field(
        default=[],
        description="Fields that make an item, in this order; a dot leads into a nested record. A known set has none.",
    )
    set: str | None = Field(
        default=None,
        description="Name of a set that evaluation knows, such as gsm8k, whose files are in the folder (null: none).",
    )


class DecontaminateSection(BaseModel):
    """Which evaluation sets are kept out of the corpus (Brown et al. 2020, appendix C)."""

    model_config = SECTION_CONFIG

    against: Annotated[list[EvaluationFile], Field(max_length=1000)] = Field(
        default=[], description="Evaluation sets whose items are removed."
    )
    ngram: Annotated[int, Field(ge=2, le=100), INTEGRAL] = Field(
        default=13,
        description="Words in a row that a document must not share with an item; shorter items are compared whole "
        "(Brown et al. 2020, appendix C: 13).",
    )
    action: Literal["document", "paragraph"] = Field(
        default="document",
        description="What is removed: the document, or its paragraphs (between blank lines; lines, where a text has no "
        "blank ones) that have the words.",
    )
