"""The section of cleaning: what is mended, masked or taken out of a document's text."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field

from trimaran.runtime.spec.sections.common import SECTION_CONFIG, FilePath

PiiKind = Literal["email", "ip", "phone", "iban", "card"]


def _check_kinds(kinds: list[PiiKind]) -> list[PiiKind]:
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"must name each kind once, got {', '.join(kinds)}; take the second one out")
    return kinds


PiiKinds = Annotated[list[PiiKind], Field(min_length=1), AfterValidator(_check_kinds)]


class CleanSection(BaseModel):
    """Cleaning, in the order of the fields."""

    model_config = SECTION_CONFIG

    html: Literal["main", "all"] = Field(
        default="main", description="Text of a page: main content, or all that it shows (menus and footers too)."
    )
    repair_encoding: bool = Field(
        default=True, description="Whether text that was decoded as the wrong encoding is restored (sÃ¼re to süre)."
    )
    unicode: bool = Field(
        default=True,
        description="Whether text is put into Unicode's form NFC, with \\n at the ends of lines and without control "
        "and invisible characters.",
    )
    emoji: Literal["keep", "name", "remove"] = Field(
        default="keep", description="What shows as emoji: keep it, write its :name:, or remove it."
    )
    spelling: FilePath | None = Field(
        default=None,
        description="Misspelt words to correct: english (codespell's list), or a file with a wrong word and its "
        "correction on each line (null: none).",
    )
    pii: bool | PiiKinds = Field(
        default=True,
        description="Personal data to mask: all of email, ip, phone, iban and card, a list of some, or false for none.",
    )
