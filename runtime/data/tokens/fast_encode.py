"""The engine of tiktoken on a tokenizer's own merges, which gives the same ids several times faster.

tiktoken merges any two neighbours whose bytes together are a token, the token of the lowest rank first; `tokenizers`
merges the pairs of a list, the first in the list first. Both give the same ids where ids grow along that list and each
token, encoded by itself, is that token: then whatever two tokens join to a third are the pair of the list (the "proper"
dictionaries of Berglund and van der Merwe, "Formalizing BPE tokenization", 2023). That is checked here. Texts are split
into words by regular expressions of two engines, which agree for the one expression that is known here, GPT-2's, on
every code point (tests/runtime/data/test_data_tokenizer.py).
"""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import tokenizers

# GPT-2's words, with possessive repeats so that no long text makes the engine go back.
_WORDS: Final = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_PRE_TOKENIZER: Final = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# White space as long as this makes the engine's stack overflow.
_LONGEST_TEXT: Final = 1 << 20


class FastEncoder:
    """Encodes plain texts as `tokenizers` does.

    Args:
        inner: a tokenizer for which `why_not` returns "".
        threads: how many encode a batch; None for as many as there are cores.
    """

    def __init__(self, inner: "tokenizers.Tokenizer", threads: int | None = None) -> None:
        import tiktoken

        definition = json.loads(inner.to_str())
        vocabulary: dict[str, int] = definition["model"]["vocab"]
        added = {token["content"] for token in definition["added_tokens"]}
        letters = _bytes_of_letters()
        ranks = {
            bytes(letters[letter] for letter in token): number
            for token, number in vocabulary.items()
            if token not in added
        }
        self._inner = inner
        self._encoding: tiktoken.Encoding = tiktoken.Encoding(
            "trimaran", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={}
        )
        self._threads = threads or len(os.sched_getaffinity(0))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, in order."""
        short = [text for text in texts if len(text) <= _LONGEST_TEXT]
        ids = iter(self._encoding.encode_ordinary_batch(short, num_threads=self._threads))
        return [next(ids) if len(text) <= _LONGEST_TEXT else self._encode_long(text) for text in texts]

    def _encode_long(self, text: str) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids


def why_not(inner: "tokenizers.Tokenizer") -> str:
    """Return why a tokenizer's ids could differ, or "" where `FastEncoder` gives the same."""
    if find_spec("tiktoken") is None:
        return "tiktoken is not installed (pip install 'trimaran[data]')"
    definition = json.loads(inner.to_str())
    model: dict[str, Any] = definition["model"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    if definition["normalizer"] is not None:
        return "it normalizes texts"
    splits = definition["pre_tokenizer"] or {}
    if any(splits.get(name) != value for name, value in _PRE_TOKENIZER.items()):
        return "it splits texts otherwise than GPT-2"
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    named = [name for name in options if model.get(name)]
    if named:
        return f"it has {named[0]}"
    plain = [token["content"] for token in definition["added_tokens"] if not token["special"]]
    if plain:
        return f"it has the added token {plain[0]!r}"
    return _why_merges_differ(inner, definition)


def _why_merges_differ(inner: "tokenizers.Tokenizer", definition: dict[str, Any]) -> str:
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    added = {token["content"] for token in definition["added_tokens"]}
    letters = _bytes_of_letters()
    if not letters.keys() <= vocabulary.keys():
        return "it lacks tokens of single bytes"
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in definition["model"]["merges"]]
    made = [vocabulary["".join(pair)] for pair in pairs]
    if any(later <= earlier for earlier, later in pairwise(made)):
        return "its ids do not grow in the order of its merges"
    for token, number in vocabulary.items():
        if token in added:
            continue
        if not letters.keys() >= set(token) or [each.id for each in inner.model.tokenize(token)] != [number]:
            return f"its token {token!r} is not encoded as itself"
    return ""


def _bytes_of_letters() -> dict[str, int]:
    """Return GPT-2's letter of each byte -> the byte: a printable one is its own, the others begin at U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
