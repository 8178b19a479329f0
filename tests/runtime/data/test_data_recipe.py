"""A recipe drops nothing unseen: every document is kept or has a reason, the same whatever order and stops it took."""

import gzip
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, cast, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel
from typer.testing import CliRunner

from tests.runtime.data.test_data_filters import model_of
from trimaran.launchers.cli.prepare import data
from trimaran.launchers.data.prepare import curate_spec, sample_rows
from trimaran.launchers.report.data_page import write_data_page
from trimaran.runtime.data.document import Counts, Document
from trimaran.runtime.data.engine.cluster import Workers
from trimaran.runtime.data.engine.parts import read_kept, read_removed
from trimaran.runtime.data.engine.task import OnDisk, Output, Task, find_outputs
from trimaran.runtime.data.engine.watch import Watch, note_slow
from trimaran.runtime.data.export import export_megatron
from trimaran.runtime.data.files import DataError, NotPrepared
from trimaran.runtime.data.prepare import prepare_data
from trimaran.runtime.data.readers import slices
from trimaran.runtime.data.recipe import of_spec, stage_runner
from trimaran.runtime.data.recipe import recipe as recipe_module
from trimaran.runtime.data.recipe.curate import curate
from trimaran.runtime.data.recipe.curated import Curated, folder_of_recipe, open_curated
from trimaran.runtime.data.recipe.fate import fate_of, samples, stage_folders
from trimaran.runtime.data.recipe.of_spec import recipe_of
from trimaran.runtime.data.recipe.sample import sample_documents
from trimaran.runtime.data.samples.epochs import check_epochs, corpora_of, epochs_of, samples_of
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.parsing import parse_spec
from trimaran.runtime.spec.sections.common import FilePath
from trimaran.runtime.spec.sections.recipe.clean import CleanSection
from trimaran.runtime.spec.sections.recipe.dedup import DecontaminateSection
from trimaran.runtime.spec.sections.recipe.filter import FilterSection, GopherSettings

WORDS = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8").split()
OFF = [name for name in GopherSettings.model_fields if name != "stop_words"]
RULES = dict.fromkeys(OFF) | {"min_words": 2}
QUESTION = "If a train leaves the station at nine and travels sixty miles an hour, when does it reach the coast?"


class Here:
    """Runs tasks in this process, in an order of its own; stands for a cluster."""

    def __init__(self, root: Path, seed: int = 0, stop_after: int | None = None) -> None:
        self.root, self.ran = root, Counter[str]()
        self._random, self._left = random.Random(seed), stop_after

    def begin(self) -> None:
        """Nobody else works here."""

    def run(self, tasks: Sequence[Task], on_done: Callable[[Task, Output], None]) -> list[Output]:
        found = find_outputs(tasks, self.root)
        for task in self._random.sample(tasks, len(tasks)):
            if task.key not in found:
                shutil.rmtree(task.folder(self.root), ignore_errors=True)
                if self._left is not None and not self._left:
                    raise KeyboardInterrupt
                self._left = None if self._left is None else self._left - 1
                self.ran[task.stage] += 1
                task.run(self.root, Watch(None, frozenset(_slow(task.slow_file(self.root)))))
            on_done(task, cast("Output", task.found(self.root)))
        return [cast("Output", task.found(self.root)) for task in tasks]


