"""HTML to blocks, by the data engine's resiliparse: headings with their level and what a page shows, no script."""

import re
from typing import TYPE_CHECKING, Final, Literal

from trimaran.runtime.data.clean.charset import decode_page
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.twin.texts.decode import clean_text
from trimaran.runtime.twin.texts.work import Block, Source, Tally, UnreadableError

if TYPE_CHECKING:
    from resiliparse.parse.html import ElementNode, HTMLTree

_MOST_DEPTH: Final = 512
_DEEP: Final = ">".join(["*"] * (_MOST_DEPTH + 1))
_MARK: Final = "\ue000"
"""Of the private use area: before a heading's text, with its level behind it."""
_HEADING: Final = re.compile(rf"{_MARK}([1-6])")
_BLANK: Final = re.compile(r"\n(?:[ \t]*\n)+")


def read_html(raw: bytes, tally: Tally, content: Literal["main", "all"]) -> Source:
    """Return the blocks of a page, and what its head says.

    Args:
        content: `main` leaves out menus, headers and footers, and counts their characters; `all` is for books.

    Raises:
        UnreadableError: it can't be parsed or read.
        DataError: resiliparse is missing.
    """
    require_extra("resiliparse")
    from resiliparse.parse.html import HTMLTree

    page, _, replaced = decode_page(raw, "")
    tally.note("html.not_readable", times=replaced)
    try:
        tree = HTMLTree.parse(page.replace(_MARK, ""))
        if tree.document is None or tree.body is None:
            raise UnreadableError("html.unreadable", "it has no body")
        if page.count("<") > _MOST_DEPTH and tree.document.query_selector(_DEEP) is not None:
            raise UnreadableError("html.unreadable", f"it has over {_MOST_DEPTH} tags within tags")
        return _read(tree, tree.body, tally, content)
    except BaseException as error:
        # Rust's panics are no Exception; one page must not end the reading of others.
        if isinstance(error, UnreadableError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        raise UnreadableError("html.unreadable", f"{type(error).__name__}: {error}"[:200]) from None


def _read(tree: "HTMLTree", body: "ElementNode", tally: Tally, content: Literal["main", "all"]) -> Source:
    from resiliparse.extract.html2text import extract_plain_text

    for selector in (
        "sup a[href^='#']",
        "a.noteref",
        "[role=doc-noteref]",
        ".pagenum",
        ".pageno",
        "[role=doc-pagebreak]",
    ):
        for element in body.query_selector_all(selector):
            tally.note("html.page_or_note_mark", element.text or "")
            element.decompose()
    for level in range(1, 7):
        for element in body.query_selector_all(f"h{level}"):
            mark = tree.create_text_node(f"{_MARK}{level}")
            if mark is not None and element.first_child is not None:
                element.insert_before(mark, element.first_child)
    whole: str = extract_plain_text(tree, main_content=False, alt_texts=False, list_bullets=False)
    text = whole
    if content == "main":
        text = extract_plain_text(tree, main_content=True, alt_texts=False, list_bullets=False)
        tally.note("html.not_main_content", max(0, len(whole) - len(text)), times=int(len(text) < len(whole)))
    author = tree.head.query_selector("meta[name=author]") if tree.head is not None else None
    return Source(
        _blocks(clean_text(text, tally)),
        " ".join((tree.title or "").split()),
        (author.getattr("content") or "") if author else "",
    )


def _blocks(text: str) -> list[Block]:
    blocks = []
    for paragraph in _BLANK.split(text):
        lines = [" ".join(line.split()) for line in paragraph.split("\n") if line.strip()]
        plain = list[str]()
        for line in lines:
            if heading := _HEADING.search(line):
                if plain:
                    blocks.append(Block("\n".join(plain)))
                    plain = []
                if title := _HEADING.sub("", line).strip():
                    blocks.append(Block(title, int(heading[1])))
            else:
                plain.append(line)
        if plain:
            blocks.append(Block("\n".join(plain)))
    return blocks
