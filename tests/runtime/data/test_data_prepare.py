"""Preparing a corpus: one folder per content, the same from every process, with everything counted."""

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from trimaran.runtime.data.account import table_of
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.prepare import PreparedData, open_prepared, prepare, prepare_data
from trimaran.runtime.data.tokens.build import Digests
from trimaran.runtime.data.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from trimaran.runtime.spec import RunSpec


def write_corpus(folder: Path, count: int = 60) -> Path:
    rows = [
        {"text": f"Document {index} says that the cat number {index % 7} sat on the mat.\n" * (1 + index % 3)}
        for index in range(count)
    ]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared_from(folder: Path, **changes: Any) -> PreparedData:
    source = changes.pop("source", None) or str(write_corpus(folder))
    settings: dict[str, Any] = {"cache_dir": folder / "cache", "vocab_size": 300, "held_out_fraction": 0.2, "seed": 7}
    return prepare([source], **{**settings, **changes})


def texts_of(prepared: PreparedData, split: str) -> list[str]:
    shards = getattr(prepared, split)
    text = prepared.tokenizer.decode(shards.read(0, shards.num_tokens).tolist())
    return text.split(prepared.tokenizer.eot_token)


def test_both_splits_together_hold_every_document_exactly_once(tmp_path: Path) -> None:
    prepared = prepared_from(tmp_path)
    train, held_out = texts_of(prepared, "train"), texts_of(prepared, "held_out")
    # Every document is closed by an end-of-text token, so the last piece is empty.
    assert (train.pop(), held_out.pop()) == ("", "")
    expected = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert sorted(train + held_out) == sorted(expected)
    assert 3 <= len(held_out) <= 25


def test_the_manifest_counts_everything(tmp_path: Path) -> None:
    path = write_corpus(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"text": " "}\n\n{"text": "bad \xff byte"}\n')
    prepared = prepared_from(tmp_path, source=str(path))
    manifest, corpus, splits = prepared.manifest, prepared.manifest["corpus"], prepared.manifest["splits"]
    assert (corpus["documents"], corpus["units"]) == (61, 61)
    assert {name: notice["count"] for name, notice in corpus["noticed"].items()} == {
        "empty": 1,
        "blank": 1,
        "not_utf8": 1,
    }
    for key in ("units", "characters", "bytes"):
        assert splits["train"][key] + splits["held_out"][key] == corpus[key]
    assert splits["train"]["tokens"] == prepared.train.num_tokens
    assert manifest["tokenizer"]["vocab_size"] == prepared.tokenizer.vocab_size
    assert manifest["tokenizer"]["requested_vocab_size"] == 300
    assert manifest["source"]["quickstart"] is None