def _slow(path: Path) -> list[int]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _text(seed: int, length: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def _page(text: str) -> str:
    return f"<html><head><title>x</title></head><body><article><p>{text}</p></article></body></html>"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages and records: copies, near copies, repeated lines, an evaluation item, an empty record, broken JSON."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "pages").mkdir()
    for number in range(6):
        (folder / "pages" / f"{number}.html").write_text(_page(_text(number)), encoding="utf-8")
    (folder / "pages" / "6.html").write_text(_page(_text(0)), encoding="utf-8")
    (folder / "pages" / "7.html").write_text(_page(_text(1) + " and a new end"), encoding="utf-8")
    (folder / "pages" / "8.html").write_bytes(b"\x00\x01\x02binary" * 100)
    notice = "This sentence stands at the end of very many records of this corpus, word for word."
    rows = [{"text": f"{_text(100 + number)}\n{notice}", "url": f"https://example.org/{number}"} for number in range(8)]
    rows += [
        {"text": _text(200), "url": "http://www.example.org/3/#top"},
        {"text": f"{_text(201)} {QUESTION} {_text(202)}"},
        {"text": _text(2)},
        {"text": ""},
        {"text": "mail me: someone@example.com " + _text(203)},
    ]
    lines = [json.dumps(row) for row in rows]
    (folder / "records.jsonl").write_text("\n".join([*lines[:4], "{broken", *lines[4:]]) + "\n", encoding="utf-8")
    (folder / "items.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n", encoding="utf-8")
    return folder


def _spec(corpus: Path, **changes: Any) -> RunSpec:
    data = {
        "corpora": {
            "web": {"source": [str(corpus / "pages")], "weight": 3.0},
            "records": {"source": [str(corpus / "records.jsonl")]},
        },
        "clean": {},
        "filter": {"gopher": RULES},
        "dedup": {"lines": True, "substring": True},
        "decontaminate": {"against": [{"file": str(corpus / "items.jsonl"), "fields": ["question"]}]},
        "max_lost_fraction": 1.0,
        "tokenizer_vocab_size": 300,
        "cache_dir": str(corpus / "cache"),
        **changes,
    }
    return parse_spec(
        {
            "data": data,
            "optimizer": {"lr": 0.001},
            "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "vocab_size": 512},
            "train": {"num_steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "seq_len": 16},
        }
    )


def _curate(spec: RunSpec, here: Here) -> Curated:
    return curate(recipe_of(spec), here, lambda *_: None)


@pytest.fixture(scope="module")
def curated(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Curated:
    return _curate(_spec(corpus), Here(tmp_path_factory.mktemp("root")))


def _kept_ids(curated: Curated) -> list[str]:
    return [document.id for part in curated.parts for document in read_kept(part)]


def _reasons(curated: Curated) -> dict[str, str]:
    folders = stage_folders(curated.root, curated.manifest)
    return {removed.id: removed.reason for _, folder in folders for removed in read_removed(folder)}


def test_every_document_is_kept_or_has_its_reason(curated: Curated, corpus: Path) -> None:
    reasons, kept = _reasons(curated), _kept_ids(curated)
    assert len(kept) == len(set(kept))
    assert not set(kept) & set(reasons)
    assert len(kept) + len(reasons) == 9 + 14, "nine pages, fourteen lines"
    assert Counter(reasons.values()) == {
        "exact.copy": 2, "near.copy": 1, "html.binary": 1, "url.copy": 1, "decontaminate.ngram": 1,
        "read.empty": 1, "read.not_json": 1,
    }  # fmt: skip
    assert reasons["web/6.html#0"] == "exact.copy"
    assert reasons["web/7.html#0"] == "near.copy"
    stages = {stage["name"]: stage for stage in curated.manifest["stages"]}
    assert list(stages) == ["clean", "filter", "copies", "near", "lines", "substring", "decontaminate"]
    came = [stage["documents"]["in"] for stage in stages.values()]
    went = [stage["documents"]["out"] for stage in stages.values()]
    assert came == [23, *went[:-1]]
    assert stages["clean"]["counts"]["pii.email"] == 1
    assert stages["lines"]["counts"]["lines.lines"] == 7, "the first of eight keeps the sentence"
    rows = curated.manifest["evaluation_sets"][str(corpus / "items.jsonl")]
    assert [hit["item"] for hit in rows["found"]] == [1]
    assert curated.manifest["clusters"][0]["copies"] >= 1


def test_the_fate_of_a_document_can_be_asked(curated: Curated) -> None:
    fate = fate_of(curated.root, curated.manifest, "web/6.html#0")
    assert fate is not None
    assert fate.removed is not None
    assert (fate.removed.stage, fate.removed.detail) == ("copies", "copy of web/0.html#0")
    kept = fate_of(curated.root, curated.manifest, "web/0.html#0")
    assert kept is not None
    assert kept.removed is None
    assert kept.text == _text(0)
    assert fate_of(curated.root, curated.manifest, "web/99.html#0") is None
    shown = samples(curated.root, curated.manifest, 1)
    assert {reason: len(rows) for reason, rows in shown.items()} == dict.fromkeys(
        sorted(set(_reasons(curated).values())), 1
    )


def test_order_stops_and_place_change_nothing(curated: Curated, corpus: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved, ignore=shutil.ignore_patterns("cache"))
    spec = _spec(corpus, corpora={
        "web": {"source": [str(moved / "pages")], "weight": 3.0},
        "records": {"source": [str(moved / "records.jsonl")]},
    })  # fmt: skip
    root = tmp_path / "root"
    for number in (0, 1, 5, 9):
        with pytest.raises(KeyboardInterrupt):
            _curate(spec, Here(root, seed=number, stop_after=number))
    again = _curate(spec, Here(root, seed=7))
    assert again.manifest == curated.manifest
    assert again.folder.name == curated.folder.name
    last = Here(root)
    assert _curate(spec, last).folder == again.folder
    assert not last.ran, "what is done is not done again"


def test_a_packed_file_becomes_many_parts_with_the_same_ids(
    curated: Curated, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "records.jsonl.gz").write_bytes(gzip.compress((corpus / "records.jsonl").read_bytes()))
    corpora = {
        "web": {"source": [str(corpus / "pages")], "weight": 3.0},
        "records": {"source": [str(tmp_path / "records.jsonl.gz")]},
    }
    monkeypatch.setattr(stage_runner, "PIECE_BYTES", 1000)
    first, again = (_curate(_spec(corpus, corpora=corpora), Here(tmp_path / str(seed), seed=seed)) for seed in (3, 4))
    assert first.manifest == again.manifest
    assert len(curated.parts) == 2
    assert len(first.parts) > 8
    assert [part["corpus"] for part in first.manifest["parts"]].index("records") > 2
    sizes = [sum(len(document.text) for document in read_kept(part)) for part in first.parts]
    assert max(sizes) < 1000 + 1500, "the bound and a document"
    assert [name.replace(".gz", "") for name in _kept_ids(first)] == _kept_ids(curated)
    assert {name.replace(".gz", ""): why for name, why in _reasons(first).items()} == _reasons(curated)
    for mine, whole in zip(first.manifest["stages"], curated.manifest["stages"], strict=True):
        assert mine["documents"] == whole["documents"]
    assert open_curated(first.folder).parts == first.parts
    damaged = tmp_path / "3" / first.manifest["stages"][0]["folders"][-1] / "kept.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    mended = Here(tmp_path / "3")
    _curate(_spec(corpus, corpora=corpora), mended)
    assert mended.ran == {"clean": 1}


def test_a_packed_file_of_members_becomes_many_tasks_with_the_same_documents(
    curated: Curated, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (corpus / "records.jsonl").read_bytes()
    members = [content[start : start + 500] for start in range(0, len(content), 500)]  # lines cross their borders
    (tmp_path / "records.jsonl.gz").write_bytes(b"".join(map(gzip.compress, members)))
    corpora = {
        "web": {"source": [str(corpus / "pages")], "weight": 3.0},
        "records": {"source": [str(tmp_path / "records.jsonl.gz")]},
    }
    monkeypatch.setattr(stage_runner, "PART_BYTES", 2000)
    monkeypatch.setattr(recipe_module, "PART_BYTES", 2000)
    monkeypatch.setattr(slices, "LEAST_SLICED", 1000)
    spec, here = _spec(corpus, corpora=corpora), Here(tmp_path / "3", seed=3)
    first, again = _curate(spec, here), _curate(spec, Here(tmp_path / "4", seed=4))
    assert first.manifest == again.manifest
    assert here.ran["slices"] == 1
    assert here.ran["clean"] > 5
    assert [name.replace(".gz", "") for name in _kept_ids(first)] == _kept_ids(curated)
    assert {name.replace(".gz", ""): why for name, why in _reasons(first).items()} == _reasons(curated)
    later = Here(tmp_path / "3")
    assert _curate(spec, later).folder == first.folder
    assert not later.ran, "what is done is not done again"


def test_a_change_does_again_what_follows_alone(curated: Curated, corpus: Path) -> None:
    here = Here(curated.root)
    _curate(_spec(corpus, dedup={"near": {"threshold": 0.9}, "lines": True, "substring": True}), here)
    assert not {"clean", "filter", "copies", "near-keys"} & set(here.ran)
    assert here.ran["near-compare"] == 1
    (curated.parts[0] / "kept.parquet").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"missing or not what its manifest says; run trimaran prepare again"):
        open_curated(curated.folder)
    again = Here(curated.root)
    assert _curate(_spec(corpus), again).manifest == curated.manifest
    assert sum(again.ran.values()) == 1, "the damaged part alone"


def test_a_document_that_took_too_long_is_left_out(corpus: Path, tmp_path: Path) -> None:
    spec = _spec(corpus, filter=None, dedup=None, decontaminate=None)
    first = _curate(spec, Here(tmp_path))
    task = (first.root / first.manifest["stages"][0]["folders"][0]).parent
    note_slow(task.with_suffix(".slow.json"), 2)
    shutil.rmtree(task)
    second = _curate(spec, Here(tmp_path))
    assert _reasons(second) == _reasons(first) | {"web/2.html#0": "slow.document"}


def test_the_page_shows_reasons_and_escapes_texts(curated: Curated, corpus: Path) -> None:
    page = write_data_page(curated).read_text(encoding="utf-8")
    for words in ("exact.copy", "near.copy", "html.binary", "Largest clusters", "By corpus and language", "pii.email"):
        assert words in page
    assert "<article>" not in page
    assert "if a train leaves the station at nine and travels sixty miles an" in page, "the passage of the item"
    assert page.count("<details>") == len(set(_reasons(curated).values())) + 1


def test_a_sample_has_some_of_every_corpus_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    recipe = recipe_of(_spec(corpus, cache_dir=str(tmp_path / "cache")), identify=False)
    few = [name.partition("/")[0] for name, _, _ in sample_documents(recipe, 6, 60.0)]
    assert Counter(few) == {"web": 3, "records": 3}
    rows = {name: (text, why) for name, text, why in sample_documents(recipe, 100, 60.0)}
    assert len(rows) == 23
    assert not (tmp_path / "cache").exists()
    assert rows["web/8.html#0"][1].startswith("html.binary")
    assert rows["web/1.html#0"] == (_text(1), "")


def test_pages_need_cleaning(corpus: Path) -> None:
    with pytest.raises(
        DataError, match=r"pages/0\.html has pages.*and the spec has no data\.clean; write data\.clean: "
    ):
        recipe_of(_spec(corpus, clean=None))


def test_what_is_prepared_is_found_without_work(curated: Curated, corpus: Path, tmp_path: Path) -> None:
    spec = _spec(corpus, cache_dir=str(tmp_path))
    found = curate(recipe_of(spec), OnDisk(curated.root), lambda *_: None)
    assert (found.folder, found.manifest) == (curated.folder, curated.manifest)
    with pytest.raises(NotPrepared, match=r"run trimaran prepare"):
        prepare_data(spec, curated=found, build_missing=False)
    prepared = prepare_data(spec, curated=found)
    assert prepare_data(spec, curated=found, build_missing=False).folder == prepared.folder
    corpora = corpora_of(spec, prepared.train)
    assert samples_of(spec) == {"web": 6, "records": 2}
    web = (corpora["web"].num_tokens - 1) // 16
    assert epochs_of(spec, corpora)["web"] == 6 / web
    often = {"web": {"source": [str(corpus / "pages")], "max_epochs": 1 / web}}
    with pytest.raises(DataError, match=r"the corpus web .* times, more than data\.corpora\.web\.max_epochs"):
        check_epochs(_spec(corpus, corpora=often), {"web": corpora["web"]})
    with pytest.raises(NotPrepared, match=r"its stage filter is not done yet"):
        curate(recipe_of(_spec(corpus, filter={"c4": True})), OnDisk(curated.root), lambda *_: None)


def test_copies_of_an_earlier_run_are_removed(curated: Curated, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (_text(3), _text(900), _text(4) + " one more word")),
        encoding="utf-8",
    )
    spec = _spec(
        corpus,
        corpora={"new": {"source": [str(tmp_path / "new.jsonl")]}},
        dedup={"against": [str(curated.folder)]},
        filter=None,
    )
    later = _curate(spec, Here(tmp_path / "root"))
    assert sorted(_reasons(later).values()) == ["exact.copy", "near.copy"]
    assert [document.text for part in later.parts for document in read_kept(part)] == [_text(900)]
    with pytest.raises(DataError, match=r"^data\.dedup\.against: .* holds no recipe; name the folder of a run"):
        recipe_of(_spec(corpus, dedup={"against": [str(tmp_path)]}), {})
    shutil.copytree(curated.root, tmp_path / "earlier")
    near = next(stage for stage in curated.manifest["stages"] if stage["name"] == "near")
    damaged = tmp_path / "earlier" / near["folders"][0] / "kept.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    against = str(tmp_path / "earlier" / "manifests" / curated.folder.name)
    with pytest.raises(DataError, match=r"dedup\.against .*kept\.parquet is not what it was; run trimaran prepare"):
        _curate(_spec(corpus, dedup={"against": [against]}), Here(tmp_path / "root"))
    with pytest.raises(DataError, match=r"new\.jsonl is no folder with a recipe; name the folder of a run"):
        folder_of_recipe(tmp_path / "new.jsonl")


def test_tokenizing_goes_on_where_it_stopped(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_runner, "PIECE_BYTES", 1000)
    plain = {"filter": None, "dedup": None, "decontaminate": None, "tokenizer_train_bytes": 3000}
    spec = _spec(corpus, cache_dir=str(tmp_path / "cache"), **plain)
    curated = _curate(spec, Here(tmp_path / "root"))
    whole = prepare_data(spec, curated=curated)
    elsewhere = _spec(corpus, cache_dir=str(tmp_path / "again"), **plain)
    again = _curate(elsewhere, Here(tmp_path / "other"))
    parts, done = len(curated.parts), Counter[str]()
    for stop_after in (2, 2 * parts - 3, 3):
        here = Here(tmp_path / "other", seed=stop_after, stop_after=stop_after)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(elsewhere, curated=again, runner=here)
        done += here.ran
    left = tmp_path / "again" / "data" / f".{whole.folder.name}.0123456789ab"  # as SIGKILL leaves it
    left.mkdir(parents=True)
    last = Here(tmp_path / "other")
    prepared = prepare_data(elsewhere, curated=again, runner=last)
    assert done["tokens"] > 1
    assert done + last.ran == {"units": 2 * parts, "tokens": parts}, "each once: of the small corpus units twice"
    assert prepared.folder.name == whole.folder.name
    assert [path.name for path in left.parent.iterdir()] == [whole.folder.name]
    same = [name for name in whole.manifest if name != "source"]
    assert {name: prepared.manifest[name] for name in same} == {name: whole.manifest[name] for name in same}


def test_a_strict_stage_that_is_found_warns_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Cluster(Here):
        def __init__(self, root: Path, *_: object) -> None:
            super().__init__(root)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("trimaran.runtime.data.engine.cluster.Cluster", Cluster)
    strict = {"gopher": {**RULES, "min_words": 100000}, "c4": False}
    spec = _spec(corpus, filter=strict, dedup={}, cache_dir=str(tmp_path))
    for last_stage in ("filter", "dedup"):
        caplog.clear()
        with pytest.raises(DataError, match="the recipe keeps no document"):
            curate_spec(spec, cast("Workers", None), last_stage)
        assert caplog.text.count("the stage filter removed 20 of 20 documents") == 1


def test_shards_are_those_of_each_corpus(curated: Curated, corpus: Path, tmp_path: Path) -> None:
    spec = _spec(corpus, cache_dir=str(tmp_path), tokenizer_train_bytes=2000)
    prepared = prepare_data(spec, curated=curated)
    of = prepared.train.of_corpora()
    assert list(of) == ["web", "records"]
    assert sum(each.num_tokens for each in of.values()) == prepared.train.num_tokens
    assert prepared.manifest["source"]["recipe"]["folder"] == str(curated.folder)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.integers(0, 5).map(_text), st.text(max_size=40), st.just(QUESTION)), max_size=12))
