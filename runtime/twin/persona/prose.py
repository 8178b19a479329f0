"""What the characters of a novel say and think, and who says it where the text tells it beyond doubt.

A speaker is known by the words beside the quote; by a pronoun (or Turkish's missing one) where the paragraph, or the
narration before it, names one person alone; and by the turns of two people who take turns without a word between.
Everything else keeps no speaker: it can be what a character answers to, and is nobody's answer.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from trimaran.runtime.twin.casing import lower
from trimaran.runtime.twin.persona.attribution import NAME, Attribution, Told, last_sentence
from trimaran.runtime.twin.persona.names import gender_of
from trimaran.runtime.twin.persona.paragraphs import Paragraph, Part, Utterance, Words
from trimaran.runtime.twin.persona.quotes import DASH, Quote, dash_of, quotes_of, style_of
from trimaran.runtime.twin.persona.words import AFTER_NAMES, BEFORE_NAMES, LOWER

_MOST_INFERRED: Final = 4
"""Turns in a row whose speaker is told by their order alone: a longer run loses count where a reader does too."""
_NEXT_PRONOUN: Final = re.compile(r"\b(he|she|his|her|him|himself|herself)\b", re.IGNORECASE)
_REACH: Final = 80
_SURE: Final = 0.75
_AMID: Final = re.compile(rf"[{LOWER},] $")
_SENTENCE_END: Final = re.compile(r"[,.!?…]\s*[—–-]?\s*")


@dataclass
class _Turn:
    """One speaker's words in one paragraph.

    Args:
        quotes: without the marks, in the paragraph.
        is_told: whether the paragraph says who speaks, be it by a word that stands for nobody here.
        has_narration: beside the quotes.
        goes_on: whether its last quote is not closed.
        is_after_gap: whether a paragraph of narration stands before it.
        pronoun: gender of the one that stands for the speaker, "" for either; None where there is none.
    """

    paragraph: Paragraph
    quotes: list[tuple[int, int]]
    speaker: str | None = None
    kind: Literal["speech", "thought"] = "speech"
    is_told: bool = False
    is_inferred: bool = False
    has_narration: bool = False
    goes_on: bool = False
    is_after_gap: bool = False
    pronoun: str | None = None


class Prose:
    """Reads the dialogue of one work.

    Args:
        style: how its speech is marked.
        genders: name -> "m" or "f", as far as the text tells.
    """

    def __init__(self, style: str, language: str, genders: Mapping[str, str], known: frozenset[str]) -> None:
        self.style, self.language = style, language
        self._attribution = Attribution(language)
        self._genders, self._known = genders, known

    @staticmethod
    def find(paragraphs: Sequence[Paragraph], language: str) -> "Prose | None":
        """Return how a work marks its speech, None where it has none."""
        style = style_of(paragraphs)
        if style is None:
            return None
        attribution = Attribution(language)
        text = "\n\n".join(paragraph.text for paragraph in paragraphs)
        return Prose(style, language, _genders(text, attribution), _known(text, attribution))

    def scenes(self, stretch: Sequence[Paragraph]) -> Iterator[list[Utterance]]:
        """Yield the utterances of each run of paragraphs that speak, with no more than one of narration between."""
        turns: list[_Turn] = []
        last_spoke = 0
        before = ""
        for number, paragraph in enumerate(stretch):
            found = list(self._turns(paragraph, before))
            if found and turns and number - last_spoke > 2:
                yield self._utterances(turns)
                turns = []
            if found:
                found[0].is_after_gap = number - last_spoke > 1
                self._join(turns, found, is_next=number - last_spoke == 1)
                last_spoke = number
            before = "" if found else paragraph.text
        if turns:
            yield self._utterances(turns)

    def _join(self, turns: list[_Turn], found: list[_Turn], *, is_next: bool) -> None:
        """Add the turns of a paragraph; one whose last quote is open is gone on with by its speaker."""
        if turns and is_next and turns[-1].goes_on and found[0].speaker is None:
            found[0].speaker, found[0].is_told = turns[-1].speaker, True
        turns.extend(found)

    def _turns(self, paragraph: Paragraph, before: str) -> Iterator[_Turn]:
        """Yield the turns of a paragraph.

        Args:
            before: the paragraph of narration before it, "" where that speaks.
        """
        if self.style == DASH:
            turn = self._dashed(paragraph)
            if turn is not None:
                self._complete(turn, [], before)
                yield turn
            return
        text = paragraph.text
        quotes = list(quotes_of(text, self.style))
        if not quotes:
            return
        tolds = [self._beside(text, quotes, number) for number in range(len(quotes))]
        if self._is_narration(text, quotes, tolds):
            return
        names = {told.name for told in tolds if told is not None and told.name is not None}
        groups: list[_Turn] = []
        for number, (quote, told) in enumerate(zip(quotes, tolds, strict=True)):
            is_new = not groups or (len(names) > 1 and told is not None and told.name != groups[-1].speaker)
            if is_new:
                groups.append(_Turn(paragraph, [], has_narration=_narrates(text, quotes)))
            turn = groups[-1]
            turn.quotes.append((quote.said_start, quote.said_end))
            turn.goes_on = quote.is_open and number == len(quotes) - 1
            if told is not None:
                turn.is_told = True
                turn.kind = "thought" if told.is_thought else turn.kind
                turn.speaker = turn.speaker or told.name
                if turn.speaker is None and told.pronoun is not None:
                    turn.pronoun = told.pronoun
                    turn.speaker = self._meant(told.pronoun, text[: quote.end], quotes, before)
        if len(groups) == 1:
            self._complete(groups[0], quotes, before)
        yield from groups

    def _is_narration(self, text: str, quotes: Sequence[Quote], tolds: Sequence[Told | None]) -> bool:
        """Return whether quotes stand amid a narration that attributes none: cited words, letters, thoughts of many."""
        return quotes[0].start > 0 and not any(tolds) and not text[: quotes[0].start].rstrip().endswith((":", ",", "."))

    def _beside(self, text: str, quotes: Sequence[Quote], number: int) -> Told | None:
        """Return what the narration on both sides of a quote tells of it."""
        quote = quotes[number]
        after = text[quote.end : quotes[number + 1].start if number + 1 < len(quotes) else len(text)]
        start = quotes[number - 1].end if number else 0
        before = text[start : quote.start]
        told = self._attribution.after(after)
        if told is not None and told.name is None and told.pronoun == "" and self.language == "tr":
            subject = self._subject(before)
            return replace(told, name=subject) if subject is not None else told
        if told is not None:
            return told
        # What follows an earlier quote tells of that one.
        return self._attribution.before(before) if not number or self._attribution.after(before) is None else None

    def _subject(self, before: str) -> str | None:
        name = self._attribution.subject(last_sentence(before))
        return name if name is not None and self._is_known(name) else None

    def _dashed(self, paragraph: Paragraph) -> _Turn | None:
        """Return the turn of a paragraph that a dash opens."""
        text = paragraph.text
        start = dash_of(text)
        if start is None:
            return None
        for match in _SENTENCE_END.finditer(text, start):
            told = self._attribution.after(text[match.end() :])
            ends = told is not None and re.match(r"\s*(?:[.,:;!?…—–-]|$)", text[match.end() + told.end :]) is not None
            if told is None or not ends or not any(map(str.isalpha, text[start : match.start() + 1])):
                continue
            turn = _Turn(paragraph, [(start, match.start() + 1)], told.name, is_told=True, has_narration=True)
            turn.kind = "thought" if told.is_thought else "speech"
            more = re.match(r"\s*[.,]?\s*[—–-]+\s*", text[match.end() + told.end :])
            if more is not None:
                begin = match.end() + told.end + more.end()
                if begin < len(text):
                    turn.quotes.append((begin, len(text)))
            return turn
        return _Turn(paragraph, [(start, len(text))])

    def _complete(self, turn: _Turn, quotes: Sequence[Quote], before: str) -> None:
        """Take the speaker from the narration before, where that leads to the words by a colon."""
        if turn.speaker is None and not turn.is_told and before.rstrip().endswith(":"):
            turn.is_told = True
            told = self._attribution.before(before)
            turn.speaker = None if told is None else told.name

    def _meant(self, gender: str, text: str, quotes: Sequence[Quote], before: str) -> str | None:
        """Return whom a pronoun stands for: the one person whom the narration names, first here, then before it."""
        narration = _narration(text, quotes)
        for part in (narration, before):
            names = [name for name in self._attribution.names_in(part) if self._is_known(name)]
            if names:
                people = {lower(name, self.language) for name in names}
                known = self._genders.get(names[0], "") if gender else ""
                # One who is only spoken to ("Kemal'e dönüp") or owns something is not who speaks.
                is_sure = self._attribution.subject(part) == names[0] and (not gender or known == gender)
                return names[0] if len(people) == 1 and is_sure else None
        return None

    def _is_known(self, name: str) -> bool:
        return any(word in self._known for word in name.split())

    def _utterances(self, turns: list[_Turn]) -> list[Utterance]:
        self._take_turns(turns)
        return [utterance for turn in turns if (utterance := _utterance(turn)) is not None]

    def _take_turns(self, turns: list[_Turn]) -> None:
        """Give the speakers of the turns before to turns of two people that stand without a word of narration.

        A pronoun beside the words may stand for nobody else than that speaker, of its gender.
        """
        run = 0
        for number, turn in enumerate(turns):
            if turn.speaker is not None or number < 2:
                run = 0
                continue
            other, same = turns[number - 1], turns[number - 2]
            is_clear = (
                same.speaker is not None
                and self._are_two(turns, number)
                and not other.goes_on
                and not (turn.is_after_gap or other.is_after_gap)
            )
            is_bare = not turn.is_told and not turn.has_narration
            gender = self._genders.get(same.speaker or "")
            is_meant = other.speaker is not None and bool(turn.pronoun) and turn.pronoun == gender
            if is_clear and (is_bare or is_meant) and run < _MOST_INFERRED:
                turn.speaker, turn.is_inferred = same.speaker, True
                run = 0 if is_meant else run + 1

    def _are_two(self, turns: Sequence[_Turn], number: int) -> bool:
        """Return whether two people speak since the last narration, and the turn before is not `same`'s.

        Where that turn has no name, the run of turns may have only one name in all.
        """
        other, same = turns[number - 1], turns[number - 2]
        names = set()
        for turn in reversed(turns[:number]):
            if turn.speaker is not None or not turn.is_told:
                names.add(turn.speaker)
            elif not turn.pronoun:  # by a role, which may be a third
                return False
            if turn.is_after_gap:
                break
        if other.speaker is not None:
            return other.speaker != same.speaker and names - {None} == {other.speaker, same.speaker}
        return names - {None} == {same.speaker} and (not other.is_told or bool(other.pronoun))


def _utterance(turn: _Turn) -> Utterance | None:
    paragraph = turn.paragraph
    parts: list[Part] = []
    for number, (start, end) in enumerate(turn.quotes):
        said = paragraph.text[start:end]
        begin, stop = start + len(said) - len(said.lstrip()), start + len(said.rstrip())
        after = paragraph.text[turn.quotes[number + 1][0] :].lstrip()[:1] if number + 1 < len(turn.quotes) else ""
        if not after.islower():  # the comma before "said X" is the attribution's, unless the sentence goes on
            stop = begin + len(paragraph.text[begin:stop].rstrip(","))
        if any(map(str.isalpha, paragraph.text[begin:stop])):
            parts.append(Part(paragraph.passage, paragraph.start + begin, paragraph.start + stop))
    if not parts:
        return None
    speakers = () if turn.speaker is None else (turn.speaker,)
    return Utterance(speakers, Words(tuple(parts)), turn.kind, turn.is_inferred)


def _narration(text: str, quotes: Sequence[Quote]) -> str:
    """Return a paragraph without its quotes."""
    kept, place = [], 0
    for quote in quotes:
        kept.append(text[place : quote.start])
        place = quote.end
    return " . ".join([*kept, text[place:]])


def _narrates(text: str, quotes: Sequence[Quote]) -> bool:
    return any(character.isalpha() for character in _narration(text, quotes))


def _genders(text: str, attribution: Attribution) -> dict[str, str]:
    """Return the gender of each name that a title tells, or three in four of the pronouns that follow it."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for match in NAME.finditer(text):
        name = attribution.name_of(match["name"])
        found = None if name is None else _NEXT_PRONOUN.search(text, match.end(), match.end() + _REACH)
        if name is not None and found is not None and NAME.search(text, match.end(), found.start()) is None:
            votes[" ".join(name.split())]["m" if found[1].lower() in ("he", "his", "him", "himself") else "f"] += 1
    genders = {}
    for name, counts in votes.items():
        gender, count = counts.most_common(1)[0]
        if count >= _SURE * counts.total():
            genders[name] = gender
    names = {" ".join(match["name"].split()) for match in NAME.finditer(text)}
    return genders | {name: told for name in names if (told := gender_of(name, attribution.language))}


def _known(text: str, attribution: Attribution) -> frozenset[str]:
    """Return the words of names: capitalised amid a sentence somewhere, or with a title."""
    flat = re.sub(r"\s", " ", text)
    known: set[str] = set()
    for match in NAME.finditer(flat):
        found, words = match["name"].split(), (attribution.name_of(match["name"]) or "").split()
        is_amid = len(words) < len(found) or _AMID.search(flat[max(0, match.start() - 2) : match.start()]) is not None
        if words and (is_amid or any(word.rstrip(".") in (*BEFORE_NAMES, *AFTER_NAMES) for word in words)):
            known.update(words)
    return frozenset(known)
