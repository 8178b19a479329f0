"""The engine's readers: every format, plain and packed, whole and damaged; nothing is lost without being counted."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import re
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import compress, pairwise
from pathlib import Path
from typing import Any, get_args

import brotli
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from warcio.archiveiterator import ArchiveIterator

from trimaran.runtime.data import extras
from trimaran.runtime.data.account import Account
from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.readers.part import Part, ReadSettings
from trimaran.runtime.data.readers.parts import FORMATS, check_first, find_parts
from trimaran.runtime.data.readers.read import read_part
from trimaran.runtime.data.readers.slices import find_slices
from trimaran.runtime.spec.sections.recipe.corpora import Format

TEXTS = ["first", "zwölf Äpfel\nund mehr", 'with "quotes", and commas', "日本語 " * 30, "last"]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(
    *sources: object, limit: int = 10 << 20, part_bytes: int = 64 << 20, field: str = "text", format: str | None = None
) -> tuple[list[Document], list[Loss]]:
    """Return the documents of sources, and what was lost, passed over or changed in the files."""
    how = ReadSettings(field, limit)
    parts = find_parts("c", [str(each) for each in sources], how, Account(), format=format, part_bytes=part_bytes)
    assert [part.index for part in parts] == list(range(len(parts)))
    found = [each for part in parts for each in read_part(part, how)]
    return [each for each in found if isinstance(each, Document)], [each for each in found if isinstance(each, Loss)]


def reasons(losses: list[Loss]) -> dict[str, tuple[int, str]]:
    """Reason without `read.` -> how often, and the first place in the file."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for loss in losses:
        name = loss.reason.removeprefix("read.")
        counts[name] += loss.times
        first.setdefault(name, loss.place.rpartition("#")[2])
    return {name: (count, first[name]) for name, count in counts.items()}


def table(texts: list[Any]) -> pa.Table:
    return pa.table({"text": texts, "url": [f"http://a/{number}" for number in range(len(texts))]})


def as_csv(texts: list[str], separator: str = ",") -> bytes:
    quoted = ('"' + text.replace('"', '""') + '"' for text in texts)
    return "".join(
        f"{row}\n" for row in (separator.join(("text", "n")), *(f"{q}{separator}1" for q in quoted))
    ).encode()


def as_arrow(texts: list[str], rows: int = 2) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table(texts).schema) as stream:
        stream.write_table(table(texts), max_chunksize=rows)
    return sink.getvalue()


def as_parquet(texts: list[Any], rows: int = 2) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table(texts), sink, row_group_size=rows)
    return sink.getvalue()


def record(kind: str, block: bytes, **headers: str) -> bytes:
    named = {"WARC-Type": kind, "WARC-Target-URI": "http://a/", "Content-Type": "application/http"}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    named |= {"WARC-Record-ID": "<urn:uuid:0>", "WARC-Date": "2026-01-01T00:00:00Z", "Content-Length": str(len(block))}
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return b"WARC/1.0\r\n" + head.encode() + b"\r\n" + block + b"\r\n\r\n"


def response(body: bytes, kind: str = "text/html; charset=utf-8", status: str = "200 OK", **headers: str) -> bytes:
    named = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def page(number: int) -> bytes:
    return f"<html><p>page {number} ü</p></html>".encode() * (number + 1)


def as_warc(pages: list[bytes]) -> bytes:
    return b"".join(record("response", response(each)) for each in pages)


FILES: dict[str, bytes] = {
    "a.jsonl": "".join(json.dumps({"text": text, "url": "u", "id": 7}) + "\n" for text in TEXTS).encode(),
    "a.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "lines.json": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(),
    "a.csv": as_csv(TEXTS),
    "a.tsv": as_csv(TEXTS, "\t"),
    "a.parquet": as_parquet(TEXTS),
    "a.arrow": as_arrow(TEXTS),
    "a.warc": b"".join(record("conversion", text.encode(), Content_Type="text/plain") for text in TEXTS),
    "a.warc.wet": b"".join(record("conversion", text.encode(), Content_Type="text/plain") for text in TEXTS),
}
MARKED = ("utf-16", "utf-32", "utf-8-sig")


@pytest.mark.parametrize("name", FILES)
def test_a_format_gives_its_documents_plain_and_packed_and_what_is_whole_of_a_damaged_file(
    tmp_path: Path, name: str
) -> None:
    ids = None
    for suffix, pack in PACK.items():
        path = tmp_path / (name + suffix)
        packed = pack(FILES[name])
        path.write_bytes(packed)
        documents, losses = read(tmp_path)
        assert ([document.text for document in documents], losses) == (TEXTS, []), suffix
        places = [document.id.replace(suffix, "") for document in documents]
        ids = ids or places
        assert places == ids, "ids depend on the packing"
        assert ids[0].startswith(f"c/{name}#")
        if suffix:
            path.write_bytes(packed + packed + b"\0" * 9)
            if name in ("a.jsonl", "a.warc"):
                assert [document.text for document in read(path)[0]] == TEXTS * 2, (
                    "two streams in one file, and padding"
                )
            path.write_bytes(packed + b"garbage")
            assert [loss.reason for loss in read(path)[1] if loss.reason != "read.no_field"][-1:] == ["read.damaged"]
        for cut in (len(packed) - 1, len(packed) // 2, 30):
            path.write_bytes(packed[:cut])
            documents, losses = read(path)
            kept = [document.text for document in documents]
            assert kept == TEXTS[: len(kept)], (suffix, cut)
            whole = len(kept) == len(TEXTS) and not suffix and cut == len(packed) - 1
            assert losses or whole, (suffix, cut)
            assert {loss.reason for loss in losses} <= {
                "read.truncated",
                "read.damaged",
                "read.not_json",
                "read.not_csv",
                "read.no_field",
            }
        path.unlink()


@pytest.mark.parametrize("encoding", MARKED)
def test_text_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str) -> None:
    for name in ("a.jsonl", "a.csv", "a.txt.gz"):
        content = FILES.get(name, TEXTS[3].encode()).decode().encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        documents, losses = read(tmp_path / name, part_bytes=100)
        assert ([document.text for document in documents], losses) == (TEXTS if "txt" not in name else TEXTS[3:4], [])


