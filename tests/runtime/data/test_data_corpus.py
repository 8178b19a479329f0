"""Reading a corpus: what is found, what is counted, and the sentence for each way it can be wrong."""

import bz2
import gzip
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimaran.runtime.data import prepare, sources
from trimaran.runtime.data.account import Account
from trimaran.runtime.data.corpus import Unit, iter_units, split_sections
from trimaran.runtime.data.files import DataError, hash_file
from trimaran.runtime.data.prepare import hash_source
from trimaran.runtime.data.sources import SourceFile, find_files


def read(path: Path, text_field: str = "text") -> tuple[list[str], Account]:
    account = Account()
    return [unit.text for unit in iter_units([SourceFile(path, text_field)], account)], account


def find(*sources: Path | str) -> tuple[list[Path], Account]:
    account = Account()
    return [file.path for file in find_files([str(source) for source in sources], "text", account)], account


def noticed(account: Account) -> dict[str, tuple[int, str]]:
    """Reason -> how often, and the name of what was first."""
    return {reason: (notice.count, notice.first.rpartition("/")[2]) for reason, notice in account.noticed.items()}


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_folders_globs_and_files_are_found_in_order_and_read_once(tmp_path: Path) -> None:
    names = (
        "b.txt",
        "a.jsonl",
        "sub/c.txt.gz",
        "sub/D.NDJSON",
        "e.json",
        "notes.md",
        "x.pdf",
        "y.pdf",
        ".cache/old.txt",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, account = find(tmp_path, tmp_path / "*.txt", tmp_path / "s*")
    assert [file.name for file in files] == ["a.jsonl", "b.txt", "e.json", "D.NDJSON", "c.txt.gz"]
    assert noticed(account) == {"hidden": (1, "old.txt"), "other_kind": (3, "notes.md"), "twice": (3, "b.txt")}
    with pytest.raises(
        DataError, match=r"3 files of another kind \(\.pdf 2, \.md 1\) \(37\.5% of the bytes of the files"
    ):
        account.check(0.3)
    account.check(0.4)


def test_links_to_folders_are_followed_each_folder_once_whatever_way_they_loop(tmp_path: Path) -> None:
    for name in ("text/own.jsonl", "elsewhere/more.jsonl", "elsewhere/deep/most.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    for number in range(12):  # links from each folder to the others: a walk of every path would not end
        for folder in ("text", "elsewhere", "elsewhere/deep"):
            (tmp_path / folder / f"link{number}").symlink_to(tmp_path / ("text", "elsewhere")[number % 2])
    (tmp_path / "text" / "itself").symlink_to("itself")
    expected = ["link1/deep/most.txt", "link1/more.jsonl", "own.jsonl"]
    for source in ("text", "text/**/*.*", "text/**"):
        files, account = find(tmp_path / source)
        assert [str(file.relative_to(tmp_path / "text")) for file in files] == expected
        assert set(account.noticed) <= {"other_kind"}, "the link to itself"
    assert find(tmp_path / "**" / "deep" / "*.txt")[0] == [tmp_path / "elsewhere" / "deep" / "most.txt"]


def test_a_walk_that_leads_away_or_has_no_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to the root, to a folder above the corpus or to the kernel's file systems would be read for hours."""
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    (corpus / "a.txt").write_text("text")
    for target in ("/", "/proc", "/proc/self", "/sys/kernel", str(tmp_path), "../.."):
        (corpus / "deep" / "link").symlink_to(target)
        why = "whose files the kernel makes up" if target.startswith(("/proc", "/sys")) else "which holds far more"
        for source in (corpus, corpus / "**" / "*.txt"):
            with pytest.raises(DataError, match=rf"deep/link leads to /.*, {why}.*; remove it, or name the folders"):
                find(source)
        (corpus / "deep" / "link").unlink()
    for source in ("/", "/**/*.txt"):
        with pytest.raises(DataError, match="/ leads to /, which holds far more than a corpus"):
            find(source)
    (corpus / ".up").symlink_to("/")
    assert noticed(find(corpus)[1]) == {"hidden": (1, ".up")}
    monkeypatch.setattr(sources, "_MOST_FILES", 3)
    with pytest.raises(DataError, match=r"corpus has 3 files or more; name its folders one by one"):
        find(corpus)


def test_a_pipe_among_the_files_is_passed_over_and_named_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    files, account = find(tmp_path)
    assert (files, noticed(account)) == ([tmp_path / "a.txt"], {"special": (1, "pipe.txt")})
    with pytest.raises(DataError, match=r"pipe\.txt' is not a"):
        find(tmp_path / "pipe.txt")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("missing.txt", "does not exist"),
        ("missing-folder", "does not exist"),
        ("nothing*.txt", "holds no .txt"),
        ("empty", "holds no .txt"),
        (
            "tables",
            r"holds no .txt.* \(passed over 1 hidden file, passed over 1 file of another kind \(\.csv 1\)\); name",
        ),
        ("table.csv", "is not a .txt"),
    ],
)
def test_a_source_without_usable_files_is_named(tmp_path: Path, source: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("table.csv", "tables/a.csv", "tables/.b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a,b")
    with pytest.raises(DataError, match=re.escape(source) + f".*{sentence}"):
        find(tmp_path / source)


def test_no_source_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.source is empty"):
        find()


def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for name in ("gone.txt", "gone"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "nowhere")
        with pytest.raises(DataError, match=rf"{name} is a link that leads nowhere; mend or remove it"):
            find(tmp_path)
        link.unlink()


def test_an_empty_file_beside_others_is_passed_over_and_no_loss(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").touch()
    account = Account()
    assert [file.path.name for file in find_files([str(tmp_path)], "text", account)] == ["a.txt"]
    account.check(0.0)
    assert account.told() == "passed over 1 empty file"


def test_names_are_escaped_for_the_terminal(tmp_path: Path) -> None:
    account = Account()
    account.note("other_kind", "a\n\x1b[31m\udcff.doc")
    assert account.rows()[0][3] == r"a\n\x1b[31m\udcff.doc"


def test_an_unreadable_file_is_named_with_the_reason(tmp_path: Path) -> None:
    # The tests may run as root, who may read everything; a folder in the file's place can't be read by anybody.
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.jsonl").mkdir()
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(DataError, match=rf"cannot read .*{name}: Is a directory"):
            read(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "A.JSON"])
def test_a_compressed_file_gives_the_same_documents_and_a_damaged_one_is_named(
    tmp_path: Path, name: str, suffix: str
) -> None:
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    content = b'{"text": "hello"}\n' * 1000
    (tmp_path / name).write_bytes(content)
    packed = tmp_path / f"{name}{suffix}"
    packed.write_bytes(compress(content))
    assert read(packed)[0] == read(tmp_path / name)[0]
    for damaged in (compress(content)[: len(compress(content)) // 2], b"not compressed"):
        packed.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"cannot read .*{packed.name}"):
            read(packed)


def test_bytes_that_are_not_utf8_are_replaced_and_counted_exactly(tmp_path: Path) -> None:
    path = tmp_path / "damaged.txt"
    path.write_bytes(
        "zwölf Äpfel für Übermütige\n".encode() + b"caf" + b"\xe9 \xff\xfe " + "né \ufffd".encode() + b" \xe2\x82"
    )
    (text,), account = read(path)
    assert text.endswith("caf\ufffd \ufffd\ufffd né \ufffd \ufffd")
    # The U+FFFD that the file holds itself is no damage; the two bytes of a cut-off sign are two.
    assert noticed(account) == {"not_utf8": (5, "damaged.txt, line 2")}
    assert account.share("not_utf8") == 5 / len(text), "most of the characters beyond ASCII can be read"


def test_packed_data_under_the_name_of_a_text_is_named(tmp_path: Path) -> None:
    packed = {"gzip": (".gz", gzip.compress), "bzip2": (".bz2", bz2.compress), "xz": (".xz", lzma.compress)}
    for kind, (suffix, compress) in packed.items():
        for name in ("a.txt", "a.jsonl", "a.json"):
            (tmp_path / name).write_bytes(compress(b"text"))
            with pytest.raises(DataError, match=rf"{name} holds {kind} data .* name it {name}{suffix}, or unpack it"):
                read(tmp_path / name)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(gzip.compress(b"text", mtime=0)))
    (tmp_path / "b.txt").write_bytes(b"PK\x03\x04\x14\0")
    for name, words in (("a.txt.gz", "gzip data instead of text; unpack it"), ("b.txt", "zip .*; convert it to text")):
        with pytest.raises(DataError, match=words):
            read(tmp_path / name)


def test_an_empty_compressed_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").touch()
    with pytest.raises(DataError, match=r"passed over 1 empty file\); name such files"):
        find(tmp_path / "a.jsonl.gz")


def test_japanese_in_utf16_without_a_mark_is_told_by_its_few_nuls(tmp_path: Path) -> None:
    line = "春はあけぼの。やうやう白くなりゆく山ぎは、少し明かりて、紫だちたる雲\n"
    (tmp_path / "a.txt").write_bytes((line * 50).encode("utf-16-le"))
    with pytest.raises(DataError, match=r"a\.txt looks like UTF-16 or UTF-32 without a byte order mark.* \(50 NULs\)"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("encoding", ["cp1252", "cp1251", "shift-jis"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_legacy_encoding_is_refused_by_the_share_of_its_lines(tmp_path: Path, encoding: str, as_json: bool) -> None:
    line = {"cp1252": "Die größte Übung für alle", "cp1251": "Наша Таня громко плачет", "shift-jis": "春はあけぼの"}[
        encoding
    ]
    lines = [line, "plain", line, line]
    path = tmp_path / ("a.jsonl" if as_json else "a.txt")
    texts = [json.dumps({"text": each}, ensure_ascii=False) for each in lines] if as_json else lines
    path.write_bytes("\n".join(texts).encode(encoding))
    _, account = read(path)
    assert account.share("not_utf8") > 0.7
    with pytest.raises(
        DataError,
        match=r"outside UTF-8 .* first .*a\.(txt|jsonl), line 1\) would be replaced, .*max_lost.* find out which",
    ):
        account.check(0.05)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz"])
def test_utf16_and_utf32_are_decoded_with_a_byte_order_mark_and_refused_without(
    tmp_path: Path, encoding: str, name: str
) -> None:
    document = "Smørrebrød \U0001f600\nund\u2028mehr, und noch viel mehr"
    text = document if ".txt" in name else json.dumps({"text": document}, ensure_ascii=False) + "\r\n\n"
    compress: Callable[[bytes], bytes] = gzip.compress if name.endswith(".gz") else bytes
    mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
    (tmp_path / name).write_bytes(compress((mark + text).encode(encoding)))
    texts, account = read(tmp_path / name)
    assert texts == [document]
    assert noticed(account)["utf16"] == (1, name)
    (tmp_path / name).write_bytes(compress((mark + text).encode(encoding)[:-1]))
    with pytest.raises(DataError, match=rf"{name} begins like UTF-(16|32)\S* and is damaged .*; convert it to UTF-8"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(compress(text.encode(f"{encoding.removesuffix('-be')}-le")))
    with pytest.raises(DataError, match=rf"{name}.* looks like UTF-16 or UTF-32 without a byte order mark"):
        read(tmp_path / name)


def test_byte_order_mark_and_crlf_are_taken_off_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (text,), account = read(path)
    assert (text, noticed(account)) == ("one\ntwo\n", {"crlf": (2, "dos.txt")})


def test_documents_are_counted_and_left_out_by_reason(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " \n"}, {"text": None}, {"text": "zw\0lf"}])
    path.write_bytes(path.read_bytes() + b"\n")
    texts, account = read(path)
    assert texts == ["one", "zw\0lf"]
    totals = {"files": 1, "file_bytes": path.stat().st_size, "records": 4, "documents": 2, "units": 2}
    assert account.totals == {**totals, "characters": 8, "bytes": 8}
    assert noticed(account) == {
        "empty": (1, "a.jsonl, line 2"),
        "null": (1, "a.jsonl, line 3"),
        "nul": (1, "a.jsonl, line 4"),
        "blank": (1, "a.jsonl, line 5"),
    }
    with pytest.raises(DataError, match=r"1 document whose text is null \(25% of the documents, first .*line 3\)"):
        account.check(0.2, ["null"])
    assert Account.read(json.loads(json.dumps(account.record))) == account


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('\n{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ('[\n  {"text": "a"}, {"text": null},\n  {"text": "b"}\n]', ["a", "b"]),
        ('{\n  "text": "a",\n  "name": 1\n}\n', ["a"]),
        ('{\n  "description": "of the corpus"\n}\n', []),
        ('{"description": "of the corpus"}\n', []),
        ("[1, 2]", []),
        ("", []),
    ],
)
def test_a_json_file_has_json_lines_or_a_list_or_one_record_or_is_passed_over(
    tmp_path: Path, content: str, texts: list[str]
) -> None:
    (tmp_path / "a.json").write_text(content)
    found, account = read(tmp_path / "a.json")
    assert found == texts
    assert ("no_records" in account.noticed) == (not texts)


@pytest.mark.parametrize(
    ("name", "line", "sentence"),
    [
        ("a.jsonl", "{oops", "line 2: not JSON"),
        ("a.jsonl", "[" * 100_000, "line 2: not JSON"),
        ("a.jsonl", f'{{"n": {"9" * 5000}}}', r"line 2: not JSON \(it has a number of more than 4,300 digits\)"),
        ("a.jsonl", "[1, 2]", "line 2: a list, not an object"),
        (
            "a.ndjson",
            '{"body": "x"}',
            r"line 2: the field 'text' is missing \(the line has body\); set data.text_field",
        ),
        ("a.json", '{"text": 3}', "line 2: the field 'text' is a number, not text"),
        ("a.json", '{"text": ["x"]}', "line 2: the field 'text' is a list, not text"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, name: str, line: str, sentence: str) -> None:
    path = tmp_path / name
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"{name}, {sentence}"):
        read(path)
    path.write_text("[{" + '"text": "fine"},\n' + line + "\n]")
    if name == "a.json":
        with pytest.raises(DataError, match=sentence.replace("line", r"a\.json, record")):
            read(path)


def test_half_characters_that_json_can_spell_are_replaced_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d\\ude00b"}\n{"text": "c\\ud800d"}\n')
    texts, account = read(path)
    assert texts == ["a\U0001f600b", "c\ufffdd"]
    assert noticed(account) == {"surrogate": (1, "a.jsonl, line 2")}


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=2),
)
_CONTENT = st.binary(max_size=60) | st.lists(_JSON.map(json.dumps), max_size=4).map(
    lambda lines: "\n".join(lines).encode()
) | st.lists(st.sampled_from(["\ufeff", '{"text": "a"}', '"\\ud800"', "\r\n", "é", "\0"]), max_size=6).flatmap(
    lambda parts: st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32-be", "latin-1"]).map(
        lambda encoding: "".join(parts).encode(encoding, "replace")
    )
)  # fmt: skip


