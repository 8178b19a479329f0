"""An author's files become cleaned works: each format, each boilerplate, and a sentence for what can't be read."""

import codecs
import io
import random
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.twin.books import novel, pages_of, prose, write_epub, write_pdf
from trimaran.runtime.data.files import DataError
from trimaran.runtime.twin.casing import lower, upper
from trimaran.runtime.twin.texts.plain import paragraphs_of
from trimaran.runtime.twin.texts.read import Texts, read_works
from trimaran.runtime.twin.texts.work import WHOLE, Tally


def read(*paths: Path, language: str = "en") -> Texts:
    return read_works([str(path) for path in paths], language)


def reasons(texts: Texts, file: Path) -> dict[str, int]:
    return {each.reason: each.times for each in texts.left if each.file == str(file)}


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def check_chapters(texts: Texts) -> None:
    """Chapters are in order, apart, without blank ends, and everything but headings is in one."""
    for work in texts.works:
        at = 0
        for chapter in work.chapters:
            assert at <= chapter.start < chapter.end <= len(work.text)
            inside = work.text[chapter.start : chapter.end]
            assert inside == inside.strip()
            assert work.text[at : chapter.start].count("\n\n") <= 3
            at = chapter.end
        assert all(line == line.rstrip() for line in work.text.split("\n"))


@pytest.mark.parametrize(
    ("text", "turkish", "english"),
    [
        ("IŞIK İSTANBUL", "ışık istanbul", "işik istanbul"),
        ("ISPARTA", "ısparta", "isparta"),
        ("I\u0307zmir", "izmir", "izmir"),
    ],
)
def test_lower_case_is_that_of_the_language(text: str, turkish: str, english: str) -> None:
    assert lower(text, "tr") == turkish
    assert lower(text, "en") == english


def test_upper_case_is_that_of_the_language() -> None:
    assert upper("ışık ilik", "tr") == "IŞIK İLİK"
    assert upper("ilik", "en") == "ILIK"


@given(st.text(alphabet="aıiIİşŞğĞüÜöÖçÇ \u0307"))
def test_turkish_lower_case_stays_and_is_that_of_its_upper_case(text: str) -> None:
    once = lower(text, "tr")
    assert lower(once, "tr") == once
    assert lower(upper(once, "tr"), "tr") == once or "\u0307" in once


LICENCE = (
    "The Project Gutenberg eBook of The Mill\n\nThis ebook is for the use of anyone anywhere.\n\nTitle: The Mill:\n"
    "        A Story\n\nAuthor: Ada Grey\n\n*** START OF THE PROJECT GUTENBERG EBOOK THE MILL ***\n\n"
    "Produced by some volunteers\n\n"
)
END = "\n\n*** END OF THE PROJECT GUTENBERG EBOOK THE MILL ***\n\nUpdated editions will replace the previous one.\n"


def test_a_gutenberg_text_is_the_author_s_alone(tmp_path: Path) -> None:
    contents = "CHAPTER I\nCHAPTER II\nCHAPTER III"
    body = (
        novel(1, chapters=3)
        .replace("\n\n", "\n\n[Illustration: the mill]\n\n", 1)
        .replace("captain", "[Pg 12]captain", 1)
    )
    file = write(tmp_path / "mill.txt", LICENCE + contents + "\n\n" + body + "\n\n* * *\n" + END)
    texts = read(file)
    (work,) = texts.works
    assert (work.title, work.author) == ("The Mill: A Story", "Ada Grey")
    assert [chapter.title for chapter in work.chapters] == ["CHAPTER I", "CHAPTER II", "CHAPTER III"]
    assert work.text == novel(1, chapters=3).strip()
    assert reasons(texts, file) == {
        "gutenberg.licence": 7, "gutenberg.notes": 1, "text.contents": 1, "text.illustration": 1, "text.page_mark": 1,
        "text.rule": 1,
    }  # fmt: skip
    check_chapters(texts)