LINE = st.text(st.sampled_from('a ü日\r"\\'), max_size=12)


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(LINE, max_size=12), part_bytes=st.integers(1, 90), last=st.booleans())
def test_splitting_changes_no_document_and_no_id(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], part_bytes: int, last: bool
) -> None:
    folder = tmp_path_factory.mktemp("split")
    rows = [json.dumps({"text": text}, ensure_ascii=False) if text != "a" else "" for text in texts]
    (folder / "a.jsonl").write_bytes("\n".join(rows).encode() + (b"\n" if last else b""))
    (folder / "b.parquet").write_bytes(as_parquet(texts))
    (folder / "c.arrow").write_bytes(as_arrow(texts))
    with (folder / "d.csv").open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(
            [["text", "n"], *([text, "1"] for text in texts)]
        )
    whole, split = read(folder), read(folder, part_bytes=part_bytes)
    assert split[0] == whole[0]
    assert reasons(split[1]) == reasons(whole[1])
    lost = sum(loss.times for loss in whole[1] if loss.is_document)
    assert len(whole[0]) + lost + rows.count("") == 4 * len(texts), "in = out + reasons"
    for name in ("b.parquet", "c.arrow", "d.csv"):
        found = [document.text for document in whole[0] if f"/{name}#" in document.id]
        assert found == [text.replace("\r\n", "\n") for text in texts if text.strip()]