@given(
    content=_CONTENT, kind=st.sampled_from(["txt", "jsonl", "json"]), packed=st.sampled_from(["", ".gz", ".bz2", ".xz"])
)
def test_any_content_is_read_or_refused_by_the_file_name(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: str, packed: str
) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[packed]
    path = tmp_path_factory.getbasetemp() / f"any.{kind}{packed}"
    path.write_bytes(compress(content))
    error, texts, account = "", list[str](), Account()
    try:
        texts, account = read(path)
    except DataError as refused:
        error = str(refused)
    assert not error or path.name in error
    assert account.totals["characters"] == sum(map(len, texts))
    assert all(0 <= account.share(reason) <= 1 for reason in account.noticed)
    assert "\ud800" not in "".join(texts)


def test_the_text_field_can_be_named(tmp_path: Path) -> None:
    assert read(write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}]), "body")[0] == ["x"]


@given(st.text(alphabet="ab \t\n", max_size=400), st.integers(1, 40))
def test_sections_join_to_exactly_the_document(text: str, limit: int) -> None:
    sections = split_sections(text, limit)
    assert "".join(sections) == text
    assert all(sections) or sections == [""]
    for section in sections:
        # Only a line that is too long by itself may be over the limit.
        assert len(section) <= limit or section[:-1].count("\n") == 0 or not section.strip()