def test_sections_of_a_document_are_parted_only_where_one_is_missing(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {index}. " + f"word{index} " * 1500 + "\n\n" for index in range(40)]
    path = tmp_path / "book.txt"
    path.write_text("".join(paragraphs))
    prepared = prepared_from(tmp_path, source=str(path))
    units = prepared.manifest["corpus"]["units"]
    assert prepared.manifest["corpus"]["documents"] == 1
    assert units > 8
    train, held_out = texts_of(prepared, "train"), texts_of(prepared, "held_out")
    assert sum(map(len, train + held_out)) == len("".join(paragraphs))
    assert len(train) - 1 < prepared.manifest["splits"]["train"]["units"]
    assert all(piece in "".join(paragraphs) for piece in train + held_out)


def test_the_second_call_reuses_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared_from(tmp_path)
    monkeypatch.setattr(Tokenizer, "train", None)
    moved = (tmp_path / "corpus.jsonl").rename(tmp_path / "moved.jsonl")
    second = prepared_from(tmp_path, source=str(moved))
    assert second.folder == first.folder
    assert second.manifest["source"]["named"] == [str(moved)]


def test_text_and_every_setting_that_matters_change_the_folder(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"seed": 8}, {"vocab_size": 301}, {"held_out_fraction": 0.3}]
    folders = [prepared_from(tmp_path, **change).folder for change in changes]
    folders.append(prepared_from(tmp_path, source=str(write_corpus(tmp_path, 61))).folder)
    assert len(set(folders)) == 5


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (prepared_from(tmp_path, cache_dir=tmp_path / name).folder for name in ("one", "two"))
    names = sorted(path.name for path in first.iterdir())
    assert names == ["held_out-00000.bin", "manifest.json", "tokenizer.json", "train-00000.bin"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_two_processes_at_once_agree(tmp_path: Path) -> None:
    source = write_corpus(tmp_path)
    code = (
        "import sys; from pathlib import Path; from trimaran.runtime.data.prepare import prepare\n"
        "print(prepare([sys.argv[1]], cache_dir=Path(sys.argv[2]), vocab_size=300).folder)\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(folders) == 1
    # No temporary folder is left behind.
    assert [path.name for path in (tmp_path / "cache" / "data").iterdir()] == [Path(folders.pop()).name]


def test_the_tokenizer_learns_from_the_training_split_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train = Tokenizer.train

    def record(texts: Any, vocab_size: int, **options: Any) -> Tokenizer:
        seen.extend(texts)
        return train(seen, vocab_size, **options)

    monkeypatch.setattr(Tokenizer, "train", record)
    prepared = prepared_from(tmp_path)
    assert seen == texts_of(prepared, "train")[:-1]


def test_an_existing_tokenizer_is_used_and_copied(tmp_path: Path) -> None:
    Tokenizer.train(["mat mat cat cat"] * 5, 280).save(tmp_path / "mine.json")
    prepared = prepared_from(tmp_path, tokenizer_file=tmp_path / "mine.json")
    record = prepared.manifest["tokenizer"]
    assert (record["loaded_from"], record["trained_on"]) == (str(tmp_path / "mine.json"), None)
    assert prepared.tokenizer.encode("mat cat") == Tokenizer.load(tmp_path / "mine.json").encode("mat cat")


def test_another_end_of_text_is_another_corpus(tmp_path: Path) -> None:
    Tokenizer.train(["mat mat cat cat"] * 5, 280).save(tmp_path / "mine.json")
    inner = (tmp_path / "mine.json").read_text().replace("<|endoftext|>", "<end>")
    (tmp_path / "mine.json").write_text(inner)
    with pytest.raises(DataError, match=r"name the token in data\.end_of_text"):
        prepared_from(tmp_path, tokenizer_file=tmp_path / "mine.json")
    ends = [prepared_from(tmp_path, tokenizer_file=tmp_path / "mine.json", end_of_text=end) for end in ("<end>", "z")]
    assert ends[0].folder != ends[1].folder
    for end, prepared in zip(("<end>", "z"), ends, strict=True):
        again = open_prepared(prepared.folder)
        assert again.tokenizer.eot_token == again.manifest["tokenizer"]["eot_token"] == end
        assert again.train.read(again.train.num_tokens - 1, 1).tolist() == [again.tokenizer.id_of(end)]


def test_a_held_out_fraction_of_zero_leaves_that_split_empty(tmp_path: Path) -> None:
    prepared = prepared_from(tmp_path, held_out_fraction=0.0)
    assert prepared.held_out.num_tokens == 0
    assert prepared.manifest["splits"]["held_out"]["shards"] == []


def test_one_indivisible_document_holds_nothing_out_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "one.txt").write_text("aSingleWord")
    assert prepared_from(tmp_path, source=str(tmp_path / "one.txt")).held_out.num_tokens == 0
    assert "nothing is held out" in caplog.text


def test_a_tokenizer_smaller_than_asked_for_is_recorded_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        prepared = prepared_from(tmp_path, vocab_size=5000)
    assert prepared.tokenizer.vocab_size == prepared.manifest["tokenizer"]["vocab_size"] < 1000
    assert "fewer than the 5000 asked for" in caplog.text


def test_json_lines_of_blank_lines_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"blank\.jsonl holds no text: left out 2 blank lines between JSON lines; name"):
        prepare([str(tmp_path / "blank.jsonl")], cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"empty\.txt' holds no .* \(passed over 1 empty file\); name such files"),
        (b"  \n\n \n", r"empty\.txt holds no text: left out 1 empty document; name files"),
    ],
)
def test_a_corpus_without_text_is_refused_and_leaves_nothing_behind(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        prepared_from(tmp_path, source=str(tmp_path / "empty.txt"))
    assert list((tmp_path / "cache" / "data").glob("*")) == []


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_held_out_fraction_outside_its_range_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DataError, match="must be at least 0 and below 1"):
        prepared_from(tmp_path, held_out_fraction=fraction)


