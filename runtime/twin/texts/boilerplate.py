"""What is not the author's in a file: the licence and the notes of Project Gutenberg, illustrations, page marks."""

import re
from collections.abc import Sequence
from typing import Final

from trimaran.runtime.twin.texts.work import Block, Source, Tally

_START: Final = re.compile(r"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.*?\*\*\*", re.IGNORECASE | re.DOTALL)
_OLD_START: Final = re.compile(r"\*END\*? ?THE SMALL PRINT!.*?\*END\*", re.IGNORECASE | re.DOTALL)
_END: Final = re.compile(
    r"\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|^End of (?:the |this )?Project Gutenberg", re.IGNORECASE
)
_FIELD: Final = re.compile(r"^(Title|Author):\s*(.+?)(?=\n\n|\n[A-Z][\w ]{1,30}:\s|\Z)", re.MULTILINE | re.DOTALL)
_NOTES: Final = re.compile(
    r"\s*(?:\[?(?:Produced by|E-?text prepared by|This e-?text was (?:prepared|produced) by|Transcribed (?:from|by))\b"
    r"|\[?Transcriber[’']?s[’']? Notes?\b|HTML version by\b)",
    re.IGNORECASE,
)
_NOTES_AMONG: Final = 12
"""Paragraphs at the start among which such notes stand."""
_ILLUSTRATION: Final = re.compile(r"\[(?:Illustration|Resim|Image|Frontispiece)\b[^\]]*\]", re.IGNORECASE)
_PAGE_MARK: Final = re.compile(r"[\[{(](?:p(?:g|age)?\.? ?\d{1,4}|sayfa \d{1,4}|s\. ?\d{1,4})[\]})]", re.IGNORECASE)


def without_boilerplate(source: Source, tally: Tally) -> Source:
    """Return a source without what Project Gutenberg put around it, illustrations and marks of pages, all counted.

    Title and author that its header names count where the file names none itself.
    """
    start, stop = _bounds(source.blocks)
    head = "\n\n".join(block.text for block in source.blocks[:start])
    fields = {name: " ".join(value.split()) for name, value in _FIELD.findall(head)}
    for block in (*source.blocks[:start], *source.blocks[stop:]):
        tally.note("gutenberg.licence", block.text)
    blocks = list[Block]()
    for place, block in enumerate(source.blocks[start:stop]):
        if start and place < _NOTES_AMONG and _NOTES.match(block.text):
            tally.note("gutenberg.notes", block.text)
        elif kept := _without_marks(block, tally):
            blocks.append(kept)
    return Source(blocks, source.title or fields.get("Title", ""), source.author or fields.get("Author", ""))


def _bounds(blocks: Sequence[Block]) -> tuple[int, int]:
    start, stop = 0, len(blocks)
    for place, block in enumerate(blocks):
        if _START.search(block.text) or _OLD_START.search(block.text):
            start = place + 1
        elif _END.search(block.text):
            stop = max(start, place)
            break
    return start, stop


def _without_marks(block: Block, tally: Tally) -> Block | None:
    text = block.text
    for reason, pattern in (("text.illustration", _ILLUSTRATION), ("text.page_mark", _PAGE_MARK)):
        for match in pattern.finditer(text):
            tally.note(reason, match[0])
        text = pattern.sub("", text)
    if text is block.text:
        return block
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
    return Block("\n".join(lines), block.level) if lines else None
