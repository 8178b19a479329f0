"""Hits of a lexicon of the document's language, for each 1,000 words.

A word list knows no context: it finds slurs in texts by those whom they are meant for, medical texts, and surnames. So
one word never removes a document, and the report tells what share of each language goes.
"""

import unicodedata
from collections.abc import Iterator
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.files import DataError, unreadable
from trimaran.runtime.data.filters.words import Hashes, Words, words_of
from trimaran.runtime.files import read_json, read_text
from trimaran.runtime.spec.sections.recipe.filter import ToxicitySettings

# The dictionaries of glin-profanity 4.
BUNDLED: Final = MappingProxyType(
    {
        "ar": "arabic",
        "cs": "czech",
        "da": "danish",
        "de": "german",
        "en": "english",
        "eo": "esperanto",
        "es": "spanish",
        "fa": "persian",
        "fi": "finnish",
        "fr": "french",
        "hi": "hindi",
        "hu": "hungarian",
        "it": "italian",
        "ja": "japanese",
        "ko": "korean",
        "nl": "dutch",
        "no": "norwegian",
        "pl": "polish",
        "pt": "portuguese",
        "ru": "russian",
        "sv": "swedish",
        "th": "thai",
        "tr": "turkish",
        "zh": "chinese",
    }
)
_MOST_NAMED: Final = 5


class ToxicityFilter:
    """Removes documents with many words of a lexicon of their language; leaves the rate in the document's fields."""

    name = "toxicity"

    def __init__(self, settings: ToxicitySettings) -> None:
        """Raises DataError for a file that can't be read, or where glin-profanity is missing."""
        self._settings = settings
        entries: dict[str | None, list[str]] = {}
        if settings.bundled:
            require_extra("glin_profanity")
            entries |= {language: _bundled(name) for language, name in BUNDLED.items()}
        for lexicon in settings.lexicons:
            entries.setdefault(lexicon.language, []).extend(_own(Path(lexicon.file)))
        for_all = entries.pop(None, [])
        self._lexicons = {
            language: _Lexicon([*words, *for_all], language) for language, words in entries.items() if language
        }
        self._for_others = _Lexicon(for_all, "") if for_all else None

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Count the hits."""
        lexicon = self._lexicons.get(document.language, self._for_others)
        if lexicon is None:
            counts["toxicity.without_lexicon"] += 1
            return None
        words = words_of(_folded(document.text, document.language))
        hits = list(lexicon.hits(words))
        rate = 1000 * len(hits) / (words.count or 1)
        document.fields["toxicity_per_1000_words"] = rate
        limits = self._settings
        if len(hits) < limits.min_hits or rate <= limits.max_hits_per_1000_words:
            return None
        named = ", ".join(dict.fromkeys(words.passage(first, count) for first, count in hits[: 4 * _MOST_NAMED]))
        detail = f"{len(hits)} hits, {rate:.3g} per 1,000 words, above {limits.max_hits_per_1000_words:g}"
        return Removal("toxicity.hits", f"{detail}: {named}")


class _Lexicon:
    """The entries of a language, as sequences of hashes of words."""

    def __init__(self, entries: list[str], language: str) -> None:
        self._entries, self._language = entries, language

    @cached_property
    def _index(self) -> tuple[Hashes, dict[int, list[tuple[int, ...]]]]:
        """Return the first words, and for each the entries that begin with it, the longest first; made when needed."""
        entries = [_folded(" ".join(entry.split()), self._language) for entry in self._entries]
        # A character of a script without spaces is part of any word, and a number is any number.
        entries = [entry for entry in entries if len(entry) > 1 and any(map(str.isalpha, entry))]
        words = Words("\n".join(entries))
        ends = np.cumsum([len(entry) + 1 for entry in entries])
        hashes, bounds = words.hashes.tolist(), [0, *np.searchsorted(words.starts, ends).tolist()]
        found: dict[int, set[tuple[int, ...]]] = {}
        for start, stop in pairwise(bounds):
            found.setdefault(hashes[start], set()).add(tuple(hashes[start:stop]))
        longest_first = {first: sorted(each, key=len, reverse=True) for first, each in found.items()}
        return np.array(sorted(found), np.uint64), longest_first

    def hits(self, words: Words) -> Iterator[tuple[int, int]]:
        """Yield the first word and the number of words of every place where an entry stands, the longest that fits."""
        firsts, by_first = self._index
        if not len(firsts):
            return
        near = firsts.take(np.searchsorted(firsts, words.hashes), mode="clip")
        free = 0
        for place in np.flatnonzero(near == words.hashes).tolist():
            if place < free:
                continue
            for entry in by_first[int(words.hashes[place])]:
                if tuple(words.hashes[place : place + len(entry)].tolist()) == entry:
                    yield place, len(entry)
                    free = place + len(entry)
                    break


def _folded(text: str, language: str) -> str:
    """Return a text in small letters; Turkish and Azerbaijani have a dotted and a dotless i."""
    if language in ("tr", "az"):
        text = text.replace("I", "ı").replace("İ", "i")
    return unicodedata.normalize("NFC", text.casefold())


def _bundled(name: str) -> list[str]:
    """Return a dictionary of glin-profanity, which is not imported: its own code would load them all."""
    spec = find_spec("glin_profanity")
    folder = Path(next(iter((spec and spec.submodule_search_locations) or [""])))
    path = folder / "data" / "dictionaries" / f"{name}.json"
    try:
        content = read_json(path)
        return [word for word in content["words"] if isinstance(word, str)]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{path} can't be read; install glin-profanity 4 again, or set toxicity.bundled to false"
        ) from None


def _own(path: Path) -> list[str]:
    """Return the words of a user's file, one a line."""
    try:
        lines = read_text(path).removeprefix("\ufeff").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; filter.toxicity.lexicons takes text files with a word a line") from None
    except OSError as error:
        raise unreadable(path, error, "take it out of data.filter.toxicity") from error
    return [line.partition("#")[0].strip() for line in lines]