def test_sections_are_cut_at_blank_lines_and_only_long_paragraphs_at_line_ends() -> None:
    assert split_sections("aa\naa\n\nbb\nbb\n\ncc", limit=12) == ["aa\naa\n\n", "bb\nbb\n\ncc"]
    assert split_sections("title\n\nline one\nline two\nline three\n", limit=20) == [
        "title\n\nline one\n",
        "line two\nline three\n",
    ]


def test_a_long_document_becomes_units_that_continue_each_other(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "word " * 20 + "\n\n" + "x" * 40_000}, {"text": "short"}])
    units = list(iter_units([SourceFile(path, "text")], Account()))
    assert [(len(unit.text), unit.continues) for unit in units] == [(102, False), (40_000, True), (5, False)]
    assert units[2] == Unit("short", continues=False)
    assert [unit.place for unit in units] == [f"{path}, line 1"] * 2 + [f"{path}, line 2"]


def test_the_source_hash_follows_content_and_not_place(tmp_path: Path) -> None:
    for name, text in (("a.txt", "one"), ("copy.TXT", "one"), ("b.txt", "two"), ("a.jsonl", "one")):
        (tmp_path / name).write_text(text)
    a, copy, b, jsonl = (SourceFile(tmp_path / name, "text") for name in ("a.txt", "copy.TXT", "b.txt", "a.jsonl"))

    def hashed(*files: SourceFile) -> str:
        return hash_source(files, tmp_path / "cache")

    assert hashed(a) == hashed(copy)
    assert len({hashed(*files) for files in ([a], [b], [a, b], [b, a], [jsonl])}) == 5
    assert hashed(jsonl) != hashed(SourceFile(jsonl.path, "body"))


