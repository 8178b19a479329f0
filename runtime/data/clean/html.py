"""The step `html`: from a page as it was fetched to the text that it shows, by resiliparse."""

import re
from typing import Final, Literal

from trimaran.runtime.data.clean.charset import codec_of, decode_page
from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.extras import require_extra

_MOST_DEPTH: Final = 512
"""Tags within tags; browsers show no deeper ones in their place (Blink's kMaximumHTMLParserDOMTreeDepth).

The search for the main content takes time by the square of the depth: minutes for 100,000.
"""
_DEEP: Final = ">".join(["*"] * (_MOST_DEPTH + 1))
_TAGS = (
    "a|article|aside|b|base|blockquote|body|br|button|center|code|dl|div|em|font|footer|form|frameset|h[1-6]|head"
    "|header|hr|html|i|iframe|img|input|label|li|link|main|meta|nav|noscript|ol|p|pre|script|section|span|strong|style"
    "|table|td|title|tr|u|ul"
)
_BEGINS_HTML: Final = re.compile(
    rf"(?>\s|<!--(?>.*?-->)|<\?(?>.*?>))*+<(?:!doctype html|(?:{_TAGS})[\s/>])", re.IGNORECASE | re.DOTALL
)
_HAS_HTML: Final = re.compile(r"<(?:!doctype html|html|head|body)[\s>]", re.IGNORECASE)
_LOOKED_AT: Final = 1 << 16
_NO_TEXT: Final = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]")
_MOST_NO_TEXT: Final = 0.05
"""Share of the characters at the start; of random bytes it is 0.1 in any encoding."""
_SIGNATURE: Final = re.compile(r"(?!text/|application/(?:xml|xhtml|json|javascript|octet-stream))")


class HtmlToText:
    """Turns `raw` into `text`; documents that are text already pass.

    Args:
        content: `main` for the main content of a page, `all` for all that it shows.
    """

    name = "html"

    def __init__(self, content: Literal["main", "all"]) -> None:
        self._main = content == "main"
        self._loaded = False

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Change `document` in place and return None, or return why it is removed."""
        raw = document.raw
        if not raw:
            return None
        if not self._loaded:
            require_extra("resiliparse")
            self._loaded = True
        from resiliparse.parse.encoding import detect_mime

        if _SIGNATURE.match(mime := detect_mime(raw)):
            return Removal("html.binary", mime)
        page, encoding, replaced = decode_page(raw, document.charset)
        start = page[:4096]
        if len(_NO_TEXT.findall(start)) > _MOST_NO_TEXT * len(start):
            return Removal("html.binary", f"{len(_NO_TEXT.findall(start))} of {len(start)} characters are no text")
        if not _is_html(page):
            return Removal("html.not_html", start.lstrip()[:80])
        text = self._extract(page)
        if isinstance(text, Removal):
            return text
        if not text or text.isspace():
            return Removal("html.no_text", f"{len(raw):,} bytes of HTML")
        counts["html.documents"] += 1
        counts["html.bytes"] += len(raw)
        counts["html.characters"] += len(text)
        if replaced:
            counts["html.not_readable"] += replaced
        if document.charset and codec_of(document.charset) not in ("", encoding) and not page.isascii():
            counts["html.wrong_charset"] += 1
        document.text, document.raw = text, b""
        return None

    def _extract(self, page: str) -> str | Removal:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree

        try:
            tree = HTMLTree.parse(page)
            if page.count("<") > _MOST_DEPTH and tree.document and tree.document.query_selector(_DEEP) is not None:
                return Removal("html.too_deep", f"over {_MOST_DEPTH} tags within tags")
            return extract_plain_text(tree, main_content=self._main, alt_texts=not self._main)
        except BaseException as error:
            # Rust's panics are no Exception. One page must not end the work on millions.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                return Removal("html.failed", f"{type(error).__name__}: {error}"[:200])
            raise


def _is_html(page: str) -> bool:
    """Whether a page begins as HTML does, or has its frame further down, as after a server's warning; not in JSON."""
    if _BEGINS_HTML.match(page):
        return True
    return not page[:100].lstrip().startswith(("{", "[")) and _HAS_HTML.search(page, 0, _LOOKED_AT) is not None
