"""Books made for tests: plain texts of any size, EPUBs and PDFs with the least that makes them such."""

import io
import random
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

SUBJECTS = ("the captain", "my sister", "an old clerk", "the widow", "our neighbour", "the miller", "a young doctor")
VERBS = ("carried", "remembered", "painted", "counted", "forgot", "measured", "described", "mended", "watched", "sold")
SYLLABLES = ("bar", "len", "tor", "min", "gal", "ves", "rud", "cor", "hap", "sil", "fen", "dow")


def prose(seed: int, paragraphs: int, sentences: int = 8) -> list[str]:
    """Return paragraphs of made-up sentences, most of which no other seed has."""
    draw = random.Random(seed)

    def noun() -> str:
        return "".join(draw.choices(SYLLABLES, k=3))

    return [
        " ".join(
            f"{draw.choice(SUBJECTS).capitalize()} {draw.choice(VERBS)} the {noun()} of {noun()} and {noun()},"
            f" a {noun()} and {draw.randint(2, 99)} {noun()}s behind {noun()}."
            for _ in range(sentences)
        )
        for _ in range(paragraphs)
    ]


def novel(seed: int, chapters: int = 5, paragraphs: int = 6) -> str:
    """Return a novel as plain text, with CHAPTER I and so on."""
    numbers = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X")
    parts = [
        "\n\n".join([f"CHAPTER {numbers[place]}", *prose(100 * seed + place, paragraphs)]) for place in range(chapters)
    ]
    return "\n\n".join(parts) + "\n"


def write_epub(path: Path, title: str, author: str, pages: Sequence[str]) -> None:
    """Write a book of XHTML bodies, in their order."""
    from ebooklib import epub

    book = epub.EpubBook()
    book.set_identifier(title)
    book.set_title(title)
    book.set_language("en")
    book.add_author(author)
    items = []
    for number, body in enumerate(pages):
        item = epub.EpubHtml(title=f"Page {number}", file_name=f"page{number}.xhtml", lang="en")
        item.content = f"<html><body>{body}</body></html>"
        book.add_item(item)
        items.append(item)
    book.toc = tuple(epub.Link(item.file_name, item.title, item.file_name) for item in items)
    book.add_item(epub.EpubNcx())
    book.add_item(epub.EpubNav())
    book.spine = ["nav", *items]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        epub.write_epub(str(path), book)


def pages_of(text: str) -> list[str]:
    """Return the chapters of `novel` as bodies of XHTML."""
    pages = []
    for chapter in text.strip().split("CHAPTER ")[1:]:
        heading, *paragraphs = chapter.strip().split("\n\n")
        pages.append(f"<h2>CHAPTER {heading}</h2>" + "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs))
    return pages


def write_pdf(path: Path, pages: Sequence[Sequence[str]], information: Mapping[str, str] | None = None) -> None:
    """Write a PDF of lines of ASCII; a page without lines has no text, as a scanned one."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for lines in pages:
        shown = b"".join(
            b"(%s) Tj T*\n" % line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)").encode("ascii")
            for line in lines
        )
        stream = zlib.compress(b"BT /F1 10 Tf 12 TL 40 800 Td\n" + shown + b"ET" if lines else b"0 0 100 100 re f")
        objects.append(b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(stream), stream))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 842] /Contents %d 0 R"
            b" /Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    objects.append(
        b"<< %s >>" % b" ".join(b"/%s (%s)" % (k.encode(), v.encode()) for k, v in (information or {}).items())
    )
    file = io.BytesIO()
    file.write(b"%PDF-1.4\n")
    starts = []
    for number, content in enumerate(objects, 1):
        starts.append(file.tell())
        file.write(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    table = file.tell()
    file.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    file.write(b"".join(b"%010d 00000 n \n" % start for start in starts))
    file.write(b"trailer << /Size %d /Root 1 0 R /Info %d 0 R >>\n" % (len(objects) + 1, len(objects)))
    file.write(b"startxref\n%d\n%%%%EOF\n" % table)
    path.write_bytes(file.getvalue())
