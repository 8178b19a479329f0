"""Speeches of plays by their speakers, without stage directions.

A play marks its speakers in one form throughout: **HAMLET** (Markdown), HAMLET. or HAMLET: or HAMLET on a line of its
own (as Project Gutenberg prints them), First Citizen: , AHMET — , or Ham. with a list of the persons of the play.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from trimaran.runtime.twin.casing import lower
from trimaran.runtime.twin.persona.names import tokens_of
from trimaran.runtime.twin.persona.paragraphs import Paragraph, Part, Utterance, Words
from trimaran.runtime.twin.persona.words import LETTER, LOWER, UPPER, words_in

_NOTE: Final = r"(?:[ \t]*(?P<note>_?\\?[\[(][^\])\n]*[\])]_?|_[^_\n]+_))?"
_FORMS: Final[Mapping[str, re.Pattern[str]]] = MappingProxyType(
    {
        "bold": re.compile(rf"[ \t]*\*\*(?P<name>[^*\n]{{1,80}}?)[.:]?\*\*{_NOTE}[ \t]*[.:]?[ \t]*(?:[—–-]+[ \t]+)?"),
        "capitals": re.compile(
            rf"[ \t]*(?P<name>[{UPPER}][{UPPER}'’ .&,:-]{{0,60}}[{UPPER}]){_NOTE}"
            rf"[ \t]*(?:[.:](?!\S)[ \t]*(?:[—–-]+[ \t]+)?|[—–-]+[ \t]+|$)",
            re.MULTILINE,
        ),
        "colon": re.compile(
            rf"[ \t]*(?P<name>[{UPPER}][{LETTER}'’.]*(?: [{UPPER}&][{LETTER}'’.]*){{0,3}}){_NOTE}:(?!\S)[ \t]*"
        ),
        "dash": re.compile(
            rf"[ \t]*(?P<name>[{UPPER}][{LETTER}]+(?: [{UPPER}][{LETTER}]+){{0,2}}){_NOTE}[ \t]+[—–-]+[ \t]+"
        ),
        "abbreviation": re.compile(
            rf"[ \t]{{0,8}}(?P<name>[{UPPER}][{LOWER}]{{1,9}}(?: [{UPPER}][{LOWER}]{{1,9}})?)\.{_NOTE}[ \t]+(?=\S)"
        ),
    }
)
_HEADING: Final = re.compile(
    r"[ \t]*(?:#|(?:act|scene|chapter|part|book|perde|sahne|bölüm|kısım|the end|finis|epilogue|prologue|tableau|"
    r"dramatis person|persons|characters|kişiler|şahıslar)\b)",
    re.IGNORECASE,
)
_NUMERAL: Final = re.compile(r"[IVXLC\s.,]+")
_PERSONS: Final = re.compile(
    r"^\W*(?:dramatis person|persons (?:represented|of the)|characters|kişiler|şahıslar|oyuncular)", re.IGNORECASE
)
_PERSON: Final = re.compile(
    rf"^[ \t*_-]*(?P<name>[{UPPER}][{LETTER}'’]+(?: [{UPPER}][{LETTER}'’]+){{0,2}})\**[ \t]*(?:[,.;:(]|$)", re.MULTILINE
)
_DIRECTION: Final = re.compile(
    r"_\\?\[[^\[\]]{0,600}\]?_"  # Markdown's _\[Aside]_
    r"|_\([^()]{0,600}\)_"
    r"|\\?\[[^\[\]]{0,600}\]"
    r"|^[ \t]*_[^_]{1,600}_[ \t.]*$"  # whole lines of emphasis
    r"|^[ \t]*\([^()]{0,600}\)[ \t.]*$",
    re.MULTILINE,
)
"""No direction is longer: an open bracket that nothing closes is none."""
_IN_BRACKETS: Final = re.compile(r"\([^()]{0,600}\)")
_ENTRANCE: Final = re.compile(
    r"(?:_|\b)(?:Re-?enter|Enter|Exit|Exeunt|Alarums?|Flourish|Sennet|Curtain|Perde|Çıkar|Girer)\b"
)
_LEAVES: Final = re.compile(r"\b(?:exit|exeunt|çıkar|çıkarlar)\b", re.IGNORECASE)
_ASIDE_TO: Final = re.compile(r"\baside to\b", re.IGNORECASE)
_ASIDE: Final = re.compile(r"\baside\b|to (?:him|her)self|kendi kendine|içinden", re.IGNORECASE)
_TOGETHER: Final = re.compile(r"\s*(?::\s*)?(?:&|,|\band\b|\bve\b)\s*")
_FEWEST: Final = 4
_SHARE: Final = 0.15
_INTERJECTIONS: Final = frozenset(words_in("no yes well ay nay oh ah sir come hark why evet hayır peki yok"))


@dataclass
class Directions:
    """Counts what a play holds beside what is said aloud to somebody.

    Args:
        directions: stage directions, which are left out of what is said.
        asides: said to nobody: thoughts.
        asides_to: said aside to one of those present, and left out.
    """

    directions: int = 0
    asides: int = 0
    asides_to: int = 0


@dataclass(frozen=True)
class Play:
    """The form in which a work marks its speakers.

    Args:
        names: abbreviation, in lower case -> the name that it stands for.
    """

    form: str
    language: str
    names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def pattern(self) -> re.Pattern[str]:
        """What a line begins with that names a speaker."""
        return _FORMS[self.form]

    @staticmethod
    def find(paragraphs: Sequence[Paragraph], language: str, character: str | None = None) -> "Play | None":
        """Return the form of a work, None where it is no play.

        Args:
            character: whose abbreviation is known even where no list of persons tells it.
        """
        persons = [*_persons(paragraphs), *([character] if character else [])]
        best: tuple[int, Play] | None = None
        for form in _FORMS:
            play = Play(form, language, _abbreviations(persons, language) if form == "abbreviation" else {})
            counts: Counter[str] = Counter()
            for paragraph in paragraphs:
                counts.update(name for line in _lines(paragraph.text) if (name := play.name_in(line[1])) is not None)
            found = sum(count for count in counts.values() if count > 1)
            several = sum(count > 1 for count in counts.values()) >= 2
            if several and found >= max(_FEWEST, _SHARE * len(paragraphs)) and (best is None or found > best[0]):
                best = (found, play)
        return None if best is None else best[1]

    def name_in(self, line: str) -> str | None:
        """Return the speaker that a line begins with, None where it names none."""
        found = self.pattern.match(line)
        if found is None:
            return None
        name = found["name"].strip(" .,:-_")
        if not name or (self.form != "bold" and (_HEADING.match(name) or _NUMERAL.fullmatch(name))):
            return None
        if self.form != "abbreviation":
            return name
        return self.names.get(lower(name, self.language))

    def scenes(self, stretch: Sequence[Paragraph], seen: Directions) -> Iterator[list[Utterance]]:
        """Yield the utterances of each scene of a stretch, and count in `seen` what is left out.

        Where somebody leaves, a scene ends: what is said next may be said to nobody who has heard what was said before.
        """
        scene: list[Utterance] = []
        speakers: tuple[str, ...] = ()
        for paragraph in stretch:
            for start, end, name in _turns(self, paragraph.text):
                if name is None and _HEADING.match(paragraph.text[start:end]):
                    yield scene
                    scene, speakers = [], ()
                    continue
                if name is not None:
                    speakers = tuple(part for part in _TOGETHER.split(name) if part)
                is_direction = name is None and _ENTRANCE.match(paragraph.text[start:end])
                if is_direction:
                    seen.directions += 1
                elif speakers:
                    scene.extend(self._utterances(paragraph, start, end, speakers, named=name is not None, seen=seen))
                if is_direction or _DIRECTION.search(paragraph.text, start, end):
                    directions = (match[0] for match in _DIRECTION.finditer(paragraph.text, start, end))
                    told = paragraph.text[start:end] if is_direction else " ".join(directions)
                    if _LEAVES.search(told):
                        yield scene
                        scene = []
        yield scene

    def _utterances(
        self, paragraph: Paragraph, start: int, end: int, speakers: tuple[str, ...], *, named: bool, seen: Directions
    ) -> Iterator[Utterance]:
        """Yield what is said in [start, end) of a paragraph, in parts where an aside begins or ends."""
        text, kind = paragraph.text, _kind("")
        if named:
            marker = self.pattern.match(text, start)
            assert marker is not None, "a turn begins with its speaker"
            start = marker.end()
            if marker["note"]:
                kind = _noted(marker["note"], seen)
        parts: list[tuple[int, int]] = []
        for part_start, part_end, direction in _parts(text, start, end, self.language):
            if not direction:
                parts.append((part_start, part_end))
                continue
            new = _noted(text[part_start:part_end], seen)
            if new != kind:
                yield from _utterance(paragraph, parts, speakers, kind)
                parts, kind = [], new
        yield from _utterance(paragraph, parts, speakers, kind)


Kind = Literal["speech", "thought", "aside to"]


def _kind(direction: str) -> Kind:
    if _ASIDE_TO.search(direction):
        return "aside to"
    return "thought" if _ASIDE.search(direction) else "speech"


def _noted(direction: str, seen: Directions) -> Kind:
    """Return what follows a direction, and count it."""
    kind = _kind(direction)
    seen.directions += 1
    seen.asides += kind == "thought"
    seen.asides_to += kind == "aside to"
    return kind


def _utterance(
    paragraph: Paragraph, parts: Iterable[tuple[int, int]], speakers: tuple[str, ...], kind: Kind
) -> Iterator[Utterance]:
    places = []
    for start, end in parts:
        raw = paragraph.text[start:end]
        begin = paragraph.start + start + len(raw) - len(raw.lstrip())
        if any(character.isalpha() for character in raw):
            places.append(Part(paragraph.passage, begin, begin + len(raw.strip())))
    if places and kind != "aside to":
        yield Utterance(speakers, Words(tuple(places), keeps_lines=True), kind)


def _parts(text: str, start: int, end: int, language: str) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, whether it is a stage direction) of what a speech is made of."""
    found = [(match.start(), match.end()) for match in _DIRECTION.finditer(text, start, end)]
    for match in _IN_BRACKETS.finditer(text, start, end):
        is_new = all(match.end() <= begin or match.start() >= stop for begin, stop in found)
        # In an English play brackets in the midst of a speech are spoken.
        if is_new and (language == "tr" or not text[start : match.start()].strip()):
            found.append((match.start(), match.end()))
    place = start
    for begin, stop in sorted(found):
        if text[place:begin].strip():
            yield place, begin, False
        yield begin, stop, True
        place = stop
    if text[place:end].strip():
        yield place, end, False


