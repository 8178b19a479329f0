"""The first words of a text, as a prompt that its model can go on from."""

import unicodedata
from typing import Final

from trimaran.runtime.data.prepare import PreparedData

MOST_CHARACTERS: Final = 40
_TOKENS: Final = 256
"""Enough for that many characters at a token for each byte of four."""
_CUT: Final = "\ufffd"
"""How a character that lost some of its bytes is decoded."""


def opening_of(data: PreparedData) -> str:
    """Return the first words of the held-out text, or of the other where none is held out; "" where it has none."""
    shards = data.held_out if data.held_out.num_tokens else data.train
    tokens = shards.read(0, min(_TOKENS, shards.num_tokens))
    return opening_words(data.tokenizer.decode([int(token) for token in tokens]))


def opening_words(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return the first words of a text's first line that has a letter or digit: at most `most` characters.

    It is cut between two words, and where there is no space (as in Chinese or Thai) before a character that stands by
    itself, so never between a letter and its accent.
    """
    lines = (line.strip().strip(_CUT).strip() for line in text.splitlines())
    line = next((line for line in lines if any(character.isalnum() for character in line)), "")
    if len(line) <= most:
        return line
    end = line.rfind(" ", 1, most + 1)
    if end < 0:
        end = most
        while end > 1 and _belongs_to_the_one_before(line[end - 1], line[end]):
            end -= 1
    return line[:end].rstrip()


def _belongs_to_the_one_before(left: str, right: str) -> bool:
    joiner = "\u200d"
    return unicodedata.category(right) in ("Mn", "Mc", "Me") or joiner in (left, right)
