"""The index of a twin with the coverage below which its texts are silent, measured on the texts themselves."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.retrieval.absent import absent_questions
from trimaran.runtime.twin.retrieval.index import Index, Silence
from trimaran.runtime.twin.retrieval.masked import make_queries

REFUSED: Final = 0.9
"""Share of questions about absent topics that the threshold lets be answered by silence."""
HIGHEST: Final = 0.9
"""The most that a threshold may be: a question all of whose terms a passage has is never met with silence."""
LEAST_QUESTIONS: Final = 10
STANDARD: Final = 0.7
"""The threshold where there are too few such questions: about those measured on five and on 38 plays."""
_MOST_QUERIES: Final = 200
_FIRST: Final = 5


def build_index(passages: Sequence[Passage], language: str) -> Index:
    """Return the index of all passages that are not held out, with a measured threshold of silence.

    The threshold is the least coverage that REFUSED of the questions about absent topics stay below. What it costs is
    measured beside it: the share of queries of the texts' own words (`masked.py`) that it still lets through.

    Args:
        language: ISO 639-1 code of the texts.

    Raises:
        DataError: no passage has a word, or bm25s or PyStemmer is missing.
    """
    index = Index.build(passages, language)
    index.silence = measure(index)
    return index


def measure(index: Index) -> Silence:
    """Return the threshold for an index and what it does to questions about absent and present topics."""
    absent = coverages(index, absent_questions(index.terms.language, index.says))
    threshold = STANDARD
    if len(absent) >= LEAST_QUESTIONS:
        # Of n coverages at least REFUSED n lie below: the next greater number than the one at that place.
        threshold = float(np.nextafter(np.sort(absent)[int(np.ceil(REFUSED * len(absent))) - 1], 2))
        threshold = min(threshold, HIGHEST)
    present = coverages(index, [each.query for each in make_queries(index.passages, index.terms, _MOST_QUERIES)])
    refused = float(np.mean([each < threshold for each in absent])) if absent else 0.0
    kept = float(np.mean([each >= threshold for each in present])) if present else 1.0
    return Silence(threshold, len(absent), refused, len(present), kept)


def coverages(index: Index, questions: Sequence[str]) -> list[float]:
    """Return for each question the greatest coverage among the first passages."""
    return [max((each.coverage for each in index.rank(question, _FIRST)), default=0.0) for question in questions]
