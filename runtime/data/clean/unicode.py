"""The step `unicode`: one form for each character and line end, and nothing that has no look."""

import re
from collections import Counter
from typing import Final
from unicodedata import is_normalized, normalize

from trimaran.runtime.data.document import Counts, Document, Removal

_LINE_END: Final = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_CONTROL: Final = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff]")
# Soft hyphens, zero-width spaces, word joiners and byte order marks. Joiners (U+200C, U+200D) shape Persian, Indic
# scripts and emoji, and marks of direction order Hebrew and Arabic, so they stay; as does the zero-width space where
# words are not parted by a visible one: in Thai, Lao, Burmese and Khmer.
_UNSPACED: Final = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
_INVISIBLE: Final = re.compile(f"[\xad\u2060\u206a-\u206f\ufeff]|\u200b(?!{_UNSPACED})")
_ANY: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2028\u2029\u2060\u206a-\u206f\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff9-\ufffb"
    "\ufffe\uffff]"
)


class Unicode:
    """Puts text into Unicode's form NFC, with \\n at the ends of lines, without control and invisible characters.

    Two halves of a surrogate pair become their character; one alone becomes U+FFFD.
    """

    name = "unicode"

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Change `document` in place and return None."""
        text = document.text
        if _ANY.search(text):
            text = _without(text, counts)
        if not is_normalized("NFC", text):
            normal = normalize("NFC", text)
            counts["unicode.not_nfc"] += (Counter(text) - Counter(normal)).total()
            text = normal
        if text is not document.text:
            counts["unicode.documents"] += 1
            document.text = text
        return None


def _without(text: str, counts: Counts) -> str:
    """Return a text whose lines end in \\n, without what has no look, and count each kind by characters."""
    if alone := len(_SURROGATE.findall(text)):
        joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        counts["unicode.surrogates"] += alone
        text = joined
    for kind, pattern, instead in (
        ("line_ends", _LINE_END, "\n"),
        ("controls", _CONTROL, ""),
        ("invisible", _INVISIBLE, ""),
    ):
        text, number = pattern.subn(instead, text)
        if number:
            counts[f"unicode.{kind}"] += number
    return text
