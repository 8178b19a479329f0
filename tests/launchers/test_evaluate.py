"""`trimaran evaluate` on small runs: what it prints and writes, at any layout, interrupted, and to what it says no."""

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launchers.drawn_run import Answer, drawn_run, invoke, tokenizer_of_words
from tests.launchers.runs import text_of, trimaran
from tests.launchers.test_report import Outline
from tests.runtime.evaluate.evaluation_files import write_sets
from tests.runtime.huggingface.huggingface_folders import llama, saved
from trimaran.runtime.evaluate.engine.requests import Likelihood, LikelihoodScore
from trimaran.runtime.evaluate.engine.scorer import Scorer
from trimaran.runtime.evaluate.results import read_evaluation
from trimaran.runtime.folder_lock import NO_JOB, FolderLock
from trimaran.runtime.train.train_context import TrainContext

CONTEXT = 128


def move(context: TrainContext, step: int) -> None:
    """Give the weights of a step a pattern of its own."""
    for stage in context.stages.values():
        for parameter in stage.parameters():
            parameter.data.add_(torch.sin(torch.arange(parameter.numel()) + step).view_as(parameter), alpha=0.1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, evaluation sets and two texts."""
    folder = tmp_path_factory.mktemp("evaluate")
    drawn_run(folder / "run", tokenizer_of_words(), CONTEXT, init_std=0.3, steps=(10, 20), change=move)
    write_sets(folder / "sets")
    (folder / "a.txt").write_text(text_of(40))
    (folder / "b.txt").write_text(text_of(60)[::-1])
    return folder


@pytest.fixture
def evaluate(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    monkeypatch.chdir(place)
    return partial(invoke, "evaluate")


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())["results"]
    return {task: {name: value for name, value in row.items() if "," in name} for task, row in found.items()}


def test_texts_and_tasks_are_shown_and_written(place: Path, evaluate: Callable[..., Answer]) -> None:
    tasks = ("--tasks", "arc_easy,gsm8k", "--data", "sets", "--limit", "5", "--gen", "max_gen_toks=4", "--samples")
    found = evaluate("run", "--text", "a.txt", "--text", "b.txt", *tasks, "--num-fewshot", "0")
    assert found.code == 0, found.err
    for words in ("arc_easy", "acc_norm ↑", "bits_per_byte ↓", "exact_match", "--limit 5: 10 of 24 documents"):
        assert words in found.out, words
    folder = (
        place / "run" / "evaluations" / "text-a+text-b+arc_easy+gsm8k-limit-5-num-fewshot-0-gen-max_gen_toks=4-step-20"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "results.json", "samples.jsonl"]
    again = read_evaluation(folder)
    assert again.results["layout"] == {"tp": 1, "pp": 1, "dp": 1}
    assert again.results["checkpoint"] == {"model": "run", "step": 20, "tokens_seen": 20000}
    assert again.results["hashes"].keys() == {"weights", "tokenizer", "tasks", "data", "texts", "samples"}
    assert {"trimaran", "torch", "lm_eval"} <= again.results["software"].keys()
    assert {task: len(samples) for task, samples in again.samples.items()} == {"text": 2, "arc_easy": 5, "gsm8k": 10}
    assert "arguments" in again.samples["arc_easy"][0]
    page = Outline((folder / "report.html").read_text())
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    for words in ("Evaluation of run step 20", "--limit 5", "95% interval", "bits_per_character"):
        assert words in page.text


def test_every_layout_and_batch_size_gives_the_same_scores(place: Path, evaluate: Callable[..., Answer]) -> None:
    asked = ("run", "--text", "a.txt", "--text", "b.txt")
    assert evaluate(*asked, "--output", "one").code == 0
    assert evaluate(*asked, "--output", "seven", "--batch-size", "7").code == 0
    ranks = trimaran(place, "evaluate", *asked, "--output", "ranks", "--tp", "2", "--dp", "2")
    assert ranks.code == 0, ranks.err
    for name in ("seven", "ranks"):
        assert metrics(place / name)["text"] == pytest.approx(metrics(place / "one")["text"], rel=1e-5)
    assert read_evaluation(place / "ranks").results["layout"] == {"tp": 2, "pp": 1, "dp": 2}
    assert "bits_per_byte" in ranks.out


def test_a_hugging_face_folder_and_tasks_on_several_ranks(place: Path, evaluate: Callable[..., Answer]) -> None:
    """Likelihoods and texts of four ranks are those of one process."""
    folder = saved(llama(max_position_embeddings=256), place / "hub" / "model", tokenizer=True)
    asked = (str(folder), "--tasks", "piqa,gsm8k", "--data", "sets", "--limit", "4", "--num-fewshot", "0")
    asked = (*asked, "--gen", "max_gen_toks=4", "--samples")
    alone = evaluate(*asked, "--output", "hub-one")
    assert alone.code == 0, alone.err
    ranks = trimaran(place, "evaluate", *asked, "--output", "hub-ranks", "--pp", "2", "--dp", "2")
    assert ranks.code == 0, ranks.err
    assert read_evaluation(place / "hub-ranks").results["checkpoint"]["step"] is None
    one, other = (read_evaluation(place / name).samples for name in ("hub-one", "hub-ranks"))
    for task in ("piqa", "gsm8k"):
        for left, right in zip(one[task], other[task], strict=True):
            if task == "gsm8k":
                assert left["resps"] == right["resps"]
                continue
            pairs = zip(left["resps"], right["resps"], strict=True)
            assert all(abs(a[0][0] - b[0][0]) < 1e-4 and a[0][1] == b[0][1] for a, b in pairs)
    assert metrics(place / "hub-one") == metrics(place / "hub-ranks")


def test_two_commands_do_not_share_a_folder(place: Path, evaluate: Callable[..., Answer]) -> None:
    with FolderLock.of_run(place / "busy", "trimaran evaluate", NO_JOB):
        found = evaluate("run", "--text", "a.txt", "--output", "busy")
    assert found.code == 2
    assert "busy is in use: `trimaran evaluate` on host" in found.err
    assert not (place / "busy").exists()


def test_a_file_that_is_in_the_way_and_another_tokenizer_are_told(
    place: Path, evaluate: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "out" / "results.json").mkdir(parents=True)
    found = evaluate("run", "--text", "a.txt", "--output", str(tmp_path / "out"))
    assert found.code == 2
    assert "results.json is a folder, in the place of a file of the results; remove it" in found.err
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    (run / "data_manifest.json").write_text(json.dumps({"tokenizer": {"sha256": "0" * 64}}))
    found = evaluate(str(run), "--text", "a.txt")
    assert found.code == 2
    assert "tokenizer.json is not the tokenizer that the run was trained with" in found.err


def test_several_models_are_compared_over_the_same_documents(place: Path, evaluate: Callable[..., Answer]) -> None:
    other = "run/checkpoints/step-00000010"
    found = evaluate("run", other, "--tasks", "arc_easy", "--data", "sets", "--output", "compared")
    assert found.code == 0, found.err
    assert "verdict" in found.out
    assert "run step 20" in found.out
    assert "step-00000010 step 10" in found.out
    page = Outline((place / "compared" / "run-step-20" / "report.html").read_text())
    assert "step-00000010 step 10 beside run step 20" in page.text
    assert "bootstrap" in page.text


def test_checkpoints_are_drawn_over_tokens(place: Path, evaluate: Callable[..., Answer]) -> None:
    found = evaluate("run", "--text", "b.txt", "--checkpoints", "all", "--stride", "100")
    assert found.code == 0, found.err
    page = Outline((place / "run/evaluations/text-b-stride-100-step-20/report.html").read_text())
    assert "Scores of the checkpoints" in page.text
    assert "tokens" in page.text
    folders = [place / "run" / "evaluations" / f"text-b-stride-100-step-{step}" for step in (10, 20)]
    assert len({metrics(folder)["text"]["bits_per_byte,none"] for folder in folders}) == 2


def test_an_interrupted_evaluation_goes_on(
    place: Path, evaluate: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = Scorer.likelihoods

    def interrupted(self: Scorer, requests: Sequence[Likelihood], done: Callable[[int, LikelihoodScore], None]) -> Any:
        def take(number: int, score: LikelihoodScore) -> None:
            done(number, score)
            asked.append(number)
            if len(asked) == 11:
                signal.raise_signal(signal.SIGTERM)

        return real(self, requests, take)

    monkeypatch.setattr(Scorer, "likelihoods", interrupted)
    command = ("run", "--tasks", "piqa", "--data", "sets", "--output", "interrupted", "--batch-size", "1")
    stopped = evaluate(*command)
    assert stopped.code == 143
    assert "by SIGTERM; interrupted/answers.jsonl has 11 answers, and the same command goes on" in stopped.err
    assert not (place / "interrupted" / "results.json").exists()
    assert evaluate(*command).code == 0
    needed = len(asked)
    assert not (place / "interrupted" / "answers.jsonl").exists()
    assert evaluate(*command[:-4], "--output", "whole").code == 0
    assert len(asked) == 2 * needed, "none is asked twice"
    assert metrics(place / "interrupted") == metrics(place / "whole")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("run",), "nothing to evaluate: give --text FILE, or --tasks"),
        (("run", "--text", "a.txt", "--limit", "3"), "--limit is for --tasks"),
        (("run", "--tasks", "piqa", "--stride", "3"), "--stride is for --text"),
        (("run", "--text", "a.txt", "--stride", "129"), "--stride (129) must be from 1 to the model's context of 128"),
        (("run", "--text", "none.txt"), "none.txt: No such file"),
        (("run", "--text", "a.txt", "--batch-size", "0"), "--batch-size (0) must be auto or a whole number"),
        (("run", "--tasks", "piqa", "--data", "sets", "--gen", "x"), "--gen (x) must be NAME=VALUE"),
        (("run", "--tasks", "arc_esay", "--data", "sets"), "arc_easy"),
        (("run", "--tasks", "piqa", "--data", "sets", "--limit", "nan"), "--limit (nan) must be a whole number of"),
        (("run", "--tasks", "piqa", "--data", "sets", "--gen", "top_k=3"), "--gen is for tasks whose answers are"),
        (("run", "--text", "a.txt", "--checkpoints", ","), "--checkpoints (,) must be all, or steps with commas"),
        (("run", "--tasks", "piqa", "--data", "none"), "none"),
        (("run", "--tasks", "piqa", "--data", "sets", "--apply-chat-template"), "has no chat template"),
        (("run", "--text", "a.txt", "--tp", "3"), "tp (3)"),
        (("run", "--text", "a.txt", "--checkpoints", "15"), "no whole checkpoint of step 15; it has those of 10, 20"),
        (("nowhere", "--text", "a.txt"), "nowhere"),
        (("sets", "--text", "a.txt"), "no whole checkpoint"),
        (("run", "run", "--text", "a.txt"), "run is given twice"),
        (("run", "--text", "a.txt", "--output", "a.txt"), "--output a.txt can't be made, because a.txt is a file"),
    ],
)
def test_wrong_options_are_a_sentence_before_weights_load(
    evaluate: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr("trimaran.launchers.worker.evaluate.load_stages", None)
    found = evaluate(*options)
    assert found.code == 2, found.err
    assert words in found.err
    assert found.out == ""
    assert len(found.err.splitlines()) == 1 or "1 error in" in found.err


def test_a_text_that_the_tokenizer_changes_and_weights_that_are_not_numbers(
    place: Path, evaluate: Callable[..., Answer], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    inner = json.loads((run / "tokenizer.json").read_text())
    (run / "tokenizer.json").write_text(json.dumps(inner | {"normalizer": {"type": "Lowercase"}}))
    (tmp_path / "c.txt").write_text("many A words\nB")
    found = evaluate(str(run), "--text", str(tmp_path / "c.txt"))
    assert found.code == 0, found.err
    assert "the tokenizer does not return this text as it is: 2 characters (2 bytes) of 14 differ" in found.err
    assert "first at line 1, column 6" in found.err
