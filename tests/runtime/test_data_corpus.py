"""Reading a corpus: what is found, what is counted, and the sentence for each way it can be wrong."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimaran.runtime.data.corpus import (
    CorpusCounts,
    SourceFile,
    Unit,
    find_files,
    hash_files,
    iter_units,
    split_sections,
)
from trimaran.runtime.data.files import DataError


def read(path: Path, text_field: str = "text") -> tuple[list[str], CorpusCounts]:
    counts = CorpusCounts()
    return [unit.text for unit in iter_units([SourceFile(path, text_field)], counts)], counts


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_folders_globs_and_files_are_found_in_order_and_read_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "sub/c.txt.gz", "notes.md", ".cache/old.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, passed_over = find_files([str(tmp_path), str(tmp_path / "*.txt")])
    assert [file.name for file in files] == ["a.jsonl", "b.txt", "c.txt.gz"]
    assert passed_over == {"file of another kind": 1, "file named twice": 1, "hidden file": 1}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("missing.txt", "does not exist"),
        ("missing-folder", "does not exist"),
        ("nothing*.txt", "holds no .txt"),
        ("empty", "holds no .txt"),
        ("table.csv", "is not a .txt"),
    ],
)
def test_a_source_without_usable_files_is_named(tmp_path: Path, source: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(DataError, match=re.escape(source) + f".*{sentence}"):
        find_files([str(tmp_path / source)])


def test_no_source_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.source is empty"):
        find_files([])


def test_a_broken_link_is_found_and_fails_when_read(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (path,), _ = find_files([str(tmp_path)])
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt: No such file"):
        read(path)
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt: No such file"):
        hash_files([SourceFile(path, "text")])


def test_an_unreadable_file_is_named_with_the_reason(tmp_path: Path) -> None:
    # The tests may run as root, who may read everything; a folder in the file's place can't be read by anybody.
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.jsonl").mkdir()
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(DataError, match=rf"cannot read .*{name}: Is a directory"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(b'{"text": "hello"}\n' * 1000)
    for data in (whole[: len(whole) // 2], b"not gzip"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"cannot read .*{name}"):
            read(tmp_path / name)


def test_gzip_and_plain_files_give_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert read(tmp_path / "a.txt")[0] == read(tmp_path / "a.txt.gz")[0] == ["one\ntwo"]


def test_bytes_that_are_not_utf8_are_replaced_and_counted_exactly(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf" + b"\xe9 \xff\xfe " + "né \ufffd".encode() + b" \xe2\x82")
    (text,), counts = read(path)
    assert text == "caf\ufffd \ufffd\ufffd né \ufffd \ufffd"
    # The U+FFFD that the file holds itself is no damage; the two bytes of a cut-off sign are two.
    assert counts.replaced_bytes == 5


def test_byte_order_mark_and_crlf_are_taken_off_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (text,), counts = read(path)
    assert (text, counts.carriage_returns_removed, counts.replaced_bytes) == ("one\ntwo\n", 2, 0)


def test_jsonl_counts_documents_and_drops_by_reason(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " \n"}, {"text": "zwölf"}])
    path.write_bytes(path.read_bytes() + b"\n")
    texts, counts = read(path)
    assert texts == ["one", "zwölf"]
    assert (counts.files, counts.documents, counts.units, counts.characters, counts.bytes) == (1, 2, 2, 8, 9)
    assert counts.dropped == {"empty document": 1, "blank jsonl line": 1}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{oops", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1, 2]", "line 2: a JSON list, not an object"),
        ('{"body": "x"}', r"line 2: the field 'text' is missing \(the line has body\); set data.text_field"),
        ('{"text": 3}', "line 2: the field 'text' is int, not text"),
    ],
)
def test_a_bad_jsonl_line_is_named_by_file_and_number(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, {sentence}"):
        read(path)


def test_half_characters_that_json_can_spell_are_replaced_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d\\ude00b"}\n{"text": "c\\ud800d"}\n')
    texts, counts = read(path)
    assert texts == ["a\U0001f600b", "c\ufffdd"]
    assert counts.replaced_surrogates == 1


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
    units = list(iter_units([SourceFile(path, "text")], CorpusCounts()))
    assert [(len(unit.text), unit.continues) for unit in units] == [(102, False), (40_000, True), (5, False)]
    assert units[2] == Unit("short", continues=False)


def test_the_source_hash_follows_content_and_not_place(tmp_path: Path) -> None:
    for name, text in (("a.txt", "one"), ("copy.txt", "one"), ("b.txt", "two"), ("a.jsonl", "one")):
        (tmp_path / name).write_text(text)
    a, copy, b, jsonl = (SourceFile(tmp_path / name, "text") for name in ("a.txt", "copy.txt", "b.txt", "a.jsonl"))
    assert hash_files([a]) == hash_files([copy])
    assert len({hash_files(files) for files in ([a], [b], [a, b], [b, a], [jsonl])}) == 5
    assert hash_files([jsonl]) != hash_files([SourceFile(jsonl.path, "body")])
