"""The step `repair_encoding`: text that was decoded as another encoding than its own is restored, mostly by ftfy."""

import re
from collections import Counter
from typing import Final

from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.extras import require_extra

# "SONUÇ¹" is a Turkish word with a footnote, and at once the Windows-1254 reading of the UTF-8 bytes of ǹ. After a
# Latin letter it is the former: what these letters begin in UTF-8 is Syriac, Thaana, Armenian, Cyrillic and rare Latin.
_FOOTNOTE: Final = re.compile("(?<=[A-Za-zÇĞİŞÜÖÂÎÛçğışüöâîû])([ÇĞİŞÜÖ])([¹²³°½¼¾†‡‰®ªº§¶±µ¤¦¨¬¯¸])")
# Is ASCII, so that it can be encoded in every encoding that ftfy tries.
_APART: Final = "\x02"
_ICELANDIC: Final = re.compile("[ÐÝÞðýþ]")
_TURKISH_LETTER: Final = re.compile("[ĞİŞğış]")
_FROM_ICELANDIC: Final = str.maketrans("ÐÝÞðýþ", "ĞİŞğış")
_WORD: Final = re.compile(r"\w+")
_TURKISH_WORDS: Final = frozenset(["ve", "bir", "bu", "için", "ile", "olarak", "çok", "gibi", "olan", "sonra", "veya"])
_LEAST_TURKISH: Final = 0.03
"""Of the words of Turkish text it is a twelfth; Czech has ý, and of these words `ve` alone."""


class RepairEncoding:
    """Restores text that was decoded as the wrong encoding, once or several times: `sÃ¼re`, `It\\x92s`, `Ýstanbul`.

    The whole document is looked at, not each line: a line is too short to tell Windows-1252 from Latin-1.
    """

    name = "repair_encoding"

    def __init__(self) -> None:
        require_extra("ftfy")
        self._suspicious = _gate()

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Change `document` in place and return None."""
        text = document.text
        if text.isascii():
            return None
        repaired = _turkish(_repair(text) if self._suspicious.search(text) else text)
        if repaired != text:
            counts["repair_encoding.documents"] += 1
            counts["repair_encoding.characters"] += (Counter(text) - Counter(repaired)).total()
            document.text = repaired
        return None


def _repair(text: str) -> str:
    from ftfy import fix_encoding

    if _APART in text or not _FOOTNOTE.search(text):
        return fix_encoding(text)
    repaired = fix_encoding(_FOOTNOTE.sub(rf"\1{_APART}\2", text)).replace(_APART, "")
    return repaired if repaired == text else _repair(repaired)


def _turkish(text: str) -> str:
    """Return the text with `þöför aðaç` made `şöför ağaç` where it is Turkish that was read as Latin-1.

    Latin-1 has six letters of Icelandic in the place of Turkish ones, and many servers say Latin-1. The text is Turkish
    if it has Turkish words and none of the six letters that it should have.
    """
    if not _ICELANDIC.search(text) or _TURKISH_LETTER.search(text):
        return text
    words = _WORD.findall(text)
    known = [word for word in words if word in _TURKISH_WORDS]
    is_turkish = len(set(known)) > 1 and len(known) >= _LEAST_TURKISH * len(words)
    return text.translate(_FROM_ICELANDIC) if is_turkish else text


def _gate() -> re.Pattern[str]:
    """Return a pattern that is found in all text in which ftfy finds damage, in a twentieth of the time.

    Ftfy's own pattern has alternatives that begin with a space or an ASCII letter, so it tries each at every character.
    This one leaves those beginnings out, and joins what then differs little.
    """
    from ftfy.badness import MOJIBAKE_CATEGORIES as SETS

    single = SETS["c1"] + SETS["bad"] + SETS["box"]
    before_any = "ÂÃàÎÐØÙ√≈‚×"
    upper, lower, end, start = (
        SETS[name] for name in ("upper_accented", "lower_accented", "end_punctuation", "start_punctuation")
    )
    symbols = SETS["currency"] + SETS["numeric"]
    pairs = (
        (lower + SETS["lower_common"] + end + symbols, upper),
        (end + symbols, lower + start),
        (lower + end, SETS["currency"]),
        (upper, symbols + SETS["law"] + start + "°"),
        (start, SETS["numeric"]),
        (end, start),
        (lower + upper, start + end),
        ("ВГРСвΒΓΞΟβā", SETS["currency"] + start + end + "°µЂў\xa0"),
    )
    # Sets that exclude most characters stand first, because they are quick.
    begin = "".join([single, before_any, "Œœ", *(first for first, _ in pairs)])
    go_on = "".join(second for _, second in pairs)
    later = "|".join(f"(?<=[{first}])[{second}]" for first, second in pairs)
    first = f"(?<=[{single}])|(?<=[Œœ])[^A-Za-z]|(?<=[ÂÃ]) |(?<=[{before_any}])[^\\x00-\\x7f]"
    return re.compile(f"[{begin}](?:{first}|(?=[{go_on}])(?:{later}))")
