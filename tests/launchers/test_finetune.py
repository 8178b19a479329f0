"""A run that learns answers, from files to an export: length, vocabulary, resume, and a sentence for wrong files."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.launchers.runs import (
    Hold,
    Outcome,
    Workplace,
    assert_same_bits,
    losses,
    make_workplace,
    tensors,
    trimaran,
)
from tests.launchers.test_interrupt import kill_everything
from tests.launchers.test_other_launchers import run, torchrun
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.spec import load_spec
from trimaran.runtime.train.metrics import read_metrics

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def chats() -> list[dict[str, Any]]:
    """Questions with answers, some over two turns."""
    draw = random.Random(3)
    found = []
    for _ in range(40):
        first, second = draw.choice(NUMBERS), draw.choice(NUMBERS)
        turns = [("user", f"say {first}"), ("assistant", first), ("user", f"and {second}"), ("assistant", second)]
        found.append([{"role": role, "content": text} for role, text in turns[: draw.choice((2, 4))]])
    return [{"messages": each} for each in found]


def spec_of(folder: Path, **sections: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24},
        "data": {
            "source": ["chats.jsonl"],
            "cache_dir": "cache",
            "tokenizer_vocab_size": 270,
            "held_out_fraction": 0.1,
        },
        "finetune": {"chat_template": "chatml", "epochs": 2},
        "optimizer": {"lr": 3e-3},
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "seq_len": 96,
            "output_dir": str(folder / "run"),
            "eval_interval": 4,
        },
        "checkpoint": {"interval": 4, "init_from": "base"},
        "launcher": {"device": "cpu", "threads_per_rank": 1, "timeout_s": 200},
        "logging": {"tensorboard": False},
    }
    return spec | {name: {**spec.get(name, {}), **fields} for name, fields in sections.items()}


def finetuning(base: Path, folder: Path, **sections: Any) -> Workplace:
    """A folder with a pretrained run, chats and a spec that learns from them."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(base, folder / "base", dirs_exist_ok=True)
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats())))
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec_of(folder, **sections)))
    return Workplace(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained on text."""
    train = {"num_steps": 2, "eval_interval": 0, "seq_len": 96}
    workplace = make_workplace(tmp_path_factory.mktemp("base"), parallel={"tp": 1}, train=train)
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    return workplace.run


DROPOUT = {"hidden_dropout": 0.3, "first_hidden_dropout": 0.0}


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, Outcome]:
    workplace = finetuning(base, tmp_path_factory.mktemp("unbroken"), parallel={"dp": 2}, model=DROPOUT)
    return workplace, workplace.train()


def test_epochs_and_the_template_decide_length_and_vocabulary(unbroken: tuple[Workplace, Outcome]) -> None:
    workplace, outcome = unbroken
    assert outcome.code == 0, outcome.err
    assert "  40 of 40 records  used" in outcome.err
    assert "held out: " in outcome.err
    assert "2 tokens that these don't know begin as the mean of the others" in outcome.out
    spec = load_spec(workplace.run / "spec.yaml")
    assert spec.transformer.vocab_size == 272
    rows = workplace.rows()
    assert [row["step"] for row in rows] == list(range(1, spec.train.num_steps + 1))
    assert spec.train.num_steps > 6
    counts = [row["num_losses"] for row in rows]
    assert len(set(counts)) > 2
    held_out = [row for row in read_metrics(workplace.run / "metrics.jsonl") if "held_out_loss" in row]
    assert held_out[-1]["step"] == spec.train.num_steps
    assert held_out[-1]["held_out_loss"] < held_out[0]["held_out_loss"]
    assert "<|im_start|>assistant" in (workplace.run / "sample.txt").read_text()


def test_a_killed_run_resumes_bit_for_bit(unbroken: tuple[Workplace, Outcome], base: Path, tmp_path: Path) -> None:
    workplace = finetuning(base, tmp_path, parallel={"dp": 2}, model=DROPOUT)
    hold = Hold(tmp_path / "hold", 6)
    with workplace.start_training(environment=hold.environment) as command:
        command.wait_until(lambda: hold.reached)
        kill_everything(command)
    assert workplace.saved_steps() == [4]
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    assert losses(workplace) == losses(unbroken[0])
    last = max(unbroken[0].checkpoints.iterdir()).name
    assert_same_bits(workplace.checkpoints / last, unbroken[0].checkpoints / last)


def test_ranks_of_another_launcher_learn_for_as_long_as_the_examples_say(
    unbroken: tuple[Workplace, Outcome], base: Path, tmp_path: Path
) -> None:
    workplace = finetuning(base, tmp_path, parallel={"dp": 2}, model=DROPOUT)
    code, err = run(torchrun("--nproc-per-node", "2"), tmp_path)
    assert code == 0, err
    assert losses(workplace) == losses(unbroken[0])


def test_new_tokens_begin_as_the_mean_of_those_that_are_known(base: Path, tmp_path: Path) -> None:
    workplace = finetuning(base, tmp_path, optimizer={"lr": 1e-12, "weight_decay": 0.0}, finetune={"epochs": 0.01})
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    (step,) = workplace.saved_steps()
    assert step == 1
    before, after = (tensors(max((run / "checkpoints").iterdir())) for run in (base, workplace.run))
    former = before["embedding.weight", "weight"]
    now = after["embedding.weight", "weight"]
    assert (former.shape[0], now.shape[0]) == (270, 272)
    np.testing.assert_allclose(now[:270], former, atol=1e-9)
    np.testing.assert_allclose(now[270:], former.double().mean(0).float().expand(2, -1), atol=1e-7)


def test_an_export_stops_at_the_end_of_a_turn(unbroken: tuple[Workplace, Outcome], tmp_path: Path) -> None:
    workplace, _ = unbroken
    outcome = trimaran(workplace.folder, "export", "run", str(tmp_path / "exported"))
    assert outcome.code == 0, outcome.err
    tokenizer = Tokenizer.load(tmp_path / "exported" / "tokenizer.json")
    end = tokenizer.id_of("<|im_end|>")
    config = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [end, tokenizer.eot_id]
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "Examples from `chats.jsonl`: 40 of 40 records." in card
    assert "apply_chat_template" in card
    from transformers import AutoTokenizer

    peer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    found = peer.apply_chat_template(chats()[0]["messages"], return_dict=True)["input_ids"]
    assert found.count(end) == len(chats()[0]["messages"])


def test_check_shows_examples_token_by_token(base: Path, tmp_path: Path) -> None:
    workplace = finetuning(base, tmp_path)
    outcome = trimaran(workplace.folder, "check", "spec.yaml", "--examples", "2")
    assert outcome.code == 0, outcome.err
    first, second = outcome.out.split("chats.jsonl:")[1:]
    assert first.startswith("1: ")
    assert second.startswith("2: ")
    assert "told once the examples are prepared, by finetune.epochs" in outcome.out
    marked = [part.partition("»")[0].replace("|<|im_end|>", "").replace("|", "") for part in first.split("«")[1:]]
    answers = [turn["content"] for turn in chats()[0]["messages"] if turn["role"] == "assistant"]
    assert marked == answers
    assert not (tmp_path / "cache").exists(), "nothing is prepared"
    prepared = trimaran(workplace.folder, "prepare", "spec.yaml")
    assert prepared.code == 0, prepared.err
    assert "examples: cache/examples/" in prepared.err


@pytest.mark.parametrize(
    ("record", "sections", "words"),
    [
        ({"messages": [{"role": "bot", "content": "x"}]}, {}, 'chats.jsonl:41: turn 1 has the role "bot", which'),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, {}, "chats.jsonl:41: turns 1 and 2 are both"),
        ({"messages": 3}, {}, "chats.jsonl:41: messages must be a list of records with role and content, got 3"),
        (None, {"finetune": {"chat_template": None}}, "chats.jsonl:1 has turns, and the model has no chat template"),
        (None, {"finetune": {"chat_template": "no.jinja"}}, "finetune.chat_template 'no.jinja' can't be read"),
        (None, {"train": {"seq_len": 16}}, "records would be left out: more tokens than train.seq_len (first "),
        (None, {"train": {"num_steps": 3}}, "steps, and train.num_steps is 3; leave one of them out"),
        (None, {"lr_schedule": {"warmup_steps": 5000}}, "warmup_steps (5000) must be smaller than num_steps ("),
        (None, {"data": {"tokenizer_vocab_size": 300}}, "model.vocab_size: 270 -> 300\nset these fields as they are"),
        (None, {"finetune": {"adapter": {"rank": 2}}}, "writes 2 tokens more than the 270 that the model has, and"),
        (None, {"data": {"source": ["none.jsonl"]}}, "data.source 'none.jsonl' does not exist"),
    ],
)  # fmt: skip
def test_wrong_examples_are_a_sentence_before_any_rank_starts(
    record: Any, sections: dict[str, Any], words: str, base: Path, tmp_path: Path
) -> None:
    workplace = finetuning(base, tmp_path, **sections)
    if record is not None:
        with (tmp_path / "chats.jsonl").open("a") as file:
            file.write("\n" + json.dumps(record))
    outcome = workplace.train()
    assert outcome.code == 2
    assert words in outcome.err
    assert "Traceback" not in outcome.err
    assert not workplace.checkpoints.exists()
