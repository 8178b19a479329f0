"""benchmarks/data_engine.py: both sides' work on pages, the engines' ids, and what is seen of a command's processes."""

import gzip
import json
import runpy
import sys
from pathlib import Path

import pytest

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
