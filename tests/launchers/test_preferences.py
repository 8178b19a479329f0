"""Runs that learn from pairs, from files to scores: statistics, the reference, resume, and sentences for bad files."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launchers.runs import Hold, Workplace, assert_same_bits, losses, make_workplace, trimaran
from tests.launchers.test_interrupt import kill_everything
from trimaran.runtime.train.metrics import read_metrics

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
STATISTICS = {"accuracy", "margin", "chosen_reward", "rejected_reward"}


def pairs() -> list[dict[str, Any]]:
    """Numbers are called good, and never bad."""
    draw = random.Random(3)
    found = []
    for _ in range(40):
        number = draw.choice(NUMBERS)
        found.append({"prompt": f"say {number}", "chosen": f"good {number}", "rejected": f"bad {number}"})
    return found


def preferring(base: Path, folder: Path, records: list[dict[str, Any]] | None = None, **sections: Any) -> Workplace:
    """A folder with a pretrained run, pairs and a spec that learns from them."""
    spec: dict[str, Any] = {
        "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24},
        "data": {
            "source": ["pairs.jsonl"],
            "cache_dir": "cache",
            "tokenizer_vocab_size": 270,
            "held_out_fraction": 0.2,
        },
        "finetune": {"method": "preference", "chat_template": "chatml"},
        "optimizer": {"lr": 1e-2},
        "train": {
            "num_steps": 6,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "seq_len": 96,
            "output_dir": str(folder / "run"),
            "eval_interval": 3,
        },
        "checkpoint": {"interval": 3, "init_from": "base"},
        "launcher": {"device": "cpu", "threads_per_rank": 1, "timeout_s": 200},
        "logging": {"tensorboard": False},
    }
    spec |= {name: {**spec.get(name, {}), **fields} for name, fields in sections.items()}
    shutil.copytree(base, folder / "base", dirs_exist_ok=True)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs() if records is None else records)))
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return Workplace(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained on text."""
    train = {"num_steps": 2, "eval_interval": 0, "seq_len": 96}
    workplace = make_workplace(tmp_path_factory.mktemp("base"), parallel={"tp": 1}, train=train)
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    return workplace.run


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    workplace = preferring(base, tmp_path_factory.mktemp("unbroken"), parallel={"dp": 2})
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    assert "computed the reference's log-probabilities of 80 answers" in outcome.out
    return workplace


def held_out_of(workplace: Workplace) -> list[dict[str, Any]]:
    return [row for row in read_metrics(workplace.run / "metrics.jsonl") if "held_out_loss" in row]


