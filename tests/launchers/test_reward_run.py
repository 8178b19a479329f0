"""A run that learns from rewards, from prompts to its folder: killed in the middle of a rollout, and wrong requests."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launchers.runs import Command, Outcome, Workplace, assert_same_bits, make_workplace
from tests.launchers.test_interrupt import kill_everything

CODE = """
import time
from pathlib import Path

HERE = Path(__file__).parent
calls = 0

def letters(answer, record):
    global calls
    calls += 1
    while calls > 20 and (HERE / "hold").exists():
        (HERE / "reached").touch()
        time.sleep(0.02)
    return len(set(answer)) * record["worth"]

def nan(answer, record):
    return float("nan")

def ends(answer, record):
    raise SystemExit(4)
"""
RL = {"rewards": ["code.py:letters*0.1", "regex:[a-m]"], "group_size": 2, "prompts_per_step": 4, "max_new_tokens": 12}


def spec_of(folder: Path, rl: dict[str, Any], **sections: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24},
        "data": {
            "source": ["prompts.jsonl"],
            "format": "prompts",
            "cache_dir": "cache",
            "tokenizer_vocab_size": 270,
            "held_out_fraction": 0.0,
        },
        "finetune": {"method": "rl", "chat_template": "chatml", "rl": RL | rl},
        "optimizer": {"lr": 3e-3},
        "parallel": {"dp": 2},
        "train": {
            "num_steps": 6,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "seq_len": 96,
            "output_dir": str(folder / "run"),
            "eval_interval": 0,
        },
        "checkpoint": {"interval": 1, "init_from": "base"},
        "launcher": {"device": "cpu", "threads_per_rank": 1, "timeout_s": 200},
        "logging": {"tensorboard": False},
    }
    return spec | {name: {**spec.get(name, {}), **fields} for name, fields in sections.items()}


def rewarded(base: Path, folder: Path, rl: dict[str, Any], **sections: Any) -> Workplace:
    """A folder with a pretrained run, prompts, code and a spec that learns from rewards."""
    shutil.copytree(base, folder / "base", dirs_exist_ok=True)
    records = [{"prompt": f"say {word}", "worth": len(word)} for word in ("one", "two", "three", "four", "eleven")]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "code.py").write_text(CODE)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec_of(folder, rl, **sections)))
    return Workplace(folder)


@contextmanager
def training(workplace: Workplace, *words: str) -> Iterator[Command]:
    with Command.start(workplace.folder, ["train", "spec.yaml", *words]) as command:
        yield command


def train(workplace: Workplace, *words: str) -> Outcome:
    with training(workplace, *words) as command:
        return command.finish()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained on text."""
    steps = {"num_steps": 2, "eval_interval": 0, "seq_len": 96}
    workplace = make_workplace(tmp_path_factory.mktemp("base"), parallel={"tp": 1}, train=steps)
    outcome = workplace.train()
    assert outcome.code == 0, outcome.err
    return workplace.run


def test_a_run_that_is_killed_in_the_middle_of_a_rollout_resumes_bit_for_bit(base: Path, tmp_path: Path) -> None:
    kl = {"kl": 0.1, "top_p": 0.9}
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    unbroken, killed = (rewarded(base, tmp_path / name, kl) for name in ("unbroken", "killed"))
    outcome = train(unbroken, "--allow-code")
    assert outcome.code == 0, outcome.err
    assert "reward " in outcome.out
    (killed.folder / "hold").touch()
    with training(killed, "--allow-code", "--set", "finetune.rl.reward_timeout_s=600") as command:
        command.wait_until(lambda: (killed.folder / "reached").exists())
        kill_everything(command)
    (killed.folder / "hold").unlink()
    saved = killed.saved_steps()
    assert saved
    assert max(saved) < 6
    outcome = train(killed, "--allow-code")
    assert outcome.code == 0, outcome.err
    last = "step-00000006"
    assert_same_bits(killed.checkpoints / last, unbroken.checkpoints / last)
    ours, theirs = ((each.run / "rollouts.jsonl").read_text() for each in (killed, unbroken))
    assert ours == theirs
    lines = [json.loads(line) for line in theirs.splitlines()]
    assert len(lines) == 6 * 8
    assert {line["prompt"].partition(":")[2] for line in lines} == {"1", "2", "3", "4", "5"}
    names = ("loss", "grad_norm", "reward", "kl", "entropy", "clip_share", "answer_tokens")
    figures = [[row[name] for name in names] for row in unbroken.rows()]
    assert [[row[name] for name in names] for row in killed.rows()] == figures


PAIRS = [{"prompt": f"say {n}", "chosen": "yes " * (n % 3 + 1), "rejected": "no"} for n in range(12)]


def test_a_reward_run_gives_the_rewards(base: Path, tmp_path: Path) -> None:
    workplace = rewarded(base, tmp_path, {"rewards": ["scorer/run*2", "length:3"]}, train={"num_steps": 2})
    reward = spec_of(tmp_path / "scorer", {}, model={"score_head": "only"}, train={"num_steps": 2})
    reward["finetune"] = {"method": "reward", "chat_template": "chatml"}
    reward["data"] |= {"source": ["pairs.jsonl"], "format": "preference"}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    (tmp_path / "scorer.yaml").write_text(yaml.safe_dump(reward))
    with Command.start(tmp_path, ["train", "scorer.yaml"]) as command:
        outcome = command.finish()
    assert outcome.code == 0, outcome.err
    outcome = train(workplace)
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (workplace.run / "rollouts.jsonl").read_text().splitlines()]
    scores = [line["rewards"]["scorer/run"] for line in lines]
    assert len(set(scores)) > len(lines) // 2
    assert [
        2 * score + line["rewards"]["length:3"] for score, line in zip(scores, lines, strict=True)
    ] == pytest.approx([line["reward"] for line in lines])


@pytest.mark.parametrize(
    ("rl", "words", "code", "problem"),
    [
        ({}, (), 2, "code.py:letters, which runs that file's code as you; read it, and give --allow-code"),
        (
            {"rewards": ["exact_match"]},
            (),
            2,
            "has no text or number in its field answer, which the reward exact_match",
        ),
        ({"rewards": ["base"]}, (), 2, "base has no score head, so it scores nothing"),
        ({"rewards": ["exactmatch"]}, (), 2, "exactmatch is no reward: it is neither exact_match"),
        ({"rewards": ["code.py:nan"]}, ("--allow-code",), 1, "is nan; it must be finite"),
        ({"rewards": ["code.py:ends"]}, ("--allow-code",), 1, "has ended with exit code 4"),
        ({"max_new_tokens": 90}, ("--allow-code",), 2, "raise train.seq_len, or raise data.max_lost_fraction"),
    ],
)
def test_wrong_requests_are_a_sentence(
    rl: dict[str, Any], words: tuple[str, ...], code: int, problem: str, base: Path, tmp_path: Path
) -> None:
    workplace = rewarded(base, tmp_path, rl)
    outcome = train(workplace, *words)
    assert outcome.code == code, outcome.err
    assert problem in outcome.err
    assert "Traceback" not in outcome.err
    assert not workplace.checkpoints.exists()
