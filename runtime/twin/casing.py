"""Lower and upper case as the language of a text has them: Turkish and Azeri have a dotless and a dotted i."""

import unicodedata
from types import MappingProxyType
from typing import Final

DOTTED: Final = frozenset({"tr", "az"})
"""Languages in which I is the capital of ı, and İ that of i (Unicode, SpecialCasing.txt)."""
_LOWER: Final = MappingProxyType({ord("I"): "ı", ord("İ"): "i"})
_UPPER: Final = MappingProxyType({ord("i"): "İ", ord("ı"): "I"})


def lower(text: str, language: str) -> str:
    """Return a text in lower case and form NFC; in other languages than Turkish and Azeri, İ becomes i too.

    Args:
        language: ISO 639-1 code.
    """
    text = unicodedata.normalize("NFC", text)
    if language in DOTTED:
        return text.translate(_LOWER).lower()
    return text.lower().replace("i̇", "i")


def upper(text: str, language: str) -> str:
    """Return a text in upper case and form NFC.

    Args:
        language: ISO 639-1 code.
    """
    text = unicodedata.normalize("NFC", text)
    return (text.translate(_UPPER) if language in DOTTED else text).upper()
