"""Queries made of the texts themselves: a sentence whose words are half masked, and one that is gone from its passage.

*Masked*: half of a sentence's content words, drawn by its hash, are taken out; the rest must find the passage that the
sentence is in. *Removed*: the Inverse Cloze Task (Lee et al., "Latent Retrieval for Weakly Supervised Open Domain
Question Answering", 2019, section 4): the sentence's content words must find its passage although the index does not
have the sentence itself: only what stands around it can match.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.retrieval.terms import Terms

# It begins where one may have ended: else a text without an end would be read anew from each of its characters.
_SENTENCE: Final = re.compile(r"(?<![^.!?…\"'”’»)\]])[^.!?…]+[.!?…]+[\"'”’»)\]]*")
LEAST_TERMS: Final = 6
"""Content terms of a sentence that a query is made of: a question has fewer only where half of them are masked."""


@dataclass(frozen=True, slots=True)
class MaskedQuery:
    """A query and the passage that it must find.

    Args:
        query: words parted by spaces.
        passage: id of the passage.
        start, end: characters of the passage's text that the sentence is.
    """

    query: str
    passage: int
    start: int
    end: int


def make_queries(passages: Sequence[Passage], terms: Terms, count: int, share: float = 0.5) -> list[MaskedQuery]:
    """Return queries from sentences of passages that are not held out, at most one of each passage.

    Args:
        count: at most so many, from passages drawn alike for the same texts.
        share: of the content words that the query has, at least two; 1.0 for *removed*.
    """
    draw = random.Random(0)
    queries = list[MaskedQuery]()
    for passage in draw.sample(list(passages), len(passages)):
        if len(queries) == count:
            break
        sentences = [] if passage.is_held_out else list(_SENTENCE.finditer(passage.text))
        for match in draw.sample(sentences, len(sentences)):
            words = [word for word in dict.fromkeys(terms.words(match[0])) if terms.content([word])]
            if len(terms.content(words)) >= LEAST_TERMS:
                kept = draw.sample(words, max(2, round(share * len(words))))
                queries.append(MaskedQuery(" ".join(kept), passage.id, match.start(), match.end()))
                break
    return queries


def without_sentences(passages: Sequence[Passage], queries: Sequence[MaskedQuery]) -> list[Passage]:
    """Return passages without the sentences of queries, to index them for *removed*."""
    cut = {each.passage: each for each in queries}
    return [
        replace(each, text=each.text[: cut[each.id].start] + " " + each.text[cut[each.id].end :])
        if each.id in cut
        else each
        for each in passages
    ]