def _turns(play: Play, text: str) -> Iterator[tuple[int, int, str | None]]:
    """Yield (start, end, speaker) of the turns of a paragraph; what precedes the first marker has None."""
    marks = [(start, name) for start, line in _lines(text) if (name := play.name_in(line)) is not None]
    if not marks:
        yield 0, len(text), None
        return
    if marks[0][0] > 0:
        yield 0, marks[0][0], None
    for (start, name), end in zip(marks, [*(start for start, _ in marks[1:]), len(text)], strict=True):
        yield start, end, name


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for match in re.finditer(r"[^\n]+", text):
        yield match.start(), match[0]


def _persons(paragraphs: Sequence[Paragraph]) -> Iterator[str]:
    """Yield the names in a work's list of the persons of the play."""
    inside = False
    for paragraph in paragraphs:
        if _PERSONS.match(paragraph.text):
            inside = True
        elif inside and _HEADING.match(paragraph.text):
            return
        if inside:
            yield from (match["name"] for match in _PERSON.finditer(paragraph.text) if not _PERSONS.match(match[0]))


def _abbreviations(persons: Sequence[str], language: str) -> dict[str, str]:
    """Return the beginnings of two letters and more of each word of a name that are of one person alone."""
    meant: dict[str, set[tuple[str, ...]]] = {}
    names: dict[str, str] = {}
    for person in persons:
        tokens = tokens_of(person, language)
        for token in tokens:
            for length in range(2, len(token) + 1):
                meant.setdefault(token[:length], set()).add(tokens)
                names.setdefault(token[:length], person)
    return {short: names[short] for short, people in meant.items() if len(people) == 1 and short not in _INTERJECTIONS}