def test_a_damaged_cache_is_found_at_every_start(tmp_path: Path) -> None:
    folder = prepared_from(tmp_path).folder
    shard = folder / "train-00000.bin"
    data = shard.read_bytes()
    shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    open_prepared(folder)
    with pytest.raises(DataError, match=r"train-00000\.bin has sha256"):
        prepared_from(tmp_path)
    shard.write_bytes(data[:-2])
    with pytest.raises(DataError, match=r"train-00000\.bin has \d+ bytes where"):
        prepared_from(tmp_path)


def test_a_small_corpus_is_cut_finer_so_that_the_held_out_share_is_that_asked_for(tmp_path: Path) -> None:
    lines = [f"Paragraph {index} " + "of words that have no end at all " * 20 for index in range(100)]
    for name, separator in (("book.txt", "\n\n"), ("one-line.txt", " ")):
        (tmp_path / name).write_text(separator.join(lines))
        prepared = prepared_from(tmp_path, source=str(tmp_path / name), held_out_fraction=0.02)
        splits = prepared.manifest["splits"]
        assert 0.01 < splits["held_out"]["characters"] / prepared.manifest["corpus"]["characters"] < 0.03
        assert f"of the characters{' ' * 2}data.held_out_fraction: 0.02" in table_of(prepared.manifest)


def test_the_table_has_a_line_for_every_reason_and_a_share_above_the_limit_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    with (tmp_path / "corpus.jsonl").open("ab") as file:
        file.write(b'{"text": null}\n{"text": " "}\n{"text": "bad \xff byte"}\n')
    (tmp_path / "notes.md").write_text("x" * 100)
    (tmp_path / ".hidden").touch()
    (tmp_path / "about.json").write_text('{"about": "the corpus"}')
    prepared = prepared_from(tmp_path, source=str(tmp_path))
    lines = [line.replace(f"{tmp_path}/", "") for line in table_of(prepared.manifest).splitlines()]
    split = prepared.manifest["splits"]["held_out"]
    tokens = split["tokens"] + prepared.train.num_tokens
    share = 100 * split["characters"] / prepared.manifest["corpus"]["characters"]
    assert [" ".join(line.split()) for line in lines] == [
        "data",
        "read 61 documents in 2 files 6,591 characters",
        "passed over 1 hidden file 0% of the bytes of the files .hidden",
        "passed over 1 file of another kind (.md 1) 1.31% of the bytes of the files notes.md",
        "passed over 1 .json file without text in data.text_field 0.304% of the bytes of the files about.json",
        "left out 1 empty document 1.59% of the documents corpus.jsonl, line 62",
        "left out 1 document whose text is null 1.59% of the documents corpus.jsonl, line 61",
        "replaced 1 byte outside UTF-8 0.334% of the characters corpus.jsonl, line 63",
        f"held out {split['tokens']:,} of {tokens:,} tokens {share:.3g}% of the characters data.held_out_fraction: 0.2",
    ]
    for most, words in ((0.01, "file of another kind"), (0.014, "empty document")):
        with pytest.raises(DataError, match=rf"data\.source: 1 {words} .*more than data\.max_lost_fraction \({most}\)"):
            prepared_from(tmp_path, source=str(tmp_path), max_lost_fraction=most)