def test_deepspeed_learns_the_same_preferences_and_goes_on(unbroken: Workplace, base: Path, tmp_path: Path) -> None:
    workplace = preferring(base, tmp_path, parallel={"dp": 2})
    places = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    for steps in (3, 6):  # the second start resumes
        outcome = workplace.train(
            f"train.num_steps={steps}",
            "lr_schedule.decay_steps=6",
            "zero.backend=deepspeed",
            "zero.stage=2",
            environment=places,
        )
        assert outcome.code == 0, outcome.err
        assert "the optimizer is DeepSpeed" in outcome.out
    found, expected = ([row["loss"] for row in each.rows()] for each in (workplace, unbroken))
    assert found == pytest.approx(expected, rel=1e-4)
    held_out = [held_out_of(each)[-1]["held_out_loss"] for each in (workplace, unbroken)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


def test_preferences_are_learned_and_told(unbroken: Workplace) -> None:
    rows = unbroken.rows()
    assert len(rows) == 6
    assert all(row.keys() >= STATISTICS for row in rows)
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert rows[-1]["loss"] < 0.6
    held_out = held_out_of(unbroken)
    assert [row["step"] for row in held_out] == [3, 6]
    assert all(
        row.keys() == {"step", "held_out_loss", *(f"held_out_{name}" for name in STATISTICS)} for row in held_out
    )
    assert held_out[-1]["held_out_accuracy"] == 1.0
    assert held_out[-1]["held_out_margin"] > 0.2
    page = (unbroken.run / "report.html").read_text()
    section = page.partition("Comparisons of answers")[2].partition("</section>")[0]
    assert section.count('class="chart"') == 3
    assert "Held-out accuracy" in page
    assert "perplexity" not in page


def test_a_killed_run_resumes_bit_for_bit_with_the_reference_of_its_beginning(
    unbroken: Workplace, base: Path, tmp_path: Path
) -> None:
    workplace = preferring(base, tmp_path, parallel={"dp": 2})
    hold = Hold(tmp_path / "hold", 5)
    with workplace.start_training(environment=hold.environment) as command:
        command.wait_until(lambda: hold.reached)
        kill_everything(command)
    assert workplace.saved_steps() == [3]
    shutil.rmtree(tmp_path / "cache" / "reference")
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    assert "log-probabilities of the reference: " in outcome.out
    assert losses(workplace) == losses(unbroken)
    last = max(unbroken.checkpoints.iterdir()).name
    assert_same_bits(workplace.checkpoints / last, unbroken.checkpoints / last)


def test_a_reward_run_scores_pairs_and_conversations_at_any_layout(base: Path, tmp_path: Path) -> None:
    reward = {"method": "reward", "centering": 0.01}
    workplace = preferring(base, tmp_path, parallel={"tp": 2}, model={"score_head": "only"}, finetune=reward)
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    assert "scores: trimaran score " in outcome.err
    assert held_out_of(workplace)[-1]["held_out_accuracy"] == 1.0
    judged = pairs()[:3]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, judged)))
    chats = [
        {"messages": [{"role": "user", "content": each["prompt"]}, {"role": "assistant", "content": each[which]}]}
        for each in judged
        for which in ("chosen", "rejected")
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    alone = trimaran(tmp_path, "score", "run", "some.jsonl")
    assert alone.code == 0, alone.err
    assert "the chosen answer has the higher score in 3 of 3 pairs" in alone.err
    of_pairs = [json.loads(line) for line in alone.out.splitlines()]
    assert [row["line"] for row in of_pairs] == [1, 2, 3]
    cut = trimaran(tmp_path, "score", "run", "chats.jsonl", "--pp", "2", "--dp", "2")
    assert cut.code == 0, cut.err
    found = [json.loads(line)["score"] for line in cut.out.splitlines()]
    expected = [row[which] for row in of_pairs for which in ("chosen", "rejected")]
    assert found == pytest.approx(expected, abs=1e-5)
    refused = trimaran(tmp_path, "generate", "run")
    assert (refused.code, "scores answers and writes none" in refused.err) == (2, True)


def rated(*labels: bool) -> list[dict[str, Any]]:
    return [{"prompt": f"say {n}", "completion": f"{n}", "label": label} for n, label in enumerate(labels)]


KTO = {"preference": {"loss": "kto"}}
EQUAL = {"prompt": "say one", "chosen": "one", "rejected": "one"}


@pytest.mark.parametrize(
    ("records", "finetune", "words"),
    [
        ([{"prompt": "say one", "rejected": "two"}], {}, "pairs.jsonl:1: chosen is missing"),
        ([{**pairs()[0], "margin": "much"}], {}, 'pairs.jsonl:1: margin must be a finite number, got "much"'),
        ([{**pairs()[0], "margin": float("nan")}], {}, "pairs.jsonl:1: "),
        ([EQUAL] * 5, {}, "chosen and rejected are equal, so nothing can be preferred"),
        ([{**pairs()[0], "prompt": "say " * 200}] * 5, {}, "left out: more tokens than train.seq_len"),
        (rated(True, True, True, True), KTO, "kto learns from good and from bad answers, and all "),
        (rated(True, False, True, False), {}, "finetune.preference.loss dpo learns from pairs of a chosen"),
        (pairs(), {"preference": {"reference": "none"}}, "none does not exist; give the folder of a run that"),
        (pairs(), KTO, "is a pair, and finetune.preference.loss kto learns from single answers"),
    ],
)  # fmt: skip
def test_wrong_pairs_are_a_sentence_before_any_rank_starts(
    records: list[dict[str, Any]], finetune: dict[str, Any], words: str, base: Path, tmp_path: Path
) -> None:
    section = {"method": "preference", "chat_template": "chatml", **finetune}
    workplace = preferring(base, tmp_path, records, finetune=section)
    outcome = workplace.train()
    assert outcome.code == 2
    assert words in outcome.err
    assert "Traceback" not in outcome.err
    assert not workplace.checkpoints.exists()


def test_only_a_reward_run_scores(unbroken: Workplace) -> None:
    outcome = trimaran(unbroken.folder, "score", "run", "pairs.jsonl")
    assert outcome.code == 2
    assert "run has no score head, so it scores nothing" in outcome.err