def test_wrapped_prose_is_joined_and_verse_is_not() -> None:
    import textwrap

    wrapped = [textwrap.fill(paragraph, 72) for paragraph in prose(3, 4)]
    verse = "Tell me not in numbers\nof the widow and her mill\nor the clock, that\nnobody wound"
    tally = Tally()
    found = paragraphs_of("\n\n".join([*wrapped[:2], verse, *wrapped[2:]]), tally)
    assert found == [*prose(3, 4)[:2], verse, *prose(3, 4)[2:]]
    assert tally.times == {"text.unwrapped": 4}


def test_turkish_chapters_and_casing(tmp_path: Path) -> None:
    body = [
        "BİRİNCİ BÖLÜM", "Işık köyün üstüne düştü. İhtiyar değirmenci kapıyı açtı.", "2. BÖLÜM",
        "Çocuk geldi ve oturdu.", "III. KISIM", "Kış bitti.",
        "Bölüm 4: Dönüş", "Herkes evine döndü.", "Sonsöz", "Bu kadar.",
    ]  # fmt: skip
    work = read(write(tmp_path / "koy.txt", "\n\n".join(body)), language="").works[0]
    assert work.language == "tr"
    titles = [chapter.title for chapter in work.chapters]
    assert titles[:2] == ["BİRİNCİ BÖLÜM", "2. BÖLÜM"]
    assert titles[2:] == ["III. KISIM", "III. KISIM, Bölüm 4: Dönüş", "III. KISIM, Sonsöz"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1254"])
def test_other_encodings_of_turkish_are_read(tmp_path: Path, encoding: str) -> None:
    text = "İhtiyar değirmenci kapıyı açtı ve şöyle dedi: bu gece çok soğuk olacak, için rahat olsun.\n\n" * 6
    texts = read(write(tmp_path / "koy.txt", text, encoding), language="tr")
    assert "İhtiyar değirmenci kapıyı açtı ve şöyle" in texts.works[0].text


def test_an_act_and_its_scene_in_one_paragraph_are_two_headings(tmp_path: Path) -> None:
    text = f"ACT I\nSCENE I. A mill.\n\n{prose(1, 1)[0]}\n\nSCENE II. A yard.\n\n{prose(2, 1)[0]}"
    work = read(write(tmp_path / "a.txt", text)).works[0]
    assert [chapter.title for chapter in work.chapters] == ["ACT I, SCENE I. A mill.", "ACT I, SCENE II. A yard."]


def test_numbers_that_count_up_are_chapters_and_a_single_one_is_not(tmp_path: Path) -> None:
    parts = prose(5, 4)
    counting = "\n\n".join(f"{number}.\n\n{part}" for number, part in zip(("I", "II", "III", "IV"), parts, strict=True))
    work = read(write(tmp_path / "a.txt", counting)).works[0]
    assert [chapter.title for chapter in work.chapters] == ["I.", "II.", "III.", "IV."]
    alone = read(write(tmp_path / "b.txt", "7\n\n" + "\n\n".join(parts))).works[0]
    assert [chapter.title for chapter in alone.chapters] == [""]


PLAY = "\n\n".join(
    ["# The Mill", "## ACT I", "### SCENE I. A *mill*.", "_Enter the miller and\nhis son_"]
    + [f"**First Clown**  \nLine {n} of it,  \nand _more_ of\nit.  " for n in range(6)]
    + [f"**MILLER**  \n_\\[Aside]_  \nI know a [song](x.html)<!-- no --> {n}" for n in range(6)]
    + ["# EPILOGUE", "Farewell."]
)


def test_a_play_in_markdown_is_printed_as_plays_are(tmp_path: Path) -> None:
    file = write(tmp_path / "mill.md", PLAY)
    texts = read(file)
    (work,) = texts.works
    assert work.title == "The Mill"
    assert [chapter.title for chapter in work.chapters] == ["ACT I, SCENE I. A mill.", "EPILOGUE"]
    assert "[Enter the miller and his son]\n\nFIRST CLOWN.\nLine 0 of it,\nand more of it.\n\n" in work.text
    assert "MILLER.\n[Aside]\nI know a song 0\n\n" in work.text
    counts = reasons(texts, file)
    assert counts["markdown.speaker"] == 12
    assert counts["markdown.stage_direction"] == 7
    assert counts["markdown.comment"] == counts["markdown.link"] == 6
    check_chapters(texts)


def test_markdown_prose_loses_its_marks_alone(tmp_path: Path) -> None:
    text = (
        '---\ntitle: Letters\nauthor: "Ada"\n---\n\nOn *Mills*\n=====\n\n> quoted **line**\n> goes on\n\n'
        "snake_case_name\n"
        "2 * 3 * 4 \\*not\\*  \nhard\n\n```\ncode  here\n   # no heading\n```\n\n"
        "***\n\n## Second\n\n![picture](p.png)\n\nEnd."
    )
    work = read(write(tmp_path / "x.md", text)).works[0]
    assert (work.title, work.author) == ("Letters", "Ada")
    assert work.text == (
        "On Mills\n\nquoted line goes on\n\nsnake_case_name 2 * 3 * 4 *not*\nhard\n\ncode here\n# no heading\n\n"
        "Second\n\nEnd."
    )


def test_html_gives_headings_and_the_main_content(tmp_path: Path) -> None:
    paragraphs = "".join(f"<p>{text}</p>" for text in prose(7, 3))
    page = (
        "<html><head><title>The Mill</title><meta name=author content='Ada Grey'><script>evil()</script></head><body>"
        f"<nav><ul><li><a href=/>Home</a></li></ul></nav><main><article><h1>One <i>day</i></h1>{paragraphs}"
        f"<h2>Two</h2>{paragraphs[:300]}<span class=pagenum>[12]</span> end.</p></article></main>"
        "<footer>Imprint and cookies</footer></body></html>"
    )
    file = write(tmp_path / "mill.html", page)
    texts = read(file)
    (work,) = texts.works
    assert (work.title, work.author) == ("The Mill", "Ada Grey")
    assert [chapter.title for chapter in work.chapters] == ["One day", "One day, Two"]
    assert all(text in work.text for text in prose(7, 3))
    assert not any(word in work.text for word in ("evil", "Home", "cookies", "[12]"))
    assert {"html.not_main_content", "html.page_or_note_mark"} <= reasons(texts, file).keys()


def test_epub_in_its_reading_order(tmp_path: Path) -> None:
    write_epub(tmp_path / "mill.epub", "The Mill", "Ada Grey", pages_of(novel(2)))
    texts = read(tmp_path / "mill.epub")
    (work,) = texts.works
    assert (work.title, work.author) == ("The Mill", "Ada Grey")
    assert work.text == novel(2).strip()
    assert len(work.chapters) == 5
    check_chapters(texts)


def test_pdf_without_heads_numbers_and_hyphens(tmp_path: Path) -> None:
    import textwrap

    text = prose(4, 12, sentences=4)
    lines = [line for paragraph in text for line in textwrap.wrap(paragraph, 80)]
    lines[3:4] = [lines[3] + " neigh-", "bours met."]
    pages = [lines[at : at + 8] for at in range(0, len(lines), 8)]
    heads = [["THE MILL", *page, f"- {number} -"] for number, page in enumerate(pages, 1)]
    write_pdf(tmp_path / "mill.pdf", [*heads, []], {"Title": "The Mill", "Author": "Ada Grey"})
    texts = read(tmp_path / "mill.pdf")
    (work,) = texts.works
    assert (work.title, work.author) == ("The Mill", "Ada Grey")
    assert "THE MILL" not in work.text
    assert "neighbours met." in work.text
    counts = reasons(texts, tmp_path / "mill.pdf")
    assert counts["pdf.running_head"] == counts["pdf.page_number"] == len(pages)
    assert counts["pdf.hyphen"] == counts["pdf.page_without_text"] == 1
    for paragraph in text[2:]:
        assert paragraph in work.text.replace("\n\n", " ")


def test_bookmarks_of_a_pdf_are_its_chapters(tmp_path: Path) -> None:
    from pypdf import PdfReader, PdfWriter

    parts = [["1. The Mill", *(f"A line {n} about the mill." for n in range(9))], ["It stood for years."]]
    parts.append(["The first part ends here.", "2. The River", *(f"A line {n} about water." for n in range(9))])
    write_pdf(tmp_path / "mill.pdf", parts)
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO((tmp_path / "mill.pdf").read_bytes())))
    mill = writer.add_outline_item(title="The Mill", page_number=0)
    writer.add_outline_item(title="Its years", page_number=1, parent=mill)
    writer.add_outline_item(title="The River", page_number=2)
    writer.write(tmp_path / "mill.pdf")
    (work,) = read(tmp_path / "mill.pdf").works
    chapters = {chapter.title: work.text[chapter.start : chapter.end] for chapter in work.chapters}
    assert list(chapters) == ["The Mill", "The Mill, Its years", "The River"]
    assert chapters["The Mill, Its years"] == "It stood for years.\n\nThe first part ends here."
    assert chapters["The River"].startswith("A line 0 about water.")
    assert "2. The River" not in work.text


