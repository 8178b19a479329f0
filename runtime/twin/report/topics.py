"""What a twin's texts are about: the words of topics among all words that it has learned to say."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from trimaran.runtime.twin.retrieval.terms import Terms

_LEAST_TEXTS: Final = 3
_LEAST_LETTERS: Final = 4
_LEAST_SHARE: Final = 0.3
"""Of the places of a word, those after a determiner: nouns have it on Shakespeare's plays, `indeed` and `come` not."""
_DETERMINERS: Final = MappingProxyType(
    {
        "en": "a an the this that these those my mine thy thine his her its our your their no",
        "de": "der die das den dem des ein eine einen einem einer eines kein keine keinen dieser diese dieses diesen "
        "mein meine meinen meiner dein deine deinen deiner sein seine seinen seiner ihr ihre ihren ihrer unser unsere",
        "fr": "le la les l un une des du ce cet cette ces mon ma mes ton ta tes son sa ses notre nos votre vos leur "
        "leurs",
    }
)


@dataclass(frozen=True)
class _Words:
    """How often texts have each term, and how many of them, how many follow a determiner, and how it is written."""

    times: Counter[str]
    texts: Counter[str]
    determined: Counter[str]
    written: dict[str, Counter[str]]
    total: int

    @classmethod
    def of(cls, texts: Sequence[str], terms: Terms) -> "_Words":
        found = cls(Counter(), Counter(), Counter(), {}, len(texts))
        determiners = frozenset(_DETERMINERS.get(terms.language, "").split())
        for text in texts:
            words, seen = terms.words(text), set[str]()
            for before, word in zip(["", *words], words, strict=False):
                for term in terms.content([word]):
                    seen.add(term)
                    found.times[term] += 1
                    found.determined[term] += before in determiners
                    found.written.setdefault(term, Counter())[word] += 1
            found.texts.update(seen)
        return found


def topics(
    learned: Sequence[str], passages: Sequence[str], others: Sequence[str], terms: Terms, count: int
) -> list[str]:
    """Return words that a twin can be asked about, the best first; each as the texts write it.

    They are words that at least three texts have. A topic's word comes in bursts where the texts speak of it (residual
    inverse document frequency: Church and Gale 1995, section 4), and the author has it oftener than others
    (log-likelihood ratio: Dunning 1993, section 5): they are ranked by the product. Nouns come first, where the
    determiners of the language are known: words a third of whose places follow one.

    Args:
        learned: what the twin has learned to say.
        passages: of the author's texts.
        others: texts of others; none for bursts and frequency alone.
        terms: for the language.
    """
    said, author, rest = (_Words.of(texts, terms) for texts in (learned, passages, others))

    def rank(term: str) -> tuple[bool, float, int, str]:
        is_noun = author.determined[term] >= _LEAST_SHARE * author.times[term]
        more = _keyness(said, rest, term) if others else float(said.times[term])
        return not is_noun, -max(0.0, more) * max(0.0, _bursts(author, term)), -said.times[term], term

    def written(term: str) -> str:
        return author.written[term].most_common(1)[0][0]

    fitting = [term for term, number in said.texts.items() if number >= _LEAST_TEXTS and term in author.written]
    fitting = sorted((each for each in fitting if len(written(each)) >= _LEAST_LETTERS), key=rank)
    return [written(term) for term in fitting[:count]]


def _bursts(words: _Words, term: str) -> float:
    """Return the bits by which a term is in fewer texts than its number of times lets expect."""
    expected = 1 - math.exp(-words.times[term] / words.total)
    return math.log2(expected) - math.log2(words.texts[term] / words.total)


def _keyness(mine: _Words, others: _Words, term: str) -> float:
    """Return Dunning's statistic of a term, positive where `mine` have it oftener."""
    times, sizes = (mine.times[term], others.times[term]), (mine.times.total(), others.times.total())
    expected = [size * sum(times) / sum(sizes) for size in sizes]
    found = 2 * sum(time * math.log(time / wanted) for time, wanted in zip(times, expected, strict=True) if time)
    return found if times[0] > expected[0] else -found
