"""Names of speakers: comparing them by a language's letters, and finding those that stand for one character."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

from trimaran.runtime.twin.casing import lower
from trimaran.runtime.twin.persona.words import FEMALE_TITLES, MALE_TITLES, TITLES

_WORD: Final = re.compile(r"[^\W\d_]+")
_MOST_NEAREST: Final = 5
_CLEARLY: Final = 3
"""By what factor the more frequent of two titles of a name must lead to be meant by the bare name."""


class UnknownCharacter(ValueError):
    """Nobody of that name speaks in the texts; the message names the nearest speakers."""


def tokens_of(name: str, language: str) -> tuple[str, ...]:
    """Return the words of a name in lower case, without possessives."""
    bare = re.sub(r"['’]s\b", "", name)
    return tuple(_WORD.findall(lower(bare, language)))


def gender_of(name: str, language: str) -> str:
    """Return "m" or "f" where a title tells, else ""."""
    tokens = set(tokens_of(name, language))
    return "m" if tokens & MALE_TITLES else "f" if tokens & FEMALE_TITLES else ""


def labels_of(character: str, labels: Counter[str], language: str) -> set[str]:
    """Return the labels, as the texts write them, that stand for a character.

    A label of equal words is the character; else one of which the name is a part, or that is a part of the name,
    where it is the only such one. A bare name and its one usual title (Darcy, Mr. Darcy) are the same person; another
    title (Miss Darcy) is another.

    Args:
        labels: the speakers of all texts -> how often they speak.

    Raises:
        UnknownCharacter: no label stands for the character, or several people do.
    """
    wanted = tokens_of(character, language)
    by_tokens: dict[tuple[str, ...], set[str]] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    for label, count in labels.items():
        tokens = tokens_of(label, language)
        if tokens:
            by_tokens.setdefault(tokens, set()).add(label)
            counts[tokens] += count
    names = [] if not wanted else _same_person(wanted, counts)
    if not names:
        raise UnknownCharacter(_unknown(character, labels, language))
    return set().union(*(by_tokens[tokens] for tokens in names))


def _same_person(wanted: tuple[str, ...], counts: Counter[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the names, in words, that stand for `wanted`; [] where none or several people do."""
    bare = _bare(wanted)
    if not bare:  # "King" alone is a name only as it stands
        return [wanted] if wanted in counts else []
    titled = Counter({tokens: count for tokens, count in counts.items() if tokens != bare and _bare(tokens) == bare})
    if wanted in counts:
        if wanted == bare:
            leader = _leader(titled)
            return [wanted, *([leader] if leader is not None else [])]
        is_usual = _leader(titled) == wanted
        return [wanted, *([bare] if is_usual and bare in counts else [])]
    larger = [tokens for tokens in counts if set(wanted) <= set(tokens)]
    if larger:
        leader = _leader(Counter({tokens: counts[tokens] for tokens in larger}))
        return [] if leader is None else [leader]
    # Elizabeth of Elizabeth Bennet, and not Bennet, which the whole family is called.
    smaller = [tokens for tokens in counts if _bare(tokens) == bare[: len(_bare(tokens))] and _bare(tokens)]
    return smaller if len(smaller) == 1 else []


def _bare(tokens: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(token for token in tokens if token not in TITLES)


def _leader(counts: Counter[tuple[str, ...]]) -> tuple[str, ...] | None:
    """Return the one that is clearly the most frequent."""
    first = counts.most_common(2)
    if not first or (len(first) == 2 and first[0][1] < _CLEARLY * first[1][1]):
        return None
    return first[0][0]


def _unknown(character: str, labels: Counter[str], language: str) -> str:
    """Return the sentence about a character who never speaks."""
    near = nearest(character, labels, language)
    if not labels:
        return (
            f"--character {character!r} never speaks: no speaker was found in the texts, neither in plays nor in "
            "dialogue; leave --character out for the author's own voice"
        )
    shown = ", ".join(near)
    return f"--character {character!r} never speaks in the texts; the nearest speakers are {shown}: name one of them"


def nearest(character: str, labels: Iterable[str], language: str) -> list[str]:
    """Return the speakers whose names are nearest: those that share a word first, then by likeness of letters."""
    counts = labels if isinstance(labels, Counter) else Counter(labels)
    wanted = tokens_of(character, language)

    def rank(label: str) -> tuple[float, int, str]:
        tokens = tokens_of(label, language)
        likeness = difflib.SequenceMatcher(None, " ".join(wanted), " ".join(tokens)).ratio()
        best = max((difflib.SequenceMatcher(None, a, b).ratio() for a in wanted for b in tokens), default=0.0)
        return (-max(likeness, best), -counts[label], label)

    distinct: dict[tuple[str, ...], str] = {}
    for label in sorted(counts, key=rank):
        distinct.setdefault(tokens_of(label, language), label)
    return list(distinct.values())[:_MOST_NEAREST]
