"""Who speaks, by the words around a quote: "said X", "X replied", "X dedi", "diye sordu X"."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Final

from trimaran.runtime.twin.casing import lower
from trimaran.runtime.twin.persona.words import AFTER_NAMES, BEFORE_NAMES, LETTER, LOWER, UPPER, Speech, speech_of

_WORD = rf"[{UPPER}][{LETTER}]+(?:-[{LETTER}]+)*"
_TITLE = rf"(?:{'|'.join(BEFORE_NAMES)})\.?"
NAME: Final = re.compile(
    rf"\b(?:[Tt]he\s+)?(?P<name>(?:{_TITLE}\s+)*{_WORD}(?:\s+(?:(?:de|van|von)\s+)?{_WORD}){{0,3}})(?![\w'’-])"
)
_NAME: Final = NAME.pattern.replace("?P<name>", "?P<name>")
_SENTENCE: Final = re.compile(r"[.!?…]+[\"'’”»]*\s+")
_TO_ONESELF: Final = re.compile(r"\bto (?:him|her)self\b|\bkendi kendine\b|\biçinden\b")
_REACH: Final = 16
_LAST_WORDS: Final = 4
_TURKISH_ROLE: Final = "bir|yaşlı|genç|küçük|adam|kadın|kız|çocuk|ihtiyar"
_ROLE: Final = r"(?:the|his|her|my|their|our|its|an?)\s+[a-z]+(?:\s+[a-z]+)?"


@dataclass(frozen=True, slots=True)
class Told:
    """What the words around a quote tell.

    Args:
        name: of the speaker; None where it is a pronoun, a role, or left out.
        pronoun: "m", "f" or "" for one that stands for the speaker, None where there is none. Turkish leaves it out.
        is_thought: whether the words are thought.
        end: characters of the narration that belong to the attribution.
    """

    name: str | None = None
    pronoun: str | None = None
    is_thought: bool = False
    end: int = 0


@dataclass(frozen=True)
class _Patterns:
    verb_first: re.Pattern[str]
    name_first: re.Pattern[str]
    lead_in: re.Pattern[str]


class Attribution:
    """Reads attributions of one language."""

    def __init__(self, language: str) -> None:
        self.language = language
        self.words: Speech = speech_of(language)
        self._patterns = _patterns(language)
        self._thinks = {" ".join(verb.split("_")) for verb in self.words.thinks}

    def after(self, narration: str) -> Told | None:
        """Return what the narration that follows a quote tells, None where it is no attribution."""
        text = _flat(narration)
        for pattern in (self._patterns.verb_first, self._patterns.name_first):
            found = pattern.match(text)
            if found is not None:
                return self._told(found)
        return None

    def before(self, narration: str) -> Told | None:
        """Return what the sentence that leads to a quote tells, None where it does not end in a comma or a colon."""
        sentence = last_sentence(_flat(narration))
        if not sentence.rstrip().endswith((",", ":")):
            return None
        alone = NAME.fullmatch(sentence.strip(" :")) if sentence.rstrip().endswith(":") else None
        if alone is not None and (name := self.name_of(alone["name"])) is not None:
            return Told(name)
        if self.language == "tr":
            subject = self.subject(sentence)
            is_told = sentence.rstrip().endswith(":") or self._has_verb(sentence)
            return Told(subject) if subject is not None and is_told else None
        found = self._patterns.lead_in.search(sentence)
        if found is not None:
            return self._told(found)
        subject = self.subject(sentence)
        is_told = subject is not None and sentence.lstrip().startswith(subject) and self._ends_in_verb(sentence)
        return Told(subject) if is_told else None

    def subject(self, sentence: str) -> str | None:
        """Return the only name of a sentence that is not possessive or inflected; None where there are none or more."""
        names = [name for match in NAME.finditer(sentence) if (name := self.name_of(match["name"])) is not None]
        return names[0] if len({*names}) == 1 else None

    def names_in(self, narration: str) -> list[str]:
        """Return the names in a narration, in their order, also those of whose something is told ("Jane's").

        A capitalised word at the beginning of a sentence counts too, unless it usually is no name.
        """
        text = re.sub(r"(?<=\w)['’]\w+", "", _flat(narration))
        return [name for match in NAME.finditer(text) if (name := self.name_of(match["name"])) is not None]

    def name_of(self, found: str) -> str | None:
        """Return a name without words that only begin a sentence; None where nothing is left."""
        words = found.split()
        while (
            words
            and lower(words[0].rstrip("."), self.language) in self.words.starters
            and not (len(words) > 1 and words[0].rstrip(".") in BEFORE_NAMES)
        ):
            words = words[1:]
        if not words or all(word.rstrip(".") in (*BEFORE_NAMES, *AFTER_NAMES) for word in words):
            return None
        return " ".join(words)

    def _told(self, found: re.Match[str]) -> Told:
        groups = found.groupdict()
        verb = lower(" ".join((groups.get("verb") or "").split()), self.language)
        is_thought = verb in self._thinks or _TO_ONESELF.search(found.string, 0, found.end() + _REACH) is not None
        pronoun = groups.get("pronoun")
        name = None if groups.get("name") is None else self.name_of(groups["name"])
        if pronoun is not None:
            gender = self.words.pronouns.get(lower(pronoun, self.language))
            return Told(None, gender, is_thought, found.end())
        if name is None and self.language == "tr" and groups.get("role") is None:
            return Told(None, "", is_thought, found.end())
        return Told(name, None, is_thought, found.end())

    def _ends_in_verb(self, sentence: str) -> bool:
        """Return whether one of the last words of a sentence says something: "turned to him and asked,"."""
        return any(word in self.words.says for word in re.findall(r"\w+", sentence)[-_LAST_WORDS:])

    def _has_verb(self, sentence: str) -> bool:
        words = set(re.findall(r"\w+", lower(sentence, self.language)))
        return bool(words & {verb.split("_")[0] for verb in self.words.says})


def last_sentence(text: str) -> str:
    """Return what follows the last end of a sentence; a title such as Mr. ends none."""
    start = 0
    for match in _SENTENCE.finditer(text):
        word = text[: match.start()].rsplit(None, 1)
        if not (word and match[0].strip() == "." and word[-1].strip("(\"“'‘") in BEFORE_NAMES):
            start = match.end()
    return text[start:]


def _flat(text: str) -> str:
    """Return a text of equal length in which every white space is a space."""
    return re.sub(r"\s", " ", text)


@cache
def _patterns(language: str) -> _Patterns:
    speech = speech_of(language)
    verbs = sorted((*speech.says, *speech.thinks), key=len, reverse=True)
    verb = rf"(?P<verb>{'|'.join(verb.replace('_', ' +') for verb in verbs)})\b"
    if language == "tr":
        low = rf"(?:[{LOWER}]+,? +){{0,4}}?"
        return _Patterns(
            re.compile(rf"[\s,…—–-]*(?:diye +)?{low}{verb}(?: +(?:{_NAME}|(?P<role>{_TURKISH_ROLE})\b))?"),
            re.compile(rf"[\s,…—–-]*(?:diye +)?{_NAME} +(?:diye +)?{low}{verb}"),
            re.compile(r"(?!)"),
        )
    # What is only reported ("replied that it was"), and one who breaks off what another says ("interrupted him").
    no_report = r"(?! +(?:that|in the|to (?!him|her)|nothing|only)\b)(?!(?<=interrupted) +(?:him|her|them)\b)"
    pronoun = r"(?P<pronoun>[Hh]e|[Ss]he|I|[Tt]hey|[Ww]e|you)\b"
    person = rf"(?:{_NAME}|{pronoun}|(?P<role>{_ROLE}))"
    adverb = r"(?:(?:[a-z]+ly|then|again|only|had|at last|at length|also|soon) +)?"
    return _Patterns(
        re.compile(rf"[\s,;—–-]*{verb} +{person}"),
        re.compile(rf"[\s,;—–-]*{person} +{adverb}{verb}{no_report}"),
        re.compile(
            rf"(?:^|[,;:] +|\b(?:and|but|then|when|as) +)\s*{person} +{adverb}{verb}(?: +[\w'’-]+){{0,9}}[,:]\s*$"
        ),
    )