def test_headings_of_a_pdf_without_bookmarks_are_chapters(tmp_path: Path) -> None:
    lines = [line for number in ("I", "II") for line in (f"CHAPTER {number}", *prose(len(number), 3, 1))]
    write_pdf(tmp_path / "mill.pdf", [lines])
    assert [chapter.title for chapter in read(tmp_path / "mill.pdf").works[0].chapters] == ["CHAPTER I", "CHAPTER II"]


def encrypted_pdf(path: Path) -> None:
    from pypdf import PdfReader, PdfWriter

    write_pdf(path, [["secret"]])
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(path.read_bytes())))
    writer.encrypt("a password", algorithm="RC4-128")
    writer.write(path)


def encrypted_epub(path: Path) -> None:
    write_epub(path, "The Mill", "Ada", pages_of(novel(2)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(
            "META-INF/encryption.xml",
            '<encryption><enc:EncryptedData xmlns:enc="x"><enc:EncryptionMethod '
            'Algorithm="http://www.w3.org/2001/04/xmlenc#aes128-cbc"/></enc:EncryptedData></encryption>',
        )


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr("page.xhtml", b"\0" * (8 << 20))


def repeating(path: Path) -> None:
    """Write a book whose manifest names one file of a few MiB a hundred times."""

    content = random.Random(0).randbytes(3 << 20)
    items = "".join(f'<item id="i{n}" href="p.bin" media-type="image/png"/>' for n in range(100))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile full-path="c.opf"'
            ' media-type="application/oebps-package+xml"/></rootfiles></container>',
        )
        archive.writestr(
            "c.opf",
            '<package xmlns="http://www.idpf.org/2007/opf"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/"/>'
            f"<manifest>{items}</manifest><spine/></package>",
        )
        archive.writestr("p.bin", content)


def scanned(path: Path) -> None:
    write_pdf(path, [[], []])


BAD = {
    "empty.txt": (lambda path: path.write_bytes(b" \n"), "file.empty", "it is empty"),
    "binary.txt": (lambda path: path.write_bytes(bytes(range(32)) * 50), "file.binary", "no text"),
    "wrong.txt": (
        lambda path: path.write_bytes(b"\xff\x81\x8d\xfe\x90" * 400),
        "file.wrong_encoding",
        "save it as UTF-8",
    ),
    "licence.txt": (lambda path: path.write_text(LICENCE + END), "file.empty", "no text besides"),
    "scanned.pdf": (scanned, "pdf.scanned", r"none of its 2 pages has text.*OCR"),
    "secret.pdf": (encrypted_pdf, "pdf.encrypted", "opens without a password"),
    "broken.pdf": (lambda path: path.write_bytes(b"%PDF-1.4 no more"), "pdf.unreadable", "no whole PDF"),
    "secret.epub": (encrypted_epub, "epub.encrypted", "without DRM"),
    "bomb.epub": (bomb, "epub.bomb", "times as large, over 200"),
    "repeating.epub": (repeating, "epub.bomb", "names its files so often"),
    "broken.epub": (lambda path: path.write_bytes(b"PK\x03\x04 no more"), "epub.unreadable", "no EPUB"),
    "deep.html": (lambda path: path.write_text("<div>" * 2000 + "x"), "html.unreadable", "tags within tags"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_can_t_be_read_is_left_out_with_a_sentence(tmp_path: Path, name: str) -> None:
    make, reason, sentence = BAD[name]
    make(tmp_path / name)
    with pytest.raises(DataError, match=rf"none of 1 files has text.*{name}: .*{sentence}"):
        read(tmp_path / name)
    good = write(tmp_path / "good.txt", novel(1))
    texts = read(good, tmp_path / name)
    assert [work.file for work in texts.works] == [str(good)]
    (left,) = [each for each in texts.left if each.file == str(tmp_path / name)]
    assert left.reason == reason
    assert left.reason in WHOLE


def test_a_folder_is_read_in_order_and_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.txt", "cover.jpg", "data.csv", "data2.csv", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, novel(len(name)))
    (tmp_path / "again.txt").symlink_to("b.txt")
    texts = read(tmp_path)
    assert [Path(work.file).name for work in texts.works] == ["a.md", "again.txt", "c.txt"]
    details = {each.reason: each.detail for each in texts.left if each.detail}
    assert details["file.kind"] == "2 .csv, 1 .jpg, 1 hidden"
    assert "again.txt" in details["file.copy"]


def test_sources_that_are_no_texts(tmp_path: Path) -> None:
    write(tmp_path / "cover.jpg", "x")
    with pytest.raises(DataError, match=r"the folder has no text \(\.txt, .*; passed over: 1 \.jpg"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"cover\.jpg: \.jpg is not read"):
        read(tmp_path / "cover.jpg")
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "missing")
    with pytest.raises(DataError, match="no source was named"):
        read()


def test_the_same_book_in_two_formats_is_one_work(tmp_path: Path) -> None:
    write(tmp_path / "mill.txt", LICENCE + novel(2) + END)
    write_epub(tmp_path / "mill.epub", "The Mill", "Ada Grey", pages_of(novel(2).replace("captain", "colonel")))
    write(tmp_path / "other.txt", novel(3))
    texts = read(tmp_path)
    assert len(texts.works) == 2
    assert [work.number for work in texts.works] == [0, 1]
    (copy,) = [each for each in texts.left if each.reason == "work.copy"]
    assert "% of it is in" in copy.detail
    assert copy.characters > 0


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + novel(1).encode())
    assert read(tmp_path / "a.txt").works[0].text.startswith("CHAPTER I")


def test_damaged_files_are_read_or_left_out_with_a_sentence(tmp_path: Path) -> None:
    """150 files of five kinds, each with bytes changed, cut or doubled: nothing but DataError gets out."""
    draw = random.Random(0)
    write_epub(tmp_path / "a.epub", "The Mill", "Ada", pages_of(novel(1, 3, 2)))
    write_pdf(tmp_path / "a.pdf", [["One line of text here."] * 5] * 4)
    whole = {
        "epub": (tmp_path / "a.epub").read_bytes(),
        "pdf": (tmp_path / "a.pdf").read_bytes(),
        "html": f"<html><body>{pages_of(novel(1, 2, 2))[0]}</body></html>".encode(),
        "md": PLAY.encode(),
        "txt": (LICENCE + novel(1, 2, 2) + END).encode(),
    }
    read_some, sentences = 0, list[str]()
    for number in range(150):
        kind = draw.choice(list(whole))
        content = bytearray(whole[kind])
        for _ in range(draw.choice([1, 3, 20])):
            place = draw.randrange(len(content))
            what = draw.random()
            if what < 0.5:
                content[place] = draw.randrange(256)
            elif what < 0.75:
                del content[place : place + draw.randrange(1, 200)]
                content = content or bytearray(b"x")
            else:
                content[place:place] = content[place : place + draw.randrange(300)]
        file = tmp_path / f"{number}.{kind}"
        file.write_bytes(content)
        try:
            check_chapters(read(file))
            read_some += 1
        except DataError as error:
            sentences.append(f"{file.name}: {error}")
    assert 50 < read_some < 150
    assert all(sentence.count(sentence.split(":")[0]) == 2 for sentence in sentences)
