"""A recipe: what is done to which parts of which sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimaran.runtime.data.files import KnownFile
from trimaran.runtime.data.readers.part import Part
from trimaran.runtime.data.readers.parts import PART_BYTES


@dataclass(frozen=True)
class SourcePart:
    """A part of a corpus, and the sha256 of its whole file."""

    part: Part
    sha256: str
    text_field: str


@dataclass(frozen=True)
class Recipe:
    """What is done to which sources; sections as JSON, None where there is none.

    Attributes:
        substring_memory: bytes that the comparison of substrings may take; None for its default.
        max_lost_fraction: the largest share of the documents that may be unreadable for one reason.
        passed_over: corpus -> the account of its files, with those that were passed over.
        named_files: section -> the files that it names, such as word lists and evaluation sets.
    """

    parts: Sequence[SourcePart]
    clean: Mapping[str, Any] | None
    filter: Mapping[str, Any] | None
    dedup: Mapping[str, Any] | None
    decontaminate: Mapping[str, Any] | None
    max_document_bytes: int
    substring_memory: int | None = None
    max_lost_fraction: float = 1.0
    passed_over: Mapping[str, Any] = field(default_factory=dict)
    named_files: Mapping[str, tuple[KnownFile, ...]] = field(default_factory=dict)

    @property
    def groups(self) -> list[list[SourcePart]]:
        """The parts in groups that one task reads: small files of a corpus together."""
        found: list[list[SourcePart]] = []
        size = 0
        for source in self.parts:
            other = not found or found[-1][0].part.corpus != source.part.corpus
            if other or size + source.part.part_bytes > PART_BYTES:
                found.append([])
                size = 0
            found[-1].append(source)
            size += source.part.part_bytes
        return found
