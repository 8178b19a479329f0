"""Gopher's quality rules (Rae et al. 2021, appendix A.1.1), each judged as datatrove's GopherQualityFilter does."""

import numpy as np

from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.filters.words import LETTER, SPOKEN, Words, lines_of, split_words, words_of
from trimaran.runtime.spec.sections.recipe.filter import GopherSettings

_AT_ONCE = 256


class GopherFilter:
    """Removes texts that are no prose: too short, too long, of symbols, of bullets, without letters or stop words."""

    name = "gopher"

    def __init__(self, settings: GopherSettings) -> None:
        """Raises DataError for a stop word that is no single word."""
        self._settings = settings
        for word in settings.stop_words:
            if split_words(word) != [word]:
                parts = ", ".join(map(repr, split_words(word))) or "nothing"
                raise DataError(f"filter.gopher.stop_words: {word!r} is not one word but {parts}; list single words")
        self._stop_words = {int(words_of(word).hashes[0]) for word in settings.stop_words}

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Return the first rule that the text breaks."""
        words = words_of(document.text)
        return self._judge_words(words) or self._judge_symbols(document.text, words) or self._judge_kinds(words)

    def _judge_words(self, words: Words) -> Removal | None:
        limits = self._settings
        spoken = words.flags & SPOKEN != 0
        count = int(np.count_nonzero(spoken))
        if limits.min_words is not None and count < limits.min_words:
            return Removal("gopher.few_words", f"{count} words, below {limits.min_words}")
        if limits.max_words is not None and count > limits.max_words:
            return Removal("gopher.many_words", f"{count} words, above {limits.max_words}")
        mean = int(words.lengths(1)[spoken].sum()) / count if count else 0.0
        if limits.min_mean_word_length is not None and mean < limits.min_mean_word_length:
            return Removal("gopher.short_words", f"{mean:.3g} characters a word, below {limits.min_mean_word_length:g}")
        if limits.max_mean_word_length is not None and mean > limits.max_mean_word_length:
            return Removal("gopher.long_words", f"{mean:.3g} characters a word, above {limits.max_mean_word_length:g}")
        return None

    def _judge_symbols(self, text: str, words: Words) -> Removal | None:
        limits = self._settings
        count, ellipses = words.count or 1, text.count("...") + text.count("…")
        for reason, symbols in (("hashes", text.count("#")), ("ellipses", ellipses)):
            if limits.max_symbols_per_word is not None and symbols / count > limits.max_symbols_per_word:
                detail = f"{symbols / count:.3g} for each word, above {limits.max_symbols_per_word:g}"
                return Removal(f"gopher.{reason}", detail)
        lines = lines_of(text)
        for reason, most, marks, has_mark in (
            ("bullet_lines", limits.max_bullet_lines, text.count("•") + text.count("-"), _begins_with_bullet),
            ("ellipsis_lines", limits.max_ellipsis_lines, ellipses, _ends_with_ellipsis),
        ):
            if most is None or not lines or marks / len(lines) <= most:  # there are no more such lines than marks
                continue
            found = sum(map(has_mark, lines))
            if found / len(lines) > most:
                return Removal(f"gopher.{reason}", f"{found} of {len(lines)} lines, above {most:g}")
        return None

    def _judge_kinds(self, words: Words) -> Removal | None:
        limits = self._settings
        share = int(np.count_nonzero(words.flags & LETTER)) / (words.count or 1)
        if limits.min_alphabetic_words is not None and share < limits.min_alphabetic_words:
            detail = f"{share:.3g} of the words have a letter, below {limits.min_alphabetic_words:g}"
            return Removal("gopher.few_alphabetic_words", detail)
        if limits.min_stop_words is not None:
            found: set[int] = set()
            for start in range(0, words.count, _AT_ONCE):  # most texts have enough of them soon
                found |= self._stop_words.intersection(words.hashes[start : start + _AT_ONCE].tolist())
                if len(found) >= limits.min_stop_words:
                    return None
            return Removal("gopher.few_stop_words", f"{len(found)} stop words, below {limits.min_stop_words}")
        return None


def _begins_with_bullet(line: str) -> bool:
    return line.lstrip().startswith(("•", "-"))


def _ends_with_ellipsis(line: str) -> bool:
    return line.rstrip().endswith(("...", "…"))
