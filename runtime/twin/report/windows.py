"""Texts as pieces of one length, for what is measured of a text depends on how long it is."""

from collections.abc import Iterator


def windows(text: str, characters: int) -> Iterator[str]:
    """Yield consecutive pieces of about `characters` characters that end between words; a short rest is left out.

    White space becomes single blanks: how a source breaks its lines is not the author's.

    Args:
        characters: of a piece, at least; the last word is whole.
    """
    piece: list[str] = []
    length = 0
    for word in text.split():
        piece.append(word)
        length += len(word) + 1
        if length > characters:
            yield " ".join(piece)
            piece, length = [], 0
