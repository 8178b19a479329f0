"""FineWeb's own rules (Penedo et al. 2024, section 3.6), each judged as datatrove's FineWebQualityFilter does."""

from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.filters.characters import SENTENCE_ENDS
from trimaran.runtime.data.filters.gopher_repetition import repeated
from trimaran.runtime.data.filters.words import words_of
from trimaran.runtime.spec.sections.recipe.filter import FineWebSettings


class FineWebFilter:
    """Removes lists and menus: lines that end no sentence, short lines, lines that repeat, lines of few words."""

    name = "fineweb"

    def __init__(self, settings: FineWebSettings) -> None:
        self._settings = settings

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Return the first rule that the text breaks."""
        limits, text = self._settings, document.text
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if not lines:
            return Removal("fineweb.empty")
        ends = sum(line[-1] in SENTENCE_ENDS for line in lines) / len(lines)
        if limits.min_line_ends is not None and ends < limits.min_line_ends:
            return Removal("fineweb.line_ends", f"{ends:.3g} of the lines, below {limits.min_line_ends:g}")
        short = sum(length <= limits.short_line_length for length in map(len, lines)) / len(lines)
        if limits.max_short_lines is not None and short > limits.max_short_lines:
            return Removal("fineweb.short_lines", f"{short:.3g} of the lines, above {limits.max_short_lines:g}")
        newlines = text.count("\n")
        again = repeated(lines)[1] / (len(text) - newlines)
        if limits.max_repeated_characters is not None and again > limits.max_repeated_characters:
            detail = f"{again:.3g} of the characters, above {limits.max_repeated_characters:g}"
            return Removal("fineweb.repeated_lines", detail)
        if limits.max_newlines_per_word is not None:
            lists = newlines / words_of(text).count
            if lists > limits.max_newlines_per_word:
                detail = f"{lists:.3g} line ends for each word, above {limits.max_newlines_per_word:g}"
                return Removal("fineweb.list", detail)
        return None