def test_a_file_is_hashed_once_until_its_time_of_change_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def hash_and_list(path: Path) -> str:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(prepare, "hash_file", hash_and_list)
    files = [SourceFile(tmp_path / name, "text") for name in ("old.txt", "new.txt")]
    for file in files:
        file.path.write_text("one")
    os.utime(files[0].path, (1, 1))
    first = hash_source(files, tmp_path / "cache")
    assert sorted(hashed) == ["new.txt", "old.txt"]
    hashed.clear()
    # A file may change again within the clock tick in which it was read, so a new one is not relied on.
    assert hash_source(files, tmp_path / "cache") == first
    assert hashed == ["new.txt"]
    for file in files:
        os.utime(file.path, (2, 2))
    files[0].path.write_text("two")
    os.utime(files[0].path, (3, 3))
    assert hash_source(files, tmp_path / "cache") != first
    (record,) = (tmp_path / "cache" / "sources").iterdir()
    rows = json.loads(record.read_text())
    for damage in ("", "{", "[1]", '{"x": 1}', json.dumps({name: [row[0], row[1], 5] for name, row in rows.items()})):
        record.write_text(damage)
        hashed.clear()
        assert hash_source(files, tmp_path / "cache") == hash_source(files, tmp_path / "cache")
        assert sorted(hashed) == ["new.txt", "old.txt"], "a damaged record is none"