def test_counts_in_are_counts_out(corpus: Path, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = [json.dumps({"text": text}, ensure_ascii=True) for text in [*texts, _text(77)]]
    (folder / "a.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    spec = _spec(corpus, corpora={"a": {"source": [str(folder / "a.jsonl")]}}, cache_dir=str(folder / "cache"))
    curated = _curate(spec, Here(folder / "root"))
    kept, reasons = _kept_ids(curated), _reasons(curated)
    assert sorted([*kept, *reasons]) == sorted(set(kept) | set(reasons))
    assert len(kept) + len(reasons) == len(rows)


def test_token_ids_go_through_a_recipe_as_they_are(corpus: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([_text(number) for number in range(30)], 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    ids = [tokenizer.encode(_text(number)) for number in range(8)]
    export_megatron([np.array([*each, tokenizer.eot_id]) for each in ids], tmp_path / "old" / "tokens", 300)
    data = {
        "corpora": {"old": {"source": [str(tmp_path / "old")], "format": "megatron"}},
        "cache_dir": str(tmp_path / "cache"),
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "held_out_fraction": 0.0,
    }
    spec = _spec(corpus, **data)
    curated = _curate(spec, Here(tmp_path / "root"))
    assert len(_kept_ids(curated)) == 8
    prepared = prepare_data(spec, curated=curated)
    assert prepared.train.read(0, prepared.train.num_tokens).tolist() == [
        token for each in ids for token in [*each, tokenizer.eot_id]
    ]
    with pytest.raises(DataError, match=r"old/tokens\.bin#0 has token ids and no text.*data\.tokenizer"):
        prepare_data(_spec(corpus, **{**data, "tokenizer": None}), curated=curated)


def test_half_characters_in_names_and_addresses_are_no_end(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "\udcff.jsonl").write_text(json.dumps({"text": "a b c", "url": "http://x.org/\ud800"}) + "\n")
    rows = [{"text": "d e f"}, {"t\ud800": "x"}]
    (tmp_path / "texts" / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = _spec(corpus, corpora={"two": {"source": [str(tmp_path / "texts")]}}, filter=None, dedup=None)
    curated = _curate(spec, Here(tmp_path / "root"))
    assert len(_kept_ids(curated)) == 2
    assert list(_reasons(curated).values()) == ["read.no_field"]


def test_too_much_that_cannot_be_read_is_an_error(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 23 documents \(4\.3%\) are left out as read\.\w+, more than"):
        _curate(_spec(corpus, max_lost_fraction=0.04), Here(tmp_path))


def test_a_changed_file_of_a_finished_task_is_found_and_made_again(corpus: Path, tmp_path: Path) -> None:
    first = _curate(_spec(corpus), Here(tmp_path))
    folders = {stage["name"]: tmp_path / stage["folders"][0] for stage in first.manifest["stages"]}
    path = folders["near"] / "kept.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)  # of the same size
    changed = _spec(corpus, dedup={"lines": False})
    clean = _curate(changed, Here(tmp_path / "clean"))
    again = Here(tmp_path)
    assert _curate(changed, again).manifest == clean.manifest
    assert again.ran["near"] == 1


def test_a_sample_leaves_out_what_never_ends(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        name = "endless"

        def __call__(self, document: Document, counts: Counts) -> None:
            if document.id == "web/2.html#0":
                while True:
                    pass

    monkeypatch.setattr("trimaran.runtime.data.recipe.sample.cleaning", lambda section: [Endless()])
    recipe = recipe_of(_spec(corpus, filter=None, cache_dir=str(tmp_path)), identify=False)
    rows = {name: why for name, _, why in sample_documents(recipe, 100, 1.0)}
    assert rows["web/2.html#0"] == "slow.document"
    assert list(rows.values()).count("slow.document") == 1


NAMED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "spelling": lambda folder: {"clean": {"spelling": str(folder / "spelling")}},
    "blocklist": lambda folder: {"filter": {"url_blocklist": [str(folder / "blocklist")]}},
    "lexicon": lambda folder: {
        "filter": {"toxicity": {"bundled": False, "lexicons": [{"file": str(folder / "lexicon")}], "min_hits": 2}}
    },
    "model": lambda folder: {"filter": {"classifiers": [{"file": str(folder / "model"), "label": "good", "min": 0.5}]}},
    "items.jsonl": lambda folder: {
        "decontaminate": {"against": [{"file": str(folder / "items.jsonl"), "fields": ["question"]}]}
    },
    "sets/gsm8k.jsonl": lambda folder: {"decontaminate": {"against": [{"file": str(folder / "sets"), "set": "gsm8k"}]}},
}
"""Files that settings name, each with the settings that do."""
CONTENTS: dict[str, tuple[bytes, bytes]] = {
    "spelling": (b"teh -> the\n", b"zwo -> two\n"),
    "blocklist": (b"example.com\n", b"example.org\n"),
    "lexicon": (b"teh\ngood\n", b"zwo\nwords\n"),
    "model": (model_of(b"good", b"words"), model_of(b"words", b"good")),
    "items.jsonl": (b'{"question": "mail him at home"}\n', b'{"question": "some zwo words"}\n'),
    "sets/gsm8k.jsonl": (
        b'{"question": "mail him at", "answer": "home #### 7"}\n',
        b'{"question": "some zwo", "answer": "words #### 7"}\n',
    ),
}
"""What such a file has at first, and later, with the same number of bytes or another."""


@pytest.mark.parametrize("name", NAMED)
def test_a_changed_file_that_settings_name_does_its_stage_again_and_what_follows(tmp_path: Path, name: str) -> None:
    rows = [{"text": "teh good end of this text", "url": "http://example.com/1"}]
    rows += [{"text": "here are some zwo words 7", "url": "http://example.org/2"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes: dict[str, Any] = {
        "corpora": {"a": {"source": [str(tmp_path / "a.jsonl")]}, "b": {"source": [str(tmp_path / "a.jsonl")]}},
        "cache_dir": str(tmp_path / "cache"),
        "clean": None,
        "filter": None,
        "dedup": {"exact": False, "url": False, "near": False},
        "decontaminate": None,
        **NAMED[name](tmp_path),
    }
    spec, (first, later) = _spec(tmp_path, **changes), CONTENTS[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(first)
    before = _curate(spec, Here(tmp_path / "root"))
    path.write_bytes(later)
    here = Here(tmp_path / "root")
    after = _curate(spec, here)
    stage = next(iter(NAMED[name](tmp_path)))
    assert here.ran == {stage: 2}, "one of each corpus"
    fresh = _curate(spec, Here(tmp_path / "fresh"))
    assert _results(after) == _results(fresh)
    assert _results(after) != _results(before)
    path.write_bytes(first)
    again = Here(tmp_path / "root")
    assert _curate(spec, again).manifest == before.manifest
    assert not again.ran, "the former content's work is still there"


def _results(curated: Curated) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Return the kept documents and why others are removed."""
    kept = [(document.id, document.text) for part in curated.parts for document in read_kept(part)]
    return kept, _reasons(curated)


def _paths_in(annotation: Any) -> list[Any]:
    """Return the fields below a type that are paths of files."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        rows = [(name, [field.annotation, *field.metadata]) for name, field in annotation.model_fields.items()]
        return [f"{name}.{each}".strip(".") for name, row in rows for what in row for each in _paths_in(what)]
    if isinstance(annotation, AfterValidator):
        return [""] if annotation in get_args(FilePath) else []
    return [each for what in get_args(annotation) for each in _paths_in(what)]


def test_every_file_that_settings_can_name_is_among_those_above() -> None:
    sections = (CleanSection, FilterSection, DecontaminateSection)
    assert [path for section in sections for path in _paths_in(section)] == [
        "spelling", "url_blocklist", "toxicity.lexicons.file", "classifiers.file", "against.file"
    ], "a new one belongs in recipe/named_files.py and in NAMED"  # fmt: skip


def test_a_named_file_that_changes_while_it_is_read_ends_the_task(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "teh end of it"}) + "\n", encoding="utf-8")
    path = tmp_path / "spelling"
    path.write_bytes(b"teh -> the\n")
    corpora = {"a": {"source": [str(tmp_path / "a.jsonl")]}}
    off = {"filter": None, "dedup": None, "decontaminate": None, "cache_dir": str(tmp_path / "cache")}
    recipe = recipe_of(_spec(tmp_path, corpora=corpora, **NAMED["spelling"](tmp_path), **off))
    path.write_bytes(b"teh -> ten\n")
    with pytest.raises(DataError, match=r"spelling has changed since its work was laid out; run the command again"):
        curate(recipe, Here(tmp_path / "root"), lambda *_: None)
    assert not list((tmp_path / "root").rglob("kept.parquet"))


def test_sources_of_every_corpus_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpora = {}
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")
        os.utime(path, (1, 1))  # long ago
        corpora[name] = {"source": [str(path)]}
    spec = _spec(tmp_path, corpora=corpora, decontaminate=None, cache_dir=str(tmp_path / "cache"))
    first = recipe_of(spec)
    monkeypatch.setattr(of_spec, "hash_file", lambda path: pytest.fail(f"{path} is read again"))
    assert recipe_of(spec) == first
    assert len({source.sha256 for source in first.parts}) == 2


def test_nothing_of_a_document_reaches_the_terminal_as_a_command(tmp_path: Path) -> None:
    bad = "\x1b]0;title\x07\x1b[2J\x9b5n\r\u202e\u2028[red]x[/red]"
    folder = tmp_path / "a\x1b[31m"
    folder.mkdir()
    rows = [f"good {bad} good", f"words {bad}"]
    (folder / "b\x1b[1m.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    (folder / "m\x1b[2J").write_bytes(model_of(b"good", b"words"))
    rule = {"file": str(folder / "m\x1b[2J"), "label": "good", "min": 0.5}
    spec = _spec(
        tmp_path,
        corpora={"c": {"source": [str(folder / "b\x1b[1m.jsonl")]}},
        cache_dir=str(tmp_path / "cache"),
        clean=None,
        filter={"classifiers": [rule]},
        dedup=None,
        decontaminate=None,
    )
    curated = _curate(spec, Here(tmp_path / "root"))
    [kept] = [document.id for part in curated.parts for document in read_kept(part)]
    [removed] = _reasons(curated)
    commands = [["why", str(curated.folder), name] for name in (kept, removed, "\x1b[3m")]
    results = [CliRunner().invoke(data, words) for words in (*commands, ["show", str(curated.folder)])]
    assert [result.exit_code for result in results] == [0, 0, 2, 0]
    table = "".join("".join(row) for row in sample_rows(spec, 9))
    for shown in (*(result.output for result in results), table):
        assert not [each for each in shown if not each.isprintable() and each != "\n"], shown
    kept_out, removed_out, unknown, whole = (result.output for result in results)
    escaped = "\\x1b]0;title\\x07\\x1b[2J\\x9b5n\\r\\u202e\\u2028[red]x[/red]"
    assert escaped in kept_out
    assert escaped in removed_out
    assert "classifiers.m\\x1b[2J.good" in removed_out
    assert "\\x1b[3m" in unknown
    assert "classifiers.m\\x1b[2J.good" in whole
    assert "classifiers.m\\x1b[2J.good" in table