def test_large_files_are_split_so_that_each_part_is_read_by_itself(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.parquet").write_bytes(as_parquet(texts, 10))
    (tmp_path / "c.arrow").write_bytes(as_arrow(texts, 10))
    how = ReadSettings()
    parts = find_parts("c", [str(tmp_path)], how, Account(), part_bytes=900)
    for name in ("a.jsonl", "b.parquet", "c.arrow"):
        mine = [part for part in parts if part.name == name]
        assert len(mine) > 5
        for part in mine:
            assert all(isinstance(found, Document) for found in read_part(part, how))
        assert sum(len(list(read_part(part, how))) for part in mine) == len(texts)


def test_a_line_too_large_is_passed_over_without_being_held(tmp_path: Path) -> None:
    def big(pack: Any) -> Iterator[bytes]:
        yield pack.compress(b'{"text": "before"}\n{"text": "')
        for _ in range(96):
            yield pack.compress(b"a" * (1 << 20))
        yield pack.compress(b'"}\n{"text": "after"}\n') + pack.flush()

    packers = {".zst": zstandard.ZstdCompressor().compressobj(), ".gz": zlib.compressobj(1, wbits=31)}
    for suffix, packer in packers.items():
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(big(packer)))
        tracemalloc.start()
        documents, losses = read(path, limit=1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [document.text for document in documents] == ["before", "after"]
        assert reasons(losses) == {"too_large": (1, "19")}
        assert peak < 40 << 20
    (tmp_path / "a.csv").write_bytes(as_csv(["before", "x" * 3000, "after"]))
    (tmp_path / "b.warc").write_bytes(as_warc([page(0), b"<html>" + b"x" * 300_000, page(1)]))
    (tmp_path / "c.warc.gz").write_bytes(
        gzip.compress(record("response", response(gzip.compress(b"<p>" * 10**6), Content_Encoding="gzip")))
    )
    for name, body in (("d.txt", b"x"), ("e.html", b"<"), ("f.jsonl", b'{"text": "' + b"x" * 2000 + b'"}')):
        (tmp_path / name).write_bytes(body * 2000 if len(body) == 1 else body)
    (tmp_path / "g.parquet").write_bytes(as_parquet(["before", "x" * 3000, "after"]))
    for name, kept in {
        "a.csv": 2,
        "b.warc": 2,
        "c.warc.gz": 0,
        "d.txt": 0,
        "e.html": 0,
        "f.jsonl": 0,
        "g.parquet": 2,
    }.items():
        documents, losses = read(tmp_path / name, limit=1000)
        assert (len(documents), reasons(losses)["too_large"][0]) == (kept, 1), name


def test_what_is_no_document_is_counted_with_its_reason_and_first_place(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"{not json",
        b"[1, 2]",
        b'{"other": "x"}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": "  "}',
        b"",
        b'{"text": "half \\ud83d"}',
        b'{"text": "pair \\ud83d\\ude00"}',
        b'{"text": "caf\xe9 na\xefve"}',
        '{"text": "one bad ü '.encode() + b'\xff"}',
        b"[" * 100_000,
        b'{"text": ' + b"1" * 5000 + b"}",
        b'{"text": "a\\r\\nb"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    documents, losses = read(tmp_path)
    assert [document.text for document in documents] == ["good", "half \ufffd", "pair 😀", "one bad ü \ufffd", "a\nb"]
    at = [sum(len(line) + 1 for line in lines[:number]) for number in range(len(lines))]
    assert reasons(losses) == {
        "not_json": (3, str(at[1])),
        "no_object": (1, str(at[2])),
        "no_field": (1, str(at[3])),
        "null": (1, str(at[4])),
        "not_text": (1, str(at[5])),
        "empty": (1, str(at[6])),
        "blank": (1, str(at[7])),
        "surrogate": (1, str(at[8])),
        "wrong_charset": (1, str(at[10])),
        "not_utf8": (1, str(at[11])),
        "crlf": (1, str(at[14])),
    }
    changed = {"read.blank", "read.surrogate", "read.not_utf8", "read.crlf"}
    assert {loss.reason for loss in losses if not loss.is_document} == changed
    assert len(documents) + sum(loss.times for loss in losses if loss.is_document) == len(lines) - 1, (
        "not the blank one"
    )


def test_a_binary_file_and_one_in_another_encoding_are_no_text(tmp_path: Path) -> None:
    contents = {
        "elf.txt": b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 20,
        "packed.txt": gzip.compress(b"text"),
        "nul.txt": "text".encode("utf-16-le") * 100,
        "latin.txt": "Größe für Äpfel".encode("latin-1"),
        "pickle.jsonl": b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x07\xff\xfe\xfd\x94.",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        documents, losses = read(tmp_path / name)
        assert (documents, reasons(losses)) == ([], {"wrong_charset" if name == "latin.txt" else "binary": (1, "0")}), (
            name
        )


def test_a_csv_row_of_other_length_and_a_quote_without_end_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,n\n"one\n""two""",1\nshort\n\nx\u2028y,2\n5" disk,3\n"never,3\nfound,4\n')
    documents, losses = read(tmp_path)
    assert [document.text for document in documents] == ['one\n"two"', "x\u2028y", '5" disk', "found"]
    assert reasons(losses) == {"not_csv": (1, "23"), "blank": (1, "29"), "damaged": (1, "48")}
    assert documents[-1].id.endswith("#57")
    content = b'text,n\nfirst,1\n"%b\n""%b""\n%b",2\nlast,3\n' % (b"x" * 40, b"y" * 3000, b"z")
    (tmp_path / "a.csv").write_bytes(content)
    for limit in (2000, 1000, 10):  # the row is held, its second line is not, no line is
        documents, losses = read(tmp_path, limit=limit)
        assert ([document.text for document in documents], reasons(losses)) == (
            ["first", "last"],
            {"too_large": (1, "15")},
        )


@pytest.mark.parametrize("suffix", list(PACK)[1:])
def test_a_csv_goes_on_after_damage_at_the_next_line_that_is_a_row(tmp_path: Path, suffix: str) -> None:
    pack = zstandard.ZstdCompressor(write_checksum=True).compress if suffix == ".zst" else PACK[suffix]
    rows = [f'"text {number}\n""quoted""",{number}\n'.encode() for number in range(40)]
    rows[22] = b"plain,22\n"
    members = [
        pack(b"text,n\n"),
        *(pack(b"".join(rows[start : start + 8])) for start in range(0, 40, 8)),
    ]
    members[2] = flipped(members[2], len(members[2]) // 2)
    path = tmp_path / f"a.csv{suffix}"
    path.write_bytes(b"".join(members))
    documents, losses = read(path)
    found = [document.text.split()[1] if "text" in document.text else "22" for document in documents]
    assert found == [*map(str, range(8)), *map(str, range(22, 40))], "the lines of text before row 22 are no rows"
    [loss] = losses
    place = 7 + sum(map(len, rows[:8]))
    assert (loss.reason, loss.place) == ("read.damaged", f"c/a.csv{suffix}#{place}")
    assert "12 lines passed over to the next row" in loss.detail
    assert len({document.id for document in documents}) == len(documents)
    path.write_bytes(b"".join([*members[:2], pack(b"".join(rows[8:16])), members[3][:-9]]))
    documents, losses = read(path)
    assert [loss.reason for loss in losses] == ["read.truncated"]
    assert len(documents) >= 16
    one = [pack(b"text\nfirst\n"), flipped(pack(b"second\n" * 99), 20), pack(b"third\n")]
    path.write_bytes(b"".join(one))
    documents, losses = read(path)
    assert [document.text for document in documents] == ["first"], "of one column any line is a row"
    assert [loss.reason for loss in losses] == ["read.damaged"]


def test_a_quote_that_never_ends_costs_its_row_alone(tmp_path: Path) -> None:
    rows = [f"text {number},{number}\n" for number in range(9)]
    rows[3] = '"never,3\n'
    rows[1] = '"of ""two""\nlines",6\n'
    (tmp_path / "a.csv").write_text("text,n\n" + "".join(rows))
    documents, losses = read(tmp_path)
    texts = [document.text for document in documents]
    assert texts == ["text 0", 'of "two"\nlines', *(f"text {number}" for number in (2, 4, 5, 6, 7, 8))]
    assert reasons(losses) == {"damaged": (1, str(7 + len("".join(rows[:3]))))}


def test_of_a_damaged_parquet_file_the_other_row_groups_are_read(tmp_path: Path) -> None:
    content = bytearray(as_parquet([f"text {number}" for number in range(100)], 10))
    offset = pq.ParquetFile(io.BytesIO(bytes(content))).metadata.row_group(4).column(0).data_page_offset
    content[offset + 2] ^= 255
    (tmp_path / "a.parquet").write_bytes(bytes(content))
    documents, losses = read(tmp_path)
    assert len(documents) == 90
    assert reasons(losses) == {"damaged": (10, "40")}
    (tmp_path / "a.parquet").write_bytes(as_parquet([1, 2, 3]))
    assert reasons(read(tmp_path)[1]) == {"not_text": (3, "0")}
    assert reasons(read(tmp_path, field="body")[1]) == {"no_field": (3, "0")}


def test_a_text_that_many_rows_share_is_held_once(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x" * 500_000] * 120}), tmp_path / "a.parquet")  # 60 MB; the file has 50 KB
    how = ReadSettings()
    (part,) = find_parts("c", [str(tmp_path)], how, Account())
    before = pa.total_allocated_bytes()
    for number, _ in enumerate(read_part(part, how)):
        if number % 40 == 0:
            assert pa.total_allocated_bytes() - before < 16 << 20
    assert number == 119


def chunked(body: bytes, size: int = 10) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x;ext=1\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


ENCODINGS: dict[str, tuple[dict[str, str], Callable[[bytes], bytes]]] = {
    "plain": ({}, bytes),
    "chunked": ({"Transfer_Encoding": "chunked"}, chunked),
    "gzip": ({"Content_Encoding": "gzip"}, gzip.compress),
    "x-gzip": ({"content_encoding": "X-GZIP"}, gzip.compress),
    "deflate": ({"Content_Encoding": "deflate"}, zlib.compress),
    "br": ({"Content_Encoding": "br"}, brotli.compress),
    "zstd": ({"Content_Encoding": "zstd"}, zstandard.compress),
    "chunked gzip": (
        {"Content_Encoding": "gzip", "Transfer_Encoding": "chunked"},
        lambda body: chunked(gzip.compress(body)),
    ),
    "said to be gzip": ({"Content_Encoding": "gzip"}, bytes),
    "said to be br": ({"Content_Encoding": "br"}, bytes),
    "said to be chunked": ({"Transfer_Encoding": "chunked"}, bytes),
}


@pytest.mark.parametrize("suffix", ["", ".gz", "members.gz", ".zst"])
def test_warc_pages_are_those_that_warcio_reads_whatever_their_encoding(tmp_path: Path, suffix: str) -> None:
    records = [record("warcinfo", b"software: x\r\n"), record("request", b"GET / HTTP/1.1\r\n\r\n")]
    expected = []
    for number, (headers, encode) in enumerate(ENCODINGS.values()):
        records.append(
            record("response", response(encode(page(number)), **headers), WARC_Target_URI=f"http://a/{number}")
        )
        expected.append((f"http://a/{number}", page(number)))
    content = b"".join(records)
    packed = {
        "": content,
        ".gz": gzip.compress(content),
        "members.gz": b"".join(map(gzip.compress, records)),
        ".zst": zstandard.compress(content),
    }[suffix]
    (tmp_path / f"a.warc{suffix.replace('members', '')}").write_bytes(packed)
    documents, losses = read(tmp_path)
    assert [(document.url, document.raw) for document in documents] == expected
    assert {document.charset for document in documents} == {"utf-8"}
    assert {name: count for name, (count, _) in reasons(losses).items()} == {"warcinfo_record": 1, "request_record": 1}
    offsets = [int(document.id.rpartition("#")[2]) for document in documents]
    assert all(content[offset:].startswith(b"WARC/1.0") for offset in offsets)
    if suffix in ("", "members.gz"):  # warcio reads no other, and neither zstd nor brotli as it is since 1.2
        unknown = ("br", "zstd", "X-GZIP")
        theirs = [
            (each.rec_headers.get_header("WARC-Target-URI"), each.content_stream().read())
            for each in ArchiveIterator(io.BytesIO(packed))
            if each.rec_type == "response" and each.http_headers.get_header("Content-Encoding") not in unknown
        ]
        known = [name not in ("br", "zstd", "said to be br", "x-gzip") for name in ENCODINGS]
        assert theirs == list(compress(expected, known))


def test_what_is_no_page_of_a_warc_is_counted(tmp_path: Path) -> None:
    html = "<html>x</html>"
    broken = gzip.compress(page(50))
    records = {
        "kept": record("response", response(page(1))),
        "http_error": record("response", response(b"gone", status="404 Not Found")),
        "not_html": record("response", response(b"%PDF-1.7", "application/pdf")),
        "sniffed": record("response", response(b"  <!DOCTYPE html><p>x", "")),
        "not_html 2": record("response", response(b"plain", "")),
        "not_html 3": record("response", b"1.2.3.4 a record of DNS", Content_Type="text/dns"),
        "undecodable": record("response", response(broken[:-20], Content_Encoding="gzip")),
        "undecodable 2": record("response", response(broken[:9] + b"\xff" * 40, Content_Encoding="gzip")),
        "undecodable 3": record("response", response(b"\x01\x02\x03", Content_Encoding="compress")),
        "undecodable 4": record("response", response(b"5\r\nhello\r\nnonsense", Transfer_Encoding="chunked")),
        "cut": record("response", response(broken[:-20], Content_Encoding="gzip"), WARC_Truncated="length"),
        "resource": record("resource", html.encode(), Content_Type="text/html"),
        "lines end in LF": record("response", b"HTTP/1.1 200 OK\nContent-Type: text/html\n\n<html>a\r\n\r\nb</html>"),
        "long head": record("response", response(b"<html>long</html>", X_Long="x" * 5000)),
        "revisit_record": record("revisit", b"HTTP/1.1 200 OK\r\n\r\n"),
        "segmented": record("response", response(page(1)), WARC_Segment_Number="1"),
        "empty": record("response", response(b" \r\n")),
    }
    (tmp_path / "a.warc").write_bytes(b"".join(records.values()))
    documents, losses = read(tmp_path)
    assert [document.raw[:20] for document in documents] == [
        page(1)[:20],
        b"  <!DOCTYPE html><p>x"[:20],
        page(50)[:20],
        html.encode()[:20],
        b"<html>a\r\n\r\nb</html>"[:20],
        b"<html>long</html>",
    ]
    names = list(records)
    place = {name: str(sum(map(len, list(records.values())[: names.index(name)]))) for name in names}
    assert reasons(losses) == {
        "http_error": (1, place["http_error"]),
        "not_html": (3, place["not_html"]),
        "undecodable": (4, place["undecodable"]),
        "cut_by_crawler": (1, place["cut"]),
        "revisit_record": (1, place["revisit_record"]),
        "segmented": (1, place["segmented"]),
        "empty": (1, place["empty"]),
    }


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


@pytest.mark.parametrize("suffix", list(PACK)[1:])
def test_of_a_file_of_several_members_a_damaged_one_alone_is_lost(tmp_path: Path, suffix: str) -> None:
    # Of many sizes, of text that does not pack; the third is larger than what is held until its check sum is known.
    large = {".gz": 7, ".zst": 7}.get(suffix, 5)
    texts = [random.Random(number).randbytes(40 * 4**number).hex() for number in (0, 1, large, 2, 3, 4)]
    pack = partial(zstandard.ZstdCompressor(write_checksum=True).compress) if suffix == ".zst" else PACK[suffix]
    for name in {".gz": ("a.warc", "a.jsonl", "a.lines"), ".zst": ("a.warc",)}.get(suffix, ("a.jsonl",)):
        contents = {
            "a.warc": [record("conversion", text.encode()) for text in texts],
            "a.jsonl": [json.dumps({"text": text}).encode() + b"\n" for text in texts],
            "a.lines": [text.encode() + b"\n" for text in texts],
        }[name]
        members = [pack(content) for content in contents]
        ends = [sum(map(len, members[: number + 1])) for number in range(len(members))]
        m, last = members, len(members[-1])
        cases: dict[str, tuple[bytes, list[int], list[str]]] = {
            "middle": (b"".join([*m[:3], flipped(m[3], len(m[3]) // 2), *m[4:]]), [3], ["damaged"]),
            "check sum": (b"".join([*m[:3], flipped(m[3], -6), *m[4:]]), [3], ["damaged"]),
            "large": (b"".join([*m[:2], flipped(m[2], len(m[2]) // 2), *m[3:]]), [2], ["damaged"]),
            "head": (b"".join([*m[:3], flipped(m[3], 1), *m[4:]]), [3], ["damaged"]),
            "first": (b"".join([flipped(m[0], 20), *m[1:]]), [0], ["damaged"]),
            "last": (b"".join([*m[:5], flipped(m[5], last // 2)]), [5], ["damaged"]),
            "two": (b"".join([m[0], flipped(m[1], 30), *m[2:4], flipped(m[4], 200), m[5]]), [1, 4], ["damaged"] * 2),
            "neighbours": (
                b"".join([*m[:3], flipped(m[3], 300), flipped(m[4], 300), m[5]]),
                [3, 4],
                ["damaged"] * 2,
            ),
            "garbage": (b"".join([*m[:3], b"no member \x1f\x8b\x08" * 9, *m[3:]]), [], ["damaged"]),
            "zeros": (b"".join([*m[:3], b"\0" * 3000, *m[3:]]), [], []),
            "cut within": (b"".join([*m[:3], m[3][:-9], *m[4:]]), [3], ["damaged"]),
            "cut": (b"".join(m)[: -last // 2], [5], ["truncated"]),
        }
        for case, (packed, lost, why) in cases.items():
            path = tmp_path / (name + suffix)
            path.write_bytes(packed)
            documents, losses = read(path, format="lines" if name == "a.lines" else None)
            # A line after damage may have begun in it; JSON tells whether.
            after = {number + 1 for number in lost if name == "a.lines" and number < 5} - set(lost)
            after |= {3} if (name, case) == ("a.lines", "garbage") else set()
            kept = [text for number, text in enumerate(texts) if number not in {*lost, *after}]
            assert [document.text for document in documents] == kept, (name, case)
            found = [loss.reason.removeprefix("read.") for loss in losses]
            assert found == sorted([*why, *["damaged"] * len(after)], key=found.index), (name, case)
            assert len({loss.place for loss in losses} | {document.id for document in documents}) == (
                len(losses) + len(documents)
            ), "no two have one place"
            if case in ("middle", "large"):
                assert f"packed bytes {ends[lost[0] - 1]:,} to {ends[lost[0]]:,} can't" in losses[0].detail


@pytest.mark.parametrize("suffix", list(PACK)[1:])
def test_members_without_content_hide_nothing(tmp_path: Path, suffix: str) -> None:
    """bgzip ends each file by one, which then stands between two that are joined."""
    path, pack = tmp_path / f"a.lines{suffix}", PACK[suffix]
    for members in (
        ["", "a"],
        ["a", "", "b"],
        ["", "", "a", ""],
        ["a", "", "", "", "b", "", ""],
        ["", ""],
        [*"ab", *[""] * 90, "c"],
    ):
        path.write_bytes(b"".join(pack(f"{each}\n".encode() if each else b"") for each in members))
        documents, losses = read(path, format="lines")
        assert [document.text for document in documents] == [each for each in members if each], members
        assert not losses, members


def cut_into(content: bytes, ends: list[int], pack: Callable[[bytes], bytes]) -> bytes:
    """Return a packed file whose members hold the content up to each end."""
    bounds = [0, *ends, len(content)]
    return b"".join(pack(content[start:stop]) for start, stop in pairwise(bounds))


@pytest.mark.parametrize("suffix", list(PACK)[1:])
def test_slices_of_a_packed_file_give_its_documents_and_ids(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(3)
    texts = [" ".join(draw.choices(("boat", "hull", "sâil", "mast"), k=draw.randint(1, 60))) for _ in range(60)]
    contents = {
        "a.jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode(),
        "a.warc": b"".join(record("conversion", text.encode() + b"\r\n\r\n") for text in texts),
        "a.lines": "\r\n".join([*texts[:30], "", *texts[30:]]).encode(),  # without a line end
    }
    for name, content in contents.items():
        path, format = tmp_path / (name + suffix), "lines" if name == "a.lines" else None
        aligned = [match.end() for match in re.finditer(rb"\r\n\r\n(?=WARC)" if name == "a.warc" else b"\n", content)]
        for ends in (
            aligned,
            aligned[::9],
            sorted(draw.sample(range(len(content)), 40)),
            list(range(0, len(content), 97)),
        ):
            path.write_bytes(cut_into(content, ends, PACK[suffix]))
            [whole] = find_parts("c", [str(path)], ReadSettings(), Account(), format=format)
            expected = list(read_part(whole, ReadSettings()))
            assert len(expected) >= 60
            for size in (1, 3000):
                slices = find_slices(whole, size)
                assert len(slices) > 2, (name, size)
                parts = [replace(whole, **each._asdict()) for each in slices]
                found = [list(read_part(part, ReadSettings())) for part in parts]
                documents = [each for few in found for each in few if isinstance(each, Document)]
                assert documents == [each for each in expected if isinstance(each, Document)], (name, size)
                losses = [each for few in found for each in few if isinstance(each, Loss)]
                assert reasons(losses) == reasons([each for each in expected if isinstance(each, Loss)])
                assert all(few for few in found[:-1]), "none is read for nothing"
        assert find_slices(replace(whole), 10**6) == []


def test_a_packed_file_that_has_to_be_read_in_one_piece_has_no_slices(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {number}"}).encode() + b"\n" for number in range(50)]
    path = tmp_path / "a.jsonl.gz"
    marked = ("\ufeff" + b"".join(lines).decode()).encode("utf-16-le")
    members = [gzip.compress(line) for line in lines]
    for packed in (
        gzip.compress(b"".join(lines)),
        cut_into(marked, list(range(0, 900, 30)), gzip.compress),
        b"".join([*members[:20], flipped(members[20], 15), *members[21:]]),
        b"".join(members)[:-3],
        b"",
    ):
        path.write_bytes(packed)
        part = Part("c", str(path), "a", "jsonl", ".gz")
        assert find_slices(part, 100) == []
    path.write_bytes(b"".join(members))
    assert len(find_slices(part, 100)) > 9
    with pytest.raises(OSError, match="changed since its work was laid out"):
        find_slices(replace(part, stamp="of before"), 100)


def test_a_web_archive_with_a_wrong_length_loses_that_record_alone(tmp_path: Path) -> None:
    pages = [page(0), page(10_000), page(1), page(2)]
    records, path = [record("response", response(each)) for each in pages], tmp_path / "a.warc"
    size = int(re.search(rb"Content-Length: (\d+)", records[1])[1])  # type: ignore[index]
    starts = [sum(map(len, records[:number])) for number in range(4)]
    for wrong in ("-1", "x", "", str(size - 7), str(size + 9), str(size + 400), "99999", "9" * 12):
        damaged = records[1].replace(b"Length: %d" % size, f"Length: {wrong}".encode())
        for limit in (10 << 20, 1000):  # the block is held; it is passed over
            path.write_bytes(records[0] + damaged + b"".join(records[2:]))
            documents, losses = read(path, limit=limit)
            assert [document.raw for document in documents] == [pages[0], *pages[2:]], (wrong, limit)
            assert reasons(losses) == {"damaged": (1, str(starts[1]))}, (wrong, limit)
    path.write_bytes(b"".join(records[:3]) + records[3][:-30])
    assert reasons(read(path)[1]) == {"truncated": (1, str(starts[3]))}


def test_a_warc_cut_anywhere_loses_only_its_last_record_and_garbage_only_itself(tmp_path: Path) -> None:
    records = [record("response", response(page(number))) for number in range(3)]
    ends = [sum(map(len, records[: number + 1])) for number in range(3)]
    content, path = b"".join(records), tmp_path / "a.warc"
    for cut in range(1, len(content), 7):
        path.write_bytes(content[:cut])
        documents, losses = read(path)
        whole = sum(end - 4 <= cut for end in ends)
        assert [document.raw for document in documents] == [page(number) for number in range(whole)], cut
        inside = cut > (ends[whole - 1] if whole else 0)
        assert [loss.reason for loss in losses] == (["read.truncated"] if inside else []), cut
    path.write_bytes(records[0] + b"garbage \xff" * 9000 + b"\r\n" + records[1] + b"\r\n\r\n\r\n" + records[2])
    documents, losses = read(path)
    assert len(documents) == 3
    assert reasons(losses) == {"damaged": (1, str(ends[0]))}
    path.write_bytes(records[0].replace(b"Content-Length: ", b"Content-Length: x") + records[1])
    documents, losses = read(path)
    assert (len(documents), reasons(losses)) == (1, {"damaged": (1, "0")})
    heads = (each.partition(b"\r\n\r\n") for each in records)
    path.write_bytes(b"".join(head.replace(b"\r", b"") + b"\n\n" + rest for head, _, rest in heads))
    documents, losses = read(path)
    assert ([document.raw for document in documents], losses) == ([page(0), page(1), page(2)], [])


def test_damaged_bytes_of_any_file_are_documents_and_losses(tmp_path: Path) -> None:
    """Damaged offsets let pyarrow end the process, and damaged names raised errors of other kinds."""
    source, files = random.Random(0), list(FILES.items())
    for number in range(400):
        name, content = source.choice(files) if number % 3 else ("a.arrow", FILES["a.arrow"])
        suffix = source.choice([*PACK]) if number % 3 else ""
        damaged = bytearray(PACK[suffix](content))
        for _ in range(source.randint(1, 6)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        if number % 5 == 0:
            del damaged[source.randrange(len(damaged)) :]
        (tmp_path / (name + suffix)).write_bytes(bytes(damaged) or b"x")
        documents, losses = read(tmp_path / (name + suffix), part_bytes=source.choice((100, 1 << 20)))
        assert documents or losses


def test_sources_are_found_in_order_and_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a.jsonl",
        "sub/a.jsonl",
        "notes.md",
        ".hidden.txt",
        "model.pt",
        "model.bin",
        "empty.txt",
        "x.HTML.ZST",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if "empty" in name else b'{"text": "x"}')
    account = Account()
    sources = [str(tmp_path), str(tmp_path / "*.txt"), f"file://{tmp_path}/sub", str(tmp_path / "sub" / "a.jsonl")]
    parts = find_parts("c", sources, ReadSettings(), account)
    assert [part.name for part in parts] == ["a.jsonl", "b.txt", "sub/a.jsonl", "x.HTML.ZST"]
    assert [(part.format, part.compression) for part in parts[2:]] == [("jsonl", ""), ("html", ".zst")]
    counts = {name: notice.count for name, notice in account.noticed.items()}
    assert counts == {"other_kind": 2, "hidden": 1, "pickle": 1, "empty_file": 2, "twice": 3}
    (same,) = (
        part
        for part in find_parts("c", [sources[3], str(tmp_path)], ReadSettings(), Account())
        if part.name == "a.jsonl~2"
    )
    assert same.file == str(tmp_path / "a.jsonl"), "each name stands for one file"
    named = find_parts("c", [str(tmp_path / "notes.md")], ReadSettings(), Account(), format="lines")
    assert [(part.format, part.name) for part in named] == [("lines", "notes.md")]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("gone.jsonl", r"data\.corpora\.c\.source '.*gone\.jsonl' does not exist"),
        ("a.md", "is not a"),
        ("model.pkl", "is a pickle, which can run code; convert it to .jsonl or .parquet"),
        ("*.md", r"holds no \.warc, .*passed over 1 file of another kind"),
        ("ftp9://x/y", "ftp9.*; install its driver, or copy"),
        ("memory://gone/*.txt", "does not exist"),
    ],
)
def test_a_source_that_cant_be_used_is_a_sentence_before_the_work(tmp_path: Path, source: str, sentence: str) -> None:
    for name in ("a.md", "model.pkl"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=sentence):
        read(source if "://" in source else tmp_path / source)


def test_a_wrong_text_field_is_told_before_the_work(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "a.csv", "a.arrow"):
        (tmp_path / name).write_bytes(FILES[name])
        how = ReadSettings("body")
        parts = find_parts("c", [str(tmp_path / name)], how, Account())
        with pytest.raises(DataError, match=rf"c/{name}#0: no .*'body' among text.*; set data\.corpora\.c\.text_field"):
            check_first(parts, how)
        check_first(parts, ReadSettings())


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(FILES["a.parquet"])
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pyarrow; run pip install 'trimaran\[data\]'"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"pip install 'trimaran\["):
        read("s3://bucket/key")


def test_only_the_arrow_files_that_datasets_lists_are_read(tmp_path: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "data-00000-of-00002.arrow"):
        (tmp_path / name).write_bytes(FILES["a.arrow"])
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (tmp_path / "dataset_info.json").write_text("{}")
    account = Account()
    (part,) = find_parts("c", [str(tmp_path)], ReadSettings(), account)
    assert part.name == "data-00000-of-00001.arrow"
    assert {name: notice.count for name, notice in account.noticed.items()} == {"unlisted": 1}


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_remote_files_are_read_as_local_ones_are(tmp_path: Path, memory: Any) -> None:
    for name, content in FILES.items():
        for folder in (tmp_path / "in", None):
            if folder:
                folder.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
            else:
                memory.pipe(f"/bucket/in/{name}", content)
    memory.pipe("/bucket/in/.hidden/x.txt", b"x")
    memory.pipe("/bucket/in/notes.md", b"x")
    local = read(tmp_path / "in", part_bytes=200)
    assert read("memory://bucket/in", part_bytes=200) == local
    assert len(local[0]) == len(FILES) * len(TEXTS)
    assert [d.id for d in read("memory://bucket/*/a.*sv")[0]] == [
        f"c/in/a.{suffix}#{place}"
        for suffix in ("csv", "tsv")
        for place in [d.id.rpartition("#")[2] for d in local[0] if d.id.startswith(f"c/a.{suffix}#")]
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow", "a.warc.gz", "a.jsonl.zst"])
def test_a_remote_file_that_is_gone_midway_is_an_error_to_try_again(
    memory: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    texts = [random.Random(number).randbytes(40_000).hex() for number in range(40)]
    content = {
        "jsonl": lambda: "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(),
        "parquet": lambda: as_parquet(texts, 4),
        "arrow": lambda: as_arrow(texts, 4),
        "warc": lambda: as_warc([text.encode() for text in texts]),
    }[name.split(".")[1]]()
    suffix = f".{name.split('.')[2]}" if name.count(".") == 2 else ""
    memory.pipe(f"/bucket/{name}", PACK[suffix](content))
    how = ReadSettings()
    (part,) = find_parts("c", [f"memory://bucket/{name}"], how, Account())
    reads: list[int] = []
    file = type(memory.open(f"/bucket/{name}"))
    read_before = file.read

    def gone(self: Any, size: int = -1) -> bytes:
        reads.append(size)
        if sum(size for size in reads if size > 0) > 700_000:
            raise RuntimeError("NoSuchKey")
        return bytes(read_before(self, size))

    monkeypatch.setattr(file, "read", gone)
    with pytest.raises(OSError, match="NoSuchKey") as error:
        list(read_part(part, how))
    assert error.value.filename == f"memory:///bucket/{name}"
    assert error.value.errno is not None


def test_a_file_that_changed_since_it_was_found_is_refused(tmp_path: Path, memory: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    memory.pipe("/bucket/a.txt", b"text")
    how = ReadSettings()
    for source, change in (
        (str(path), path.write_text),
        ("memory://bucket/a.txt", lambda text: memory.pipe("/bucket/a.txt", text.encode())),
    ):
        (part,) = find_parts("c", [source], how, Account())
        change("text that is longer")
        with pytest.raises(OSError, match="has changed since its work was laid out"):
            list(read_part(part, how))


def test_s3_is_read_from_a_server_and_an_object_gone_midway_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.server import ThreadedMotoServer  # takes a second

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("bucket")
        for name in ("a.jsonl", "a.parquet", "a.warc"):
            system.pipe(f"bucket/in/{name}", FILES[name])
        fsspec.filesystem("s3").invalidate_cache()
        documents, losses = read("s3://bucket/in", part_bytes=100)
        assert ([document.text for document in documents], losses) == (TEXTS * 3, [])
        how = ReadSettings()
        monkeypatch.setattr("trimaran.runtime.data.readers.streams._FETCH_BYTES", 1 << 16)
        for change in (system.rm, lambda file: system.pipe(file, b"x" * (1 << 20))):
            system.pipe("bucket/b.jsonl", b'{"text": "x"}\n' * 80_000)
            (part,) = find_parts("c", ["s3://bucket/*.jsonl"], how, Account())
            found = read_part(part, how)
            assert isinstance(next(found), Document)
            change("bucket/b.jsonl")
            with pytest.raises(OSError) as error:  # noqa: PT011 - the server's own words
                list(found)
            assert error.value.filename == "s3://bucket/b.jsonl"
            with pytest.raises(OSError, match=r"No such file|has changed since"):
                list(read_part(part, how))
    finally:
        server.stop()


def test_the_formats_of_the_spec_are_those_of_the_readers() -> None:
    assert get_args(Format) == FORMATS


def test_the_benchmark_finds_that_warcio_and_we_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    benchmark = import_module("data_readers")
    benchmark.make_archive(tmp_path / "a.warc.gz", 20, 0)
    seconds, pages, size = benchmark.measure(tmp_path / "a.warc.gz", 1)
    assert (set(seconds), pages, size > 100_000) == ({"warcio", "trimaran"}, 20, True)
