"""benchmarks/data_engine.py: both sides' work on pages, the engines' ids, and what is seen of a command's processes."""

import gzip
import json
import runpy
import sys
from pathlib import Path

import pytest

from trimaran.runtime.spec import load_spec

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data_engine.py"
PAGE = "<html><body><main><p>{}</p></main></body></html>"
WORDS = "the quick brown fox jumps over the lazy dog and then it rests for a while in the shade of that old tree. "


@pytest.fixture(autouse=True)
def _beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script imports others of its folder."""
    monkeypatch.syspath_prepend(SCRIPT.parent)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "pages.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"html": PAGE.format(f"Page {n}: {WORDS * n}")}) + "\n" for n in range(1, 5))
    return path


def test_pages_without_datatrove(
    pages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datatrove.data", None)
    runpy.run_path(str(SCRIPT))["measure_pages"](pages, 1)
    told = capsys.readouterr().out
    assert "trimaran: 4 pages" in told
    assert "datatrove: import of datatrove.data halted" in told


def test_engines_give_the_same_ids(pages: Path) -> None:
    benchmark = runpy.run_path(str(SCRIPT))
    speeds = benchmark["measure_tokens"](benchmark["to_texts"](benchmark["read_pages"](pages)), 1, 300)
    assert speeds.keys() == {"FastEncoder", "encode_batch", "encode_batch_fast"}


def test_processes_of_a_command_are_seen(tmp_path: Path) -> None:
    recipes = tmp_path / "recipes"
    script = (
        f"mkdir -p {recipes}/clean/.task; sleep 0.3; mkdir -p {recipes}/manifests/abc; "
        f"touch {recipes}/manifests/abc/recipe.json; (sleep 0.3; true); exit 3"
    )
    seen = runpy.run_path(str(SCRIPT))["watch_command"](["sh", "-c", script], tmp_path)
    assert (seen.code, seen.manifests) == (3, ["abc"])
    assert 0 < seen.first_task < seen.recipe < seen.end
    assert {process.name for process in seen.processes.values()} >= {"sh", "sleep"}
    assert all(process.peak_bytes > 0 for process in seen.processes.values() if process.name == "sleep")


def test_a_corpus_has_copies_and_a_spec(tmp_path: Path) -> None:
    benchmark = runpy.run_path(str(SCRIPT))
    (tmp_path / "notes.txt").write_text(f"{WORDS}\nSee page 7, which is no phrase. one two three four five six, seven")
    phrases = benchmark["phrases_of"]([tmp_path], 1000)
    assert phrases == ["one two three four five six"]
    benchmark["write_corpus"](tmp_path / "corpus", 1, [f"{phrases[0]} of {letter} all" for letter in "abcdefghijkl"])
    spec = load_spec(tmp_path / "corpus" / "spec.yaml", [])
    assert sorted(path.name for path in (tmp_path / "corpus").glob("*.jsonl*")) == [
        "0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl", "4.jsonl.gz", "items.jsonl"
    ]  # fmt: skip
    assert spec.data.has_recipe
    files = [tmp_path / "corpus" / f"{number}.jsonl" for number in range(4)]
    rows = [json.loads(row)["text"].split() for file in files for row in file.read_text(encoding="utf-8").splitlines()]
    assert len(set(map(tuple, rows))) < len(rows), "some are copies but for the ends of lines"


def test_comparisons_are_measured(tmp_path: Path) -> None:
    benchmark = runpy.run_path(str(SCRIPT))
    benchmark["measure_comparisons"].__globals__["_PART"] = 1 << 17
    peaks = benchmark["measure_comparisons"](tmp_path / "keys", 1)
    assert list(peaks) == ["nothing", "copies", "near", "lines"]
