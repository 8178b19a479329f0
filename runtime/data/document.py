"""One document on its way from a reader to the tokens, and what a step of the recipe may do with it.

A step is called with one document after the other. It may change the text, and says whether the document stays. What it
changes or removes it counts, so that nothing is dropped unseen.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

TOKENS: Final = "tokens"
"""The field of a document that came as token ids, which has no text: no step of a recipe but copying it touches it."""
Counts = Counter[str]
"""What was seen, by a dotted name that begins with the step's own: `pii.email`, `gopher.short`, `read.truncated`."""


@dataclass(slots=True)
class Document:
    """A document.

    Attributes:
        id: names it for ever, however the work is split: `CORPUS/FILE#PLACE`, where the place is the record's number or
            its byte offset in the file.
        text: what will be trained on, with \\n at the ends of lines. Empty as long as only `raw` is known.
        raw: the page as it was fetched, of HTML sources; the step `html` turns it into `text`.
        charset: what the server said of `raw`, "" for nothing.
        url: where it was fetched, "" for unknown.
        corpus: name of its corpus in `data.corpora`.
        language: ISO 639-1 code, "" as long as no step has told it.
        fields: scores that steps leave for the report, such as `language_score`; token ids under TOKENS.
    """

    id: str
    text: str = ""
    raw: bytes = b""
    charset: str = ""
    url: str = ""
    corpus: str = ""
    language: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


class Removal(NamedTuple):
    """Why a document is not kept.

    Attributes:
        reason: a dotted name that begins with the step's own, such as `gopher.few_words`.
        detail: the value beside its threshold, or the passage, for a reader.
    """

    reason: str
    detail: str = ""


class Step(Protocol):
    """A step of the recipe for single documents: a part of cleaning, a filter."""

    @property
    def name(self) -> str:
        """The name of the step, as in the spec."""

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Change `document` in place and return None, or return why it is removed."""


class Loss(NamedTuple):
    """What a reader yields in the place of a document: one that could not be read, or something passed over or changed.

    Attributes:
        place: as the id of a document; of several, the first.
        reason: a dotted name that begins with `read`, such as `read.truncated`.
        detail: what was found there, for a reader.
        times: how many.
        is_document: a document is lost. Otherwise it is one that was changed and is yielded too, or no document at all,
            as the request that a WARC has beside each page. So documents in the files = yielded + lost.
    """

    place: str
    reason: str
    detail: str = ""
    times: int = 1
    is_document: bool = True
