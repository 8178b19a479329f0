"""How many tokens a tokenizer takes for a word and for a byte of each language: its fertility.

A tokenizer that was trained on other languages splits the words of one into many tokens, which then costs more and
reaches less far (Rust et al., "How good is your tokenizer?", ACL 2021, section 4).
"""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from trimaran.runtime.data.engine.parts import read_kept
from trimaran.runtime.data.filters.words import split_words
from trimaran.runtime.data.tokens.tokenizer import Tokenizer

_SAMPLE_BYTES: Final = 1 << 20
_MOST_READ: Final = 256 << 20
_UNKNOWN: Final = "unknown"


class Fertility(NamedTuple):
    """What a sample of a language took."""

    language: str
    documents: int
    num_bytes: int
    words: int
    tokens: int


def fertility(parts: Iterable[Path], tokenizer: Tokenizer) -> list[Fertility]:
    """Return the fertility of the languages in the first 256 MiB that are kept, each from its first megabyte."""
    texts: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    read = 0
    for document in chain.from_iterable(map(read_kept, parts)):
        language, size = document.language or _UNKNOWN, len(document.text.encode())
        if size and sizes.get(language, 0) < _SAMPLE_BYTES:
            texts.setdefault(language, []).append(document.text)
            sizes[language] = sizes.get(language, 0) + size
        read += size
        if read > _MOST_READ:
            break
    return [
        Fertility(
            language,
            len(of),
            sizes[language],
            sum(len(split_words(text)) for text in of),
            sum(map(len, tokenizer.encode_batch(of))),
        )
        for language, of in sorted(texts.items())
    ]
