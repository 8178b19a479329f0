"""From the bytes of a text file to characters, with the data engine's steps for encodings, mojibake and Unicode."""

from collections import Counter
from typing import Final

from trimaran.runtime.data.clean.charset import decode_page
from trimaran.runtime.data.clean.encoding import RepairEncoding
from trimaran.runtime.data.clean.unicode import Unicode
from trimaran.runtime.data.document import Document
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.twin.texts.work import Tally, UnreadableError

_MOST_REPLACED: Final = 0.01
"""Share of characters that no encoding could read; of a text in the wrong one it is that of its accented letters."""
_MOST_CONTROLS: Final = 0.01
_CONTROLS: Final = "\0\x01\x02\x03\x04\x05\x06\x07\x0e\x0f\x10\x11\x12"


def decode_text(raw: bytes, tally: Tally) -> str:
    """Return the clean text of a file's bytes.

    Raises:
        UnreadableError: they are no text, or in an encoding that can't be told.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        require_extra("resiliparse")
        text, encoding, replaced = decode_page(raw, "")
        if _is_binary(text):
            raise UnreadableError("file.binary", "it is no text") from None
        if replaced > _MOST_REPLACED * len(text):
            what = f"{replaced:,} of {len(text):,} characters can't be read as UTF-8 or {encoding}"
            raise UnreadableError(
                "file.wrong_encoding", f"{what}, first at byte {error.start:,}; save it as UTF-8"
            ) from None
        tally.note(f"encoding.read_as_{encoding}")
    if _is_binary(text):
        raise UnreadableError("file.binary", "it is no text: it has control characters")
    return clean_text(text, tally)


def clean_text(text: str, tally: Tally) -> str:
    """Return a text whose mojibake is restored, in form NFC and with newlines at the ends of lines."""
    document, counts = Document("", text), Counter[str]()
    RepairEncoding()(document, counts)
    Unicode()(document, counts)
    for reason in ("repair_encoding.characters", "unicode.controls", "unicode.invisible", "unicode.surrogates"):
        tally.note(reason, times=counts[reason])
    return document.text.replace("\t", " ").replace("\xa0", " ")


def _is_binary(text: str) -> bool:
    sample = text[:65536]
    return sum(map(sample.count, _CONTROLS)) > _MOST_CONTROLS * len(sample)
