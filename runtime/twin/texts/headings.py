"""Which paragraphs of plain text are headings of chapters, and which are a table of contents."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from trimaran.runtime.twin.casing import lower
from trimaran.runtime.twin.texts.work import Block, Tally

_MOST_CHARACTERS: Final = 120
_MOST_LINES: Final = 3
_NUMBER = (
    r"(?:\d{1,3}|[ivxlcdm]+|the )?(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen"
    r"|fifteen|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|first|second|third|fourth|fifth|sixth|seventh"
    r"|eighth|ninth|tenth|last)?(?:[- ](?:one|two|three|four|five|six|seven|eight|nine))?"
)
_TURKISH_NUMBER = (
    r"(?:\d{1,3}|[ivxlcdm]+|birinci|ikinci|üçüncü|dördüncü|beşinci|altıncı|yedinci|sekizinci|dokuzuncu|onuncu|son"
    r"|on (?:birinci|ikinci|üçüncü|dördüncü|beşinci|altıncı|yedinci|sekizinci|dokuzuncu)"
    r"|(?:yirmi|otuz|kırk|elli)(?:nci|ıncı|uncu| (?:birinci|ikinci|üçüncü|dördüncü|beşinci|altıncı|yedinci|sekizinci"
    r"|dokuzuncu))?)"
)
_END = r"\s*(?:$|[.:\-–—\]]\s*.*$)"
_HIGH: Final = re.compile(
    rf"(?:(?:book|part|volume|act|livre|partie|buch|teil|tomo|libro|parte|часть|книга) (?=\w){_NUMBER}{_END}"
    rf"|(?:the )?(?:first|second|third|fourth|fifth|last) (?:book|part|volume|act){_END}"
    rf"|{_TURKISH_NUMBER}[.\s]\s*(?:kısım|kitap|cilt|perde){_END}|(?:kısım|kitap|cilt|perde)\s+{_TURKISH_NUMBER}{_END})"
)
_LOW: Final = re.compile(
    rf"(?:\[?(?:chapter|chap\.|canto|letter|stave|section|scene|chapitre|kapitel|capítulo|capitolo|hoofdstuk|глава)"
    rf" (?=\w){_NUMBER}{_END}"
    rf"|{_TURKISH_NUMBER}[.\s]\s*(?:bölüm|sahne|mektup|fasıl|tablo){_END}"
    rf"|(?:bölüm|sahne|mektup|fasıl|tablo)\s+{_TURKISH_NUMBER}{_END}"
    r"|(?:the )?(?:prologue|epilogue|preface|introduction|foreword|afterword|conclusion|önsöz|ön söz|sonsöz|son söz"
    r"|giriş|sonuç|prolog|epilog|vorwort|préface|prólogo|epílogo)\s*[.:]?$)"
)
_BARE: Final = re.compile(r"(?:[ivxlc]{1,7}|\d{1,3})\.?$")
_ROMAN: Final = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}
_LEAST_BARE: Final = 3


def mark_headings(paragraphs: Sequence[str], language: str) -> list[Block]:
    """Return paragraphs as blocks, those that are headings with their level.

    A heading stands alone, has at most 3 lines and 120 characters, and begins as headings of English, Turkish and a few
    other languages do (`CHAPTER IV`, `İKİNCİ BÖLÜM`, `ACT I`); or it is a number, one of at least three that count up.
    """
    bare = set(_counting_up(paragraphs, language))
    return [
        block
        for place, paragraph in enumerate(paragraphs)
        for block in ([Block(" ".join(paragraph.split()), 2)] if place in bare else _blocks(paragraph, language))
    ]


def _blocks(paragraph: str, language: str) -> list[Block]:
    lines = paragraph.split("\n")
    if len(paragraph) > _MOST_CHARACTERS or len(lines) > _MOST_LINES or not (level := _level(lines[0], language)):
        return [Block(paragraph)]
    below = [_level(line, language) for line in lines[1:]]
    if not any(below):
        return [Block(" ".join(lines), level)]
    if below[0] > level:  # ACT I above SCENE I
        return [Block(lines[0], level), Block(" ".join(lines[1:]), below[0])]
    return [Block(paragraph)]


def is_heading(line: str, language: str) -> bool:
    """Return whether a line begins as headings do."""
    return len(line) <= _MOST_CHARACTERS and _level(line, language) > 0


def _level(text: str, language: str) -> int:
    first = _plain(text.split("\n", 1)[0], language)
    return 1 if _HIGH.match(first) else 2 if _LOW.match(first) else 0


def _plain(line: str, language: str) -> str:
    """Return a line in lower case; what may be a Roman numeral, by the rules of English in a Turkish text too."""
    line = line.strip(" _*=#")
    low = lower(line, language)
    return re.sub(r"\b[ıvxlcdm]+\b", lambda match: match[0].replace("ı", "i"), low)


def _counting_up(paragraphs: Sequence[str], language: str) -> Iterator[int]:
    """Yield the places of numbers that stand alone and go up by one each, where there are at least three."""
    run: list[int] = []
    last = 0
    for place, paragraph in enumerate(paragraphs):
        if len(paragraph) > 8 or not _BARE.match(text := _plain(paragraph, language)):
            continue
        number = _number(text.rstrip("."))
        if number == last + 1:
            run.append(place)
            last = number
        elif number == 1:
            if len(run) >= _LEAST_BARE:
                yield from run
            run, last = [place], 1
    if len(run) >= _LEAST_BARE:
        yield from run


def _number(text: str) -> int:
    if text.isdigit():
        return int(text)
    values = [_ROMAN[sign] for sign in text]
    return sum(-one if one < after else one for one, after in zip(values, [*values[1:], 0], strict=True))


def drop_contents(blocks: Sequence[Block], language: str, tally: Tally) -> list[Block]:
    """Return the blocks without tables of contents, which are counted.

    Those are paragraphs of at least three lines of which four in five are headings, and headings without text before
    the next one of their level that come again later.
    """
    kept: list[Block] = []
    last = {lower(block.text, language): place for place, block in enumerate(blocks) if block.level}
    for place, block in enumerate(blocks):
        if block.level:
            after = blocks[place + 1] if place + 1 < len(blocks) else Block("", 1)
            is_bare = bool(after.level) and after.level <= block.level
            is_listed = is_bare and last[lower(block.text, language)] > place
        else:
            lines = block.text.split("\n")
            is_listed = len(lines) >= 3 and sum(_level(line, language) > 0 for line in lines) >= 0.8 * len(lines)
        if is_listed:
            tally.note("text.contents", block.text)
        else:
            kept.append(block)
    return kept
