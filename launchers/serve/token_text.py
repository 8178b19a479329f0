"""The bytes of single tokens, which one token's text alone does not tell: a character may take several tokens."""

import json
import re
from collections.abc import Iterable
from functools import cached_property

from trimaran.runtime.data.tokens.tokenizer import Tokenizer

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class TokenText:
    """Token ids as bytes.

    Args:
        tokenizer: a byte-level one, one with byte tokens such as <0xE2>, or any other, whose tokens are then whole
            characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token stands for; of a special token those of its name."""
        name = self._names.get(token)
        if name is None:
            return self._tokenizer.decode([token]).encode("utf-8", "replace")
        if self._letters:
            return bytes(self._letters[each] for each in name)
        found = _BYTE.fullmatch(name)
        return bytes([int(found[1], 16)]) if found else name.replace(_SPACE, " ").encode("utf-8", "replace")

    def name_of(self, token: int) -> str:
        """Return a token as OpenAI's completions name it: its text, or `bytes:\\xe2\\x80` where it has half of one."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{each:02x}" for each in raw)

    def is_spelled(self, token: int) -> bool:
        """Return whether a token stands for a part of a text, and is no token with a meaning of its own."""
        return not self._names or token in self._names

    @property
    def _names(self) -> dict[int, str]:
        """The tokens that are spelled in the letters of the vocabulary, without added ones."""
        return self._tables[0]

    @property
    def _letters(self) -> dict[str, int]:
        """The letters that stand for bytes in byte-level vocabularies; {} for others."""
        return self._tables[1]

    @cached_property
    def _tables(self) -> tuple[dict[int, str], dict[str, int]]:
        definition = json.loads(self._tokenizer.definition)
        model = definition["model"]
        letters = _byte_letters() if "ByteLevel" in json.dumps(definition.get("decoder")) else {}
        if not letters and model.get("type") not in ("BPE", "Unigram"):
            return {}, {}  # their tokens are joined by rules of their own, which `decode` knows
        vocabulary = model.get("vocab", {})
        pairs: Iterable[tuple[str, int]] = (
            vocabulary.items() if isinstance(vocabulary, dict) else ((row[0], i) for i, row in enumerate(vocabulary))
        )
        added = self._tokenizer.added_tokens().keys()
        names = {
            token: name
            for name, token in pairs
            if name not in added and (not letters or all(each in letters for each in name))
        }
        return names, letters


def _byte_letters() -> dict[str, int]:
    """Return the letters of byte-level vocabularies and their bytes (Radford et al. 2019, their encoder.py)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [each for each in range(256) if each not in plain]
    return {chr(each): each for each in plain} | {chr(256 + number): each for number, each in enumerate(others)}
