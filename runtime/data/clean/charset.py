"""From the bytes of a page to characters: by mark, as UTF-8, as header or page say, or by detection."""

import codecs
import re
from types import MappingProxyType
from typing import Final, NamedTuple

from trimaran.runtime.data.corpus import decode_utf8

_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    # UTF-32's little-endian mark begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_IN_PAGE: Final = re.compile(
    rb"<(?:meta|\?xml)\b[^>]{0,400}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE
)
# WHATWG has 1,024 bytes; pages with long scripts before it are common.
_HEAD_BYTES: Final = 4096
# What pages call by the first name is, more often than not, the larger set that Windows makes of it.
_WIDER: Final = MappingProxyType(
    {"gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs", "iso8859-11": "cp874"}
)
_SEVEN_BITS: Final = "iso2022_jp"


class Decoded(NamedTuple):
    """The text of a page, the encoding that it has, and how many of its characters could not be read (U+FFFD)."""

    text: str
    encoding: str
    replaced: int


def decode_page(raw: bytes, charset: str) -> Decoded:
    """Return the text of a page.

    Servers name a charset that the page does not have, often Latin-1 for UTF-8. Bytes that are UTF-8 beyond ASCII are
    nothing else, so they are read as UTF-8 whatever is said of them. Otherwise the header's charset goes before the
    page's own, and that before what the bytes look like; one that can read more of the page goes first.

    Args:
        charset: label in the server's header, "" for none.
    """
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return _decode(raw[len(mark) :], name)
    names = [name for name in map(codec_of, (charset, _label_in_page(raw))) if name]
    if wide := _wide(raw[:_HEAD_BYTES]):
        return _decode(raw, wide)
    if _SEVEN_BITS not in names or b"\x1b" not in raw:
        text, replaced = decode_utf8(raw)
        beyond_ascii = len(raw) - len(text)
        # Text in another encoding has a sequence of UTF-8 here and there by chance; that of a page that says UTF-8,
        # and was cut or damaged, has more of them than of bytes that fit nowhere.
        if replaced <= beyond_ascii * (1 if "utf-8" in names else 0.1):
            return Decoded(text, "utf-8", text.count("\ufffd") if replaced else 0)
    from resiliparse.parse.encoding import detect_encoding

    names.append(codec_of(detect_encoding(raw) or "") or "cp1252")
    readings = [_decode(raw, name) for name in dict.fromkeys(names)]
    return min(readings, key=lambda reading: reading.replaced)


def codec_of(label: str) -> str:
    """Return Python's codec for a label as pages and servers write it, "" for one that is unknown."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    name = map_encoding_to_html5(label.strip(" \t\"'"), fallback_utf8=False) or ""
    return _WIDER.get(name, name)


def _label_in_page(raw: bytes) -> str:
    found = _IN_PAGE.search(raw, 0, _HEAD_BYTES)
    label = found[1].decode("ascii", "replace") if found else ""
    # Who can read the label reads ASCII, so it is not UTF-16 (WHATWG, HTML, 13.2.3.2).
    return "utf-8" if label.lower().startswith("utf-16") else label


def _wide(head: bytes) -> str:
    """Return UTF-16's codec where every other byte of the tags is NUL."""
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if 2 * head[first::2].count(0) > len(head[first::2]) and not head[1 - first :: 2].count(0):
            return name
    return ""


def _decode(raw: bytes, name: str) -> Decoded:
    text = raw.decode(name, "replace")
    return Decoded(text, name, text.count("\ufffd"))