def broken_tokenizer(folder: Path, **changes: Any) -> Path:
    """Return a tokenizer.json that knows all letters of the corpus but s and y."""
    letters = "Docuentahrmb0123456789.\nĠ"
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"</s>": len(letters), "?": len(letters) + 1}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], **changes))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="Ġ", prepend_scheme="never")
    inner.add_special_tokens(["</s>"])
    inner.save(str(folder / "broken.json"))
    return folder / "broken.json"


@pytest.mark.parametrize("options", [{}, {"unk_token": "?"}, {"unk_token": "?", "fuse_unk": True}])
def test_characters_that_a_tokenizer_cannot_write_are_counted_and_refused_above_the_limit(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Without an unknown token they would vanish."""
    file = broken_tokenizer(tmp_path, **options)
    text = "".join(json.loads(line)["text"] for line in write_corpus(tmp_path).read_text().splitlines())
    lost = text.count("s") + text.count("y")
    prepared = prepared_from(tmp_path, tokenizer_file=file, max_lost_fraction=0.9)
    assert prepared.account.noticed["unknown"].count == lost
    assert prepared.account.noticed["unknown"].first.endswith("corpus.jsonl, line 1")
    for cache in ("cache", "another"):
        with pytest.raises(
            DataError, match=r"characters that the tokenizer can't write .* would be lost.*data\.tokenizer"
        ):
            prepared_from(tmp_path, tokenizer_file=file, max_lost_fraction=0.01, cache_dir=tmp_path / cache)
    assert list((tmp_path / "another" / "data").glob("*")) == []


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"</s>": 0}, "[UNK]"),
        models.WordPiece({"</s>": 0}, unk_token="[UNK]"),
        models.Unigram([("</s>", 0.0)]),
    ],
)
def test_a_tokenizer_that_fails_at_a_text_is_named_with_the_place(tmp_path: Path, model: Any) -> None:
    inner = tokenizers.Tokenizer(model)
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "broken.json"))
    with pytest.raises(
        DataError, match=r"corpus\.jsonl, line 1: .*broken\.json can't write this text .*; add its unknown token"
    ):
        prepared_from(tmp_path, tokenizer_file=tmp_path / "broken.json")


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[" * 10**5,
        "{}",
        '{"dtype": "uint16", "splits": {"train": {"shards": [{}]}, "held_out": {"shards": []}}}',
        "[]",
    ],
)
def test_a_missing_or_damaged_manifest_is_named(tmp_path: Path, content: str | None) -> None:
    folder = prepared_from(tmp_path).folder
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"the manifest .* is missing or damaged .*; delete the folder"):
        open_prepared(folder)


def test_a_changed_or_missing_tokenizer_is_found_on_opening(tmp_path: Path) -> None:
    folder = prepared_from(tmp_path).folder
    Tokenizer.train(["other"], 257).save(folder / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer\.json is missing or differs from its manifest"):
        open_prepared(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing or differs from its manifest"):
        open_prepared(folder)


def spec_for(
    folder: Path, model_vocab_size: int, *, objective: str = "causal_lm", tokenizer: Path | None = None
) -> "RunSpec":
    data = SimpleNamespace(
        source=[str(write_corpus(folder))],
        cache_dir=str(folder / "cache"),
        text_field="text",
        tokenizer=str(tokenizer) if tokenizer else None,
        tokenizer_vocab_size=300,
        held_out_fraction=0.2,
        max_lost_fraction=0.05,
        end_of_text=None,
        tokenizer_train_bytes=None,
        corpora={},
    )
    return cast(
        "RunSpec",
        SimpleNamespace(
            data=data, seed=7, transformer=SimpleNamespace(vocab_size=model_vocab_size, objective=objective)
        ),
    )


def test_prepare_data_reads_the_fields_of_the_run_spec(tmp_path: Path) -> None:
    assert prepare_data(spec_for(tmp_path, 300)).folder == prepared_from(tmp_path).folder


def test_text_and_tokenizer_of_a_resumed_run_are_compared_before_anything_is_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared_from(tmp_path)
    former = Digests.read(first.folder / "manifest.json")
    assert former is not None
    packed = tmp_path / "corpus.jsonl.gz"  # the same text in another form
    packed.write_bytes(gzip.compress((tmp_path / "corpus.jsonl").read_bytes()))
    again = prepared_from(tmp_path, source=str(packed), former=former)
    assert (again.folder != first.folder, again.manifest["splits"]) == (True, first.manifest["splits"])
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer.train(["another"], 270).save(tokenizer)
    with pytest.raises(DataError, match=r"the tokenizer \(data.tokenizer\) have changed since this run began"):
        prepared_from(tmp_path, former=former, tokenizer_file=tokenizer)
    monkeypatch.setattr(Tokenizer, "train", None)
    with pytest.raises(DataError, match=r"the files of data.source have changed since this run began.* put the former"):
        prepared_from(tmp_path, source=str(write_corpus(tmp_path, 61)), former=former)
    (tmp_path / "manifest.json").write_text('{"tokenizer": []}')
    assert Digests.read(tmp_path / "manifest.json") is None


def test_text_is_prepared_under_a_lock_that_names_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_lock(folder: Path, *_: object) -> None:
        jobs.extend(json.loads(lock.read_text())["job"] for lock in folder.parent.glob(".*.lock"))
        raise DataError("seen")

    jobs: list[str] = []
    monkeypatch.setattr("trimaran.runtime.data.prepare.build", read_lock)
    with pytest.raises(DataError, match="seen"):
        prepared_from(tmp_path, environment={"SLURM_JOB_ID": "7"})
    assert jobs == ["Slurm job 7"]


def test_a_tokenizer_larger_than_the_model_vocabulary_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DataError, match=r"the tokenizer has 300 tokens, the model's vocabulary only 280; set model\.vocab_size"
    ):
        prepare_data(spec_for(tmp_path, 280))
    tokenizer = prepared_from(tmp_path).folder / "tokenizer.json"
    monkeypatch.setattr("trimaran.runtime.data.prepare.find_files", None)  # before the corpus is looked at
    with pytest.raises(DataError, match="the tokenizer has 300 tokens"):
        prepare_data(spec_for(tmp_path, 280, tokenizer=tokenizer))


def test_a_masked_model_gets_a_tokenizer_with_a_mask_token(tmp_path: Path) -> None:
    plain, masked = (
        prepare_data(spec_for(tmp_path, 300, objective=objective)) for objective in ("causal_lm", "masked_lm")
    )
    assert plain.tokenizer.mask_id is None
    assert masked.tokenizer.mask_id is not None
    assert masked.folder != plain.folder
    assert masked.tokenizer.vocab_size == 300
    assert masked.tokenizer.mask_id not in masked.train.read(0, masked.train.num_tokens)
    again = prepare_data(spec_for(tmp_path, 300, objective="masked_lm", tokenizer=masked.folder / "tokenizer.json"))
    assert again.tokenizer.required_mask_id() == masked.tokenizer.mask_id


def test_an_existing_tokenizer_without_a_mask_token_is_refused_for_a_masked_model(tmp_path: Path) -> None:
    tokenizer = prepared_from(tmp_path).folder / "tokenizer.json"
    with pytest.raises(
        DataError, match=r"the tokenizer has no mask token, which masked_lm hides tokens with; add \[MASK\] or <mask>"
    ):
        prepare_data(spec_for(tmp_path, 300, objective="masked_lm", tokenizer=tokenizer))
