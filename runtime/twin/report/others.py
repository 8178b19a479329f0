"""Texts of others, beside which an author's style is told: the user's, or what every Python brings along."""

from collections.abc import Sequence
from typing import Final

from trimaran.runtime.twin.texts.read import read_works

_PIECE: Final = 4000  # characters; a text is held out as a whole
_HELD_OUT_EVERY: Final = 4


def others_of(sources: Sequence[str], language: str) -> tuple[list[str], list[str], str]:
    """Return texts of others to learn from, those that are held out, and what they are, in words.

    Args:
        sources: files and folders; none for the topics of Python's documentation, which are in English.
        language: of the author's texts.

    Raises:
        DataError: a source can't be read.
    """
    if sources:
        texts = [work.text for work in read_works(list(sources), language).works]
        what = ", ".join(sources)
    elif language == "en":
        from pydoc_data.topics import topics

        texts, what = [topics[name] for name in sorted(topics)], "the topics of Python's documentation"
    else:
        return [], [], f"nothing: name texts of others in language {language} by --others"
    pieces = [text[start : start + _PIECE] for text in texts for start in range(0, len(text), _PIECE)]
    held_out = pieces[::_HELD_OUT_EVERY]
    return [piece for number, piece in enumerate(pieces) if number % _HELD_OUT_EVERY], held_out, what
