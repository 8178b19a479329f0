"""From a text to the terms of the index: words in lower case as their language has it, without stop words, stemmed."""

import re
from collections.abc import Iterable
from types import MappingProxyType
from typing import Final

from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.twin.casing import DOTTED, lower

_STEMMERS: Final = MappingProxyType(
    {
        "ar": "arabic", "ca": "catalan", "cs": "czech", "da": "danish", "de": "german", "el": "greek", "en": "english",
        "es": "spanish", "et": "estonian", "eu": "basque", "fa": "persian", "fi": "finnish", "fr": "french",
        "ga": "irish", "hi": "hindi", "hu": "hungarian", "hy": "armenian", "id": "indonesian", "it": "italian",
        "lt": "lithuanian", "ne": "nepali", "nl": "dutch", "no": "norwegian", "pl": "polish", "pt": "portuguese",
        "ro": "romanian", "ru": "russian", "sr": "serbian", "sv": "swedish", "ta": "tamil", "tr": "turkish",
    }
)  # fmt: skip
_STOP_WORDS: Final = MappingProxyType(
    {
        "en": "EN_PLUS", "de": "GERMAN", "nl": "DUTCH", "fr": "FRENCH", "es": "SPANISH", "pt": "PORTUGUESE",
        "it": "ITALIAN", "ru": "RUSSIAN", "sv": "SWEDISH", "no": "NORWEGIAN", "tr": "TURKISH", "da": "DANISH",
    }
)  # fmt: skip
_ASKING: Final = MappingProxyType(
    {
        "en": ("about", "does", "did", "do", "how", "say", "says", "said", "tell", "think", "thinks", "what", "when",
               "where", "which", "who", "whom", "whose", "why", "can", "could", "would", "should", "explain",
               "describe"),
        "tr": ("ne", "neden", "nasıl", "niçin", "nerede", "kim", "hangi", "kaç", "mi", "mı", "mu", "mü", "hakkında",
               "anlat", "söyle", "der", "diyor", "düşünüyor", "nedir", "nelerdir", "midir", "açıkla"),
    }
)  # fmt: skip
"""Words of questions, which tell nothing of what is asked for."""
_GOING_ON: Final = MappingProxyType(
    {
        "en": "go continue please else really further elaborate more yes no okay ok thanks thank well sure indeed",
        "tr": "biraz devam et edin daha başka fazla peki sonra evet hayır lütfen tamam gerçekten",
        "de": "erzähle erzähl mehr weiter warum wieso bitte noch ja nein wirklich genauer fahre fort",
        "fr": "dis dites davantage pourquoi encore continue continuez oui non vraiment alors plus",
    }
)
"""Words of questions that go on with what was said: with them alone nothing is named."""
_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+(?:['’ʼ][^\W_]+)*")
_APOSTROPHE: Final = re.compile(r"['’ʼ]")
_ELIDING: Final = frozenset({"fr", "it", "ca"})
_MOST_KNOWN: Final = 200_000


class Terms:
    """Makes terms of texts of one language. Not for several threads at once.

    Args:
        language: ISO 639-1 code; one that Snowball has no stemmer for is not stemmed.
    """

    def __init__(self, language: str) -> None:
        """Raises DataError where bm25s or PyStemmer is missing."""
        require_extra("bm25s", "Stemmer", extra="twin")
        import Stemmer
        from bm25s import stopwords

        self.language = language
        name = _STEMMERS.get(language)
        self._stem = Stemmer.Stemmer(name).stemWord if name else None
        listed = getattr(stopwords, f"STOPWORDS_{_STOP_WORDS[language]}") if language in _STOP_WORDS else ()
        words = (*listed, *_ASKING.get(language, ()))
        self._stop = frozenset(part for word in words for part in self._plain(word))
        self._known: dict[str, str] = {}
        self._going_on = self.content(self.words(_GOING_ON.get(language, "")))

    def of(self, text: str) -> list[str]:
        """Return the terms of a text in their order, with repeats."""
        return [self._stemmed(word) for word in self.words(text) if word not in self._stop]

    def words(self, text: str) -> list[str]:
        """Return all words of a text in lower case, not stemmed, stop words too."""
        return [part for word in _WORD.findall(lower(text, self.language)) for part in self._plain(word)]

    def content(self, words: Iterable[str]) -> set[str]:
        """Return the terms of words from `words`."""
        return {self._stemmed(word) for word in words if word not in self._stop}

    def names_nothing(self, question: str) -> bool:
        """Return whether a question is no more than a wish to hear more: Tell me more. Why?"""
        return self._going_on.issuperset(self.of(question))

    def _plain(self, word: str) -> list[str]:
        """Return a word without its apostrophes: in Turkish what follows is a suffix, in French another word."""
        parts = _APOSTROPHE.split(word)
        if len(parts) == 1:
            return parts
        if self.language in DOTTED:
            return parts[:1]
        if self.language in _ELIDING:
            return parts
        return ["".join(parts[:-1] if parts[-1] == "s" else parts)]

    def _stemmed(self, word: str) -> str:
        if self._stem is None:
            return word
        if word not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[word] = str(self._stem(word))
        return self._known[word]
