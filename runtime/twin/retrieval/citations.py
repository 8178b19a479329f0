"""Citations in an answer: each [n] leads to a passage, and an answer without any gets those it shares words with."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.retrieval.quotes import Quote, check_quotes, quote_spans
from trimaran.runtime.twin.retrieval.terms import Terms

_CITATION: Final = re.compile(r"[ \t]?\[[ \t\n]*([0-9]{1,3}(?:[ \t\n]*[,;–-][ \t\n]*[0-9]{1,3})*)[ \t\n]*\]")
_INSIDE: Final = "[]0123456789,;–- \t\n"
"""What a citation is written in."""
_SENTENCE: Final = re.compile(r"[^.!?…\n]*[.!?…]+[\"'”’»)]*(?:[ \t]?\[[\d,;–\s-]+\])*|[^.!?…\n]+")
RUN_WORDS: Final = 6
"""Words in a row that a sentence and a passage both have, for the one to rest on the other."""
LEAST_TERMS: Final = 4
LEAST_SHARE: Final = 0.7
STRETCH: Final = 2
LEAST_STRETCH: Final = 12
"""Else: so many content terms, and so great a share of all the sentence has, must stand in a stretch of the passage of
STRETCH times the sentence's words, at least LEAST_STRETCH. Over the whole passage, four terms and a share of 0.6 were
met by a fifth of the sentences of other works; this is met by less than one in a hundred (benchmarks/twin.py)."""


@dataclass(frozen=True, slots=True)
class Citation:
    """A citation of an answer.

    Args:
        number: of the passage, from 1.
        start, end: characters of the checked text that are `[number]`.
        passage: its id.
        file, title, chapter, first_line, last_line: of the passage.
        is_attached: whether it was put there by overlap, where the answer had none of its own.
        is_supported: whether its sentence overlaps with the passage by the rule for attaching.
    """

    number: int
    start: int
    end: int
    passage: int
    file: str
    title: str
    chapter: str
    first_line: int
    last_line: int
    is_attached: bool
    is_supported: bool


@dataclass(frozen=True, slots=True)
class Checked:
    """An answer that was held to its passages.

    Args:
        text: the answer, without citations of passages that were not given, and with those that were attached.
        citations: of the text, all of them valid.
        quotes: of the text, of two words and more.
        invalid: numbers that the answer cited and that no passage has; they are not in the text.
    """

    text: str
    citations: tuple[Citation, ...]
    quotes: tuple[Quote, ...]
    invalid: tuple[int, ...]

    def marked(self, mark: str) -> str:
        """Return the text with a mark behind each quote that no passage has, such as `Phrases.not_verbatim`."""
        text = self.text
        for quote in reversed(self.quotes):
            if not quote.is_verbatim:
                text = f"{text[: quote.end]} {mark}{text[quote.end :]}"
        return text


class CitationStream:
    """Citations of an answer that arrives in pieces: each waits until it is whole, and those of no passage never show.

    What is shown is in the end what `check_citations` makes of the whole, but for what that attaches.

    Args:
        count: of the passages in the prompt.
    """

    def __init__(self, count: int) -> None:
        self._count, self._held = count, ""

    def add(self, piece: str) -> str:
        """Return what can be shown with a further piece of the answer."""
        text = self._held + piece
        start = text.find("[", len(text.rstrip(_INSIDE)))
        start = len(text) if start < 0 else start
        start -= text[:start].endswith((" ", "\t"))  # which goes with a citation that is taken out
        self._held = text[start:]
        return _cleaned(text[:start], self._count)[0]

    def finish(self) -> str:
        """Return what is left at the end of the answer."""
        text, self._held = self._held, ""
        return _cleaned(text, self._count)[0]


def check_citations(answer: str, passages: Sequence[Passage], terms: Terms) -> Checked:
    """Return an answer with its citations and quotes checked.

    `[2]`, `[1, 3]` and `[1-3]` are citations; numbers of no passage are taken out. Where none of a model's own is
    valid, each sentence gets the passage that it overlaps with most, if it does: RUN_WORDS words in a row, or at least
    LEAST_TERMS different content terms, LEAST_SHARE of the sentence's, near each other. None is put inside a quote.

    Args:
        passages: those of the prompt; the first is [1].
        terms: for the language of the texts.
    """
    text, invalid = _cleaned(answer, len(passages))
    numbers = [(int(match[1]), match.start(1) - 1) for match in _CITATION.finditer(text)]
    words = [terms.words(each.text) for each in passages]
    if not numbers:
        text, numbers = _attach(text, words, terms)
        attached = True
    else:
        attached = False
    citations = []
    sentences = _sentences(text)
    for number, start in numbers:
        sentence = next((text[first:last] for first, last in sentences if first <= start < last), "")
        passage = passages[number - 1]
        is_supported = overlap(_CITATION.sub("", sentence), words[number - 1], terms) > 0
        citations.append(
            Citation(
                number, start, start + len(f"[{number}]"), passage.id, passage.file, passage.title, passage.chapter,
                passage.first_line, passage.last_line, attached, is_supported,
            )
        )  # fmt: skip
    return Checked(text, tuple(citations), tuple(check_quotes(text, passages)), tuple(invalid))


def _cleaned(text: str, count: int) -> tuple[str, list[int]]:
    """Return a text in which every citation is one [n] of a passage, and the numbers of no passage that it had."""
    invalid = list[int]()

    def normal(match: re.Match[str]) -> str:
        named = _named(match[1], count)
        valid = [each for each in named if 1 <= each <= count]
        invalid.extend(each for each in named if each not in valid)
        space = " " if valid and match[0][0] in " \t" else ""
        return space + "".join(f"[{each}]" for each in valid)

    before = None
    while text != before:  # where one is taken out, what is left around it may be another: [[7]9]
        before, text = text, _CITATION.sub(normal, text)
    return text, invalid


def _named(inside: str, count: int) -> list[int]:
    """Return the numbers of `1, 3` and `1-3`; a range that leaves the passages is its two ends."""
    found = list[int]()
    for part in re.split(r"[,;]", inside):
        ends = [int(each) for each in re.split(r"[–-]", part)]
        if len(ends) == 2 and 1 <= ends[0] <= ends[1] <= count:
            found += range(ends[0], ends[1] + 1)
        else:
            found += ends
    return list(dict.fromkeys(found))


def _sentences(text: str) -> list[tuple[int, int]]:
    """Return where sentences begin and end; what is quoted is never parted."""
    quotes = quote_spans(text)
    found = list[tuple[int, int]]()
    for match in _SENTENCE.finditer(text):
        if found and any(first < found[-1][1] < last for first, last in quotes):
            found[-1] = (found[-1][0], match.end())
        else:
            found.append(match.span())
    return found


def _attach(text: str, words: Sequence[Sequence[str]], terms: Terms) -> tuple[str, list[tuple[int, int]]]:
    pieces, numbers = list[str](), list[tuple[int, int]]()
    at = size = 0
    for first, last in _sentences(text):
        overlaps = [overlap(text[first:last], each, terms) for each in words]
        best = max(overlaps, default=0.0)
        end = first + len(text[first:last].rstrip())
        pieces.append(text[at:end])
        size += len(pieces[-1])
        at = end
        if best > 0:
            number = overlaps.index(best) + 1
            pieces.append(f" [{number}]")
            numbers.append((number, size + 1))
            size += len(pieces[-1])
    return "".join([*pieces, text[at:]]), numbers


def overlap(sentence: str, passage: Sequence[str], terms: Terms) -> float:
    """Return how much a sentence rests on a passage: 0 for too little, else more for a longer run and more terms.

    Args:
        passage: its words, from `Terms.words`.
    """
    words = terms.words(sentence)
    run = _longest_run(words, passage)
    mine = terms.content(words)
    shared = _most_near(mine, passage, max(LEAST_STRETCH, STRETCH * len(words)), terms)
    is_shared = shared >= LEAST_TERMS and shared >= LEAST_SHARE * len(mine)
    return run + shared / (1 + len(mine)) if run >= RUN_WORDS or is_shared else 0.0


def _most_near(wanted: set[str], passage: Sequence[str], stretch: int, terms: Terms) -> int:
    """Return how many different terms stand in one stretch of a passage."""
    known = {word: next(iter(terms.content([word]) & wanted), "") for word in set(passage)}
    places = [(place, known[word]) for place, word in enumerate(passage) if known[word]]
    most, first, inside = 0, 0, Counter[str]()
    for place, term in places:
        inside[term] += 1
        while places[first][0] <= place - stretch:
            inside[places[first][1]] -= 1
            inside += Counter()  # without zeros
            first += 1
        most = max(most, len(inside))
    return most


def _longest_run(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many words in a row are in both."""
    places: dict[str, list[int]] = {}
    for place, word in enumerate(second):
        places.setdefault(word, []).append(place)
    longest, before = 0, dict[int, int]()
    for word in first:
        now = {place: before.get(place - 1, 0) + 1 for place in places.get(word, ())}
        longest = max([longest, *now.values()])
        before = now
    return longest
