"""Paragraphs, words and utterances with their places in a work, and the stretches that may be read together."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.persona.sentences import sentences_of

_BLANK: Final = re.compile(r"\n[ \t]*\n\s*")
_SPACE: Final = re.compile(r"\s+")
_WIDEST_GAP: Final = 4
"""Characters between two passages that follow each other: blank lines, and no text that was left out."""
_PAUSES: Final = (".", "!", "?", "…", ",", ";", ":", "-", "–", "—")


@dataclass(frozen=True, slots=True)
class Paragraph:
    """One paragraph of a passage.

    Args:
        text: its characters, which begin at `start` of the work's text.
    """

    passage: Passage
    start: int
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """Characters [start, end) of a work, all of one passage."""

    passage: Passage
    start: int
    end: int

    @property
    def raw(self) -> str:
        """The characters as they stand."""
        return self.passage.text[self.start - self.passage.start : self.end - self.passage.start]


@dataclass(frozen=True, slots=True)
class Words:
    """Words of the author: parts of passages in their order, and nothing else.

    Args:
        keeps_lines: whether the ends of lines are the author's, as in verse; else they are spaces.
    """

    parts: tuple[Part, ...]
    keeps_lines: bool = False

    @property
    def text(self) -> str:
        """The parts with their white space evened; where one breaks off without a pause, a new line begins."""
        text = ""
        for part in self.parts:
            lines = [plain(line) for line in part.raw.split("\n")]
            words = ("\n" if self.keeps_lines else " ").join(line for line in lines if line)
            text += words if not text or not words else f"{' ' if text.endswith(_PAUSES) else chr(10)}{words}"
        return text

    @property
    def passages(self) -> tuple[int, ...]:
        """Numbers of the passages that the words are of."""
        return tuple(dict.fromkeys(part.passage.id for part in self.parts))

    def head(self, most_characters: int) -> "Words":
        """Return as many of the first sentences as have at most that many characters; at least the first."""
        return self._within(most_characters, self._sentences())

    def tail(self, most_characters: int) -> "Words":
        """Return as many of the last sentences as have at most that many characters; at least the last."""
        return self._within(most_characters, self._sentences()[::-1])

    def _sentences(self) -> list[Part]:
        return [
            replace(part, start=part.start + start, end=part.start + end)
            for part in self.parts
            for start, end in sentences_of(part.raw)
        ]

    def _within(self, most_characters: int, sentences: Sequence[Part]) -> "Words":
        if len(self.text) <= most_characters or not sentences:
            return self
        kept: list[Part] = []
        size = 0
        for part in sentences:
            size += part.end - part.start + 1
            if kept and size > most_characters:
                break
            kept.append(part)
        return Words(joined(sorted(kept, key=lambda part: (part.passage.id, part.start))), self.keeps_lines)

    def as_json(self) -> list[dict[str, object]]:
        """Return the passages with the characters of the work, as an example names them."""
        found: dict[int, dict[str, object]] = {}
        for part in self.parts:
            place = found.setdefault(part.passage.id, {"passage": part.passage.id, "characters": []})
            characters = place["characters"]
            assert isinstance(characters, list), "made above"
            characters.append([part.start, part.end])
        return list(found.values())


@dataclass(frozen=True, slots=True)
class Utterance:
    """What one speaker says or thinks without a break.

    Args:
        speakers: as the text writes them; none where the text does not tell, several where they speak together.
        kind: an aside is a thought; so is what a character thinks.
        is_inferred: whether the speaker follows from the turns before, and is not named beside the words.
    """

    speakers: tuple[str, ...]
    words: Words
    kind: Literal["speech", "thought"] = "speech"
    is_inferred: bool = False

    @property
    def text(self) -> str:
        """What is said."""
        return self.words.text


def joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return parts of which those that only white space parts are one."""
    kept: list[Part] = []
    for part in parts:
        last = kept[-1] if kept else None
        if last is not None and last.passage.id == part.passage.id:
            between = Part(part.passage, last.end, part.start).raw if last.end <= part.start else "overlap"
            if not between.strip():
                kept[-1] = replace(last, end=part.end)
                continue
        kept.append(part)
    return tuple(kept)


def paragraphs_of(passage: Passage) -> Iterator[Paragraph]:
    """Yield the paragraphs of a passage, which blank lines part."""
    start = 0
    for gap in (*_BLANK.finditer(passage.text), None):
        end = len(passage.text) if gap is None else gap.start()
        text = passage.text[start:end]
        body = text.strip()
        if body:
            yield Paragraph(passage, passage.start + start + text.index(body), body)
        start = end if gap is None else gap.end()


def stretches(passages: Sequence[Passage]) -> Iterator[list[Paragraph]]:
    """Yield the paragraphs of consecutive passages of one chapter, of which none is held out.

    Nothing said in one stretch is the answer to what was said in another: between them a scene ends, or text is
    missing.
    """
    found: list[Paragraph] = []
    last: Passage | None = None
    for passage in sorted(passages, key=lambda each: (each.work, each.start)):
        if last is None or passage.is_held_out or not _goes_on(last, passage):
            if found:
                yield found
            found = []
        if not passage.is_held_out:
            found.extend(paragraphs_of(passage))
        last = passage
    if found:
        yield found


def _goes_on(last: Passage, passage: Passage) -> bool:
    is_next = (last.work, last.chapter) == (passage.work, passage.chapter) and passage.start - last.end <= _WIDEST_GAP
    return is_next and not last.is_held_out


def plain(text: str) -> str:
    """Return a text with every run of white space as one space: how places are compared with the work."""
    return _SPACE.sub(" ", text).strip()
