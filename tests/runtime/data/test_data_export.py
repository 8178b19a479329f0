"""Exported files are read by megatron-core, `datasets` and our own readers, and theirs by ours."""

import errno
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from trimaran.runtime.data.account import Account, table_of
from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.export import documents_of_shards, export_documents, export_megatron
from trimaran.runtime.data.files import DataError, hash_file
from trimaran.runtime.data.prepare import open_prepared, prepare
from trimaran.runtime.data.readers.part import ReadSettings
from trimaran.runtime.data.readers.parts import find_parts
from trimaran.runtime.data.readers.read import read_part
from trimaran.runtime.data.tokens.shards import ShardWriter, TokenShards
from trimaran.runtime.data.tokens.tokenizer import Tokenizer

TEXTS = ["first\nline", 'with "quotes"', "日本語 " * 300, "\u2028 and \\u0041", "last"]


def documents() -> Iterator[Document]:
    for number, text in enumerate(TEXTS):
        yield Document(
            f"c/a#{number}", text, url=f"http://a/{number}", corpus="c", language="en", fields={"score": 0.5}
        )


def read(source: Path, part_bytes: int = 64 << 20) -> tuple[list[Document], list[Loss]]:
    parts = find_parts("c", [str(source)], ReadSettings(), Account(), part_bytes=part_bytes)
    found = [each for part in parts for each in read_part(part, ReadSettings())]
    return [each for each in found if isinstance(each, Document)], [each for each in found if isinstance(each, Loss)]


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> Any:
    """megatron-core's indexed_dataset.py. The package itself would import 4 s of what that file does not use."""
    found = find_spec("megatron")
    assert found is not None
    assert found.submodule_search_locations is not None
    core, utils = ModuleType("megatron.core"), ModuleType("megatron.core.utils")
    core.__path__ = [f"{next(iter(found.submodule_search_locations))}/core"]
    utils.log_single_rank = lambda *_, **__: None  # type: ignore[attr-defined]
    for module in (core, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return import_module("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("format", ["jsonl.zst", "parquet"])
def test_exported_documents_are_read_by_datasets_and_by_us(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = export_documents(documents(), tmp_path / "out", format, file_bytes=1000)
    assert [(file.path.name, file.documents) for file in files] == [
        (f"documents-00000.{format}", 3),
        (f"documents-00001.{format}", 2),
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [file.path.name for file in files]
    assert [(file.bytes, file.sha256) for file in files] == [
        (file.path.stat().st_size, hash_file(file.path)) for file in files
    ]
    assert [file.sha256 for file in export_documents(documents(), tmp_path / "again", format, file_bytes=1000)] == [
        file.sha256 for file in files
    ]
    found, losses = read(tmp_path / "out")
    assert ([document.text for document in found], losses) == (TEXTS, [])
    assert [document.url for document in found] == [f"http://a/{number}" for number in range(5)]
    assert [document.fields["id"] for document in found] == [f"c/a#{number}" for number in range(5)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    theirs = datasets.load_dataset(
        {"jsonl.zst": "json", "parquet": "parquet"}[format],
        data_files=[str(file.path) for file in files],
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert list(theirs["text"]) == TEXTS
    assert list(theirs["language"]) == ["en"] * 5
    theirs.save_to_disk(tmp_path / "saved", num_shards=2)
    assert [document.text for document in read(tmp_path / "saved")[0]] == TEXTS
    assert [document.text for document in read(tmp_path / "saved", part_bytes=1)[0]] == TEXTS


def test_of_no_documents_an_empty_file_is_exported(tmp_path: Path) -> None:
    for format in ("jsonl.zst", "parquet"):
        (file,) = export_documents([], tmp_path, format)
        assert file.documents == 0
        assert read(file.path) == ([], [])


TOKENS = [np.array([1, 2, 3]), np.array([], dtype=np.int64), np.array([65499]), np.arange(1000)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499 + 1, np.int32), (65499, np.uint16), (100_000, np.int32)])
def test_exported_tokens_are_those_that_megatron_core_writes_and_reads(
    tmp_path: Path, megatron: Any, vocab_size: int, dtype: type
) -> None:
    tokens = [np.minimum(each, vocab_size - 1) for each in TOKENS]
    assert megatron.DType.optimal_dtype(vocab_size) is dtype
    files = export_megatron(iter(tokens), tmp_path / "ours", vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in tokens:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for file, name in zip(files, ("theirs.bin", "theirs.idx"), strict=True):
        assert file.path.suffix == Path(name).suffix
        assert file.sha256 == hash_file(tmp_path / name), "the same bytes"
    dataset = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[number].tolist() for number in range(len(dataset))] == [each.tolist() for each in tokens]
    del dataset


def test_tokens_of_megatron_core_are_read_and_split(tmp_path: Path, megatron: Any) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    for number in range(50):  # documents of several sequences
        builder.add_document(np.arange(number * 3 + 1), [number, number * 2 + 1])
    builder.finalize(str(tmp_path / "a.idx"))
    whole, losses = read(tmp_path)
    assert losses == []
    assert [document.fields["tokens"].tolist() for document in whole] == [list(range(n * 3 + 1)) for n in range(50)]
    split, _ = read(tmp_path, part_bytes=1000)
    assert [(each.id, each.fields["tokens"].tolist()) for each in split] == [
        (each.id, each.fields["tokens"].tolist()) for each in whole
    ]
    content, index = (tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.bin").write_bytes(content[:6000])
    found, (loss,) = read(tmp_path)
    assert (len(found) + loss.times, loss.reason, loss.place) == (50, "read.truncated", f"c/a.bin#{len(found)}")
    (tmp_path / "a.bin").write_bytes(content)
    for damaged, reason in (
        (index[:-9], "truncated"),
        (b"x" + index, "damaged"),
        (index[:17] + b"\x07" + index[18:], "damaged"),
    ):
        (tmp_path / "a.idx").write_bytes(damaged)
        assert [loss.reason for loss in read(tmp_path)[1]] == [f"read.{reason}"]
    (tmp_path / "a.idx").write_bytes(index[:42] + b"\xff" * 4 + index[46:])
    assert [loss.reason for loss in read(tmp_path)[1]] == ["read.damaged"]


def test_documents_are_cut_out_of_token_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimaran.runtime.data.export._READ_TOKENS", 7)
    expected = [[1, 2, 0], [0], [*range(1, 30), 0], [5, 6]]
    with ShardWriter(tmp_path, "train", "uint16", tokens_per_shard=10) as writer:
        for document in expected:
            writer.write(document)
        shards = TokenShards(tmp_path, "train", "uint16", writer.close())
    assert [document.tolist() for document in documents_of_shards(shards, 0)] == expected
    export_megatron(documents_of_shards(shards, 0), tmp_path / "out", 100)
    assert [document.fields["tokens"].tolist() for document in read(tmp_path / "out.bin")[0]] == expected


def test_what_cant_be_exported_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OverflowError, match="document 1 has token ids from 7 to 100, and the vocabulary 100"):
        export_megatron([np.array([1]), np.array([7, 100])], tmp_path / "a", 100)
    with pytest.raises(OverflowError, match="from -1 to -1"):
        export_megatron([np.array([-1])], tmp_path / "a", 100)

    def broken() -> Iterator[Document]:
        yield from documents()
        raise OSError(errno.ENOSPC, "No space left on device")

    for format in ("jsonl.zst", "parquet"):
        with pytest.raises(OSError, match=f"documents-00000.{format}"):
            export_documents(broken(), tmp_path, format)
    assert list(tmp_path.iterdir()) == []


def test_a_pair_of_megatron_is_a_source_of_its_own(tmp_path: Path, megatron: Any) -> None:
    """Its documents go to the shards as they are, each with an end-of-text token, and its tokenizer must be named."""
    Tokenizer.train(["the quick brown fox"] * 9, 300).save(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    eot = tokenizer.eot_id
    plain = [[tokenizer.vocab_size - 1, *(each for each in range(number) if each != eot)] for number in range(1, 200)]
    documents = [each + [eot] * (number % 2) for number, each in enumerate(plain)]
    (tmp_path / "texts").mkdir()
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "texts" / "a.bin"), dtype=np.uint16)
    for each in [*documents[:5], [], *documents[5:]]:
        builder.add_document(np.array(each), [len(each)])
    builder.finalize(str(tmp_path / "texts" / "a.idx"))
    settings: dict[str, Any] = {"cache_dir": tmp_path / "cache", "tokenizer_file": tmp_path / "tokenizer.json"}

    def kept(*sources: str, **changes: Any) -> list[list[int]]:
        prepared = prepare(list(sources), **{**settings, **changes})
        assert prepared.account.totals["documents"] == len(documents)
        splits = (prepared.train, prepared.held_out)
        shards = [shards.read(0, shards.num_tokens).tolist() for shards in splits if shards.num_tokens]
        assert len(shards) == 2 - (changes.get("held_out_fraction") == 0)
        tokens = np.array([token for split in shards for token in split])
        return [each[:-1].tolist() for each in np.split(tokens, np.flatnonzero(tokens == eot) + 1)[:-1]]

    assert kept(str(tmp_path / "texts" / "a"), held_out_fraction=0) == plain
    for name in ("texts", "texts/a.idx", "texts/a.bin", "texts/*"):
        assert sorted(kept(str(tmp_path / name), held_out_fraction=0.1)) == sorted(plain), name
    table = table_of(prepare([str(tmp_path / "texts")], **settings).manifest)
    assert "1 empty document" in table
    assert ".idx" not in table, "it belongs to its .bin"
    with pytest.raises(DataError, match=r"a\.bin, document 1 has token ids and no text.*data\.tokenizer"):
        prepare([str(tmp_path / "texts")], cache_dir=tmp_path / "cache")
    Tokenizer.train(["ab"] * 9, 258).save(tmp_path / "small.json")
    small = Tokenizer.load(tmp_path / "small.json").vocab_size
    with pytest.raises(DataError, match=rf"has the token \d+, and data\.tokenizer only {small}"):
        prepare([str(tmp_path / "texts")], **{**settings, "tokenizer_file": tmp_path / "small.json"})
    (tmp_path / "texts" / "a.bin").write_bytes((tmp_path / "texts" / "a.bin").read_bytes()[:999])
    with pytest.raises(DataError, match=r"a\.bin, document \d+: the \.bin has 999 bytes.* write the \.bin and"):
        prepare([str(tmp_path / "texts")], **settings)
    (tmp_path / "texts" / "a.idx").unlink()
    with pytest.raises(DataError, match=r"or Megatron's \.bin with its \.idx"):
        prepare([str(tmp_path / "texts" / "a.bin")], **settings)


@pytest.mark.parametrize(
    ("dtype", "ends", "is_linked"), [("u2", True, True), ("i4", True, False), ("u2", False, False)]
)
def test_a_pair_that_is_a_shard_already_is_linked_and_not_copied(
    tmp_path: Path, megatron: Any, dtype: str, ends: bool, is_linked: bool
) -> None:
    Tokenizer.train(["the quick brown fox"] * 9, 300).save(tmp_path / "tokenizer.json")
    eot = Tokenizer.load(tmp_path / "tokenizer.json").eot_id
    whole = [np.array([5, *range(10, 10 + number), eot]) for number in range(50)]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.dtype(dtype).type)
    for each in whole:
        document = each if ends else each[:-1]
        builder.add_document(document, [1, len(document) - 1])
    builder.finalize(str(tmp_path / "a.idx"))
    settings: dict[str, Any] = {"cache_dir": tmp_path / "cache", "tokenizer_file": tmp_path / "tokenizer.json"}
    prepared = prepare([str(tmp_path / "a")], **settings, held_out_fraction=0)
    assert prepared.train.read(0, prepared.train.num_tokens).tolist() == np.concatenate(whole).tolist()
    assert prepared.held_out.num_tokens == 0
    (shard,) = prepared.folder.glob("train-*.bin")
    assert shard.is_symlink() == is_linked
    (tmp_path / "a.bin").unlink()
    if is_linked:
        with pytest.raises(DataError, match="delete the folder"):
            open_prepared(prepared.folder)
    else:
        open_prepared(prepared.folder)
