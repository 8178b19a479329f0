"""Adapters learn preferences, rewards and from rewards of sampled answers, beside weights that stay as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launchers.runs import Outcome, Workplace, make_workplace, trimaran
from trimaran.runtime.checkpoint.reshard import Checkpoint

pytestmark = pytest.mark.slow
ADAPTER = {"rank": 4, "alpha": 16.0}
# Without tokens of its own, which a frozen embedding has no rows for.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '\\n' }}{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `base` that was trained on text, pairs and prompts."""
    folder = tmp_path_factory.mktemp("methods")
    train = {"num_steps": 2, "eval_interval": 0, "seq_len": 96}
    workplace = make_workplace(folder, parallel={"tp": 1}, train=train)
    outcome = workplace.train("train.output_dir=base")
    assert outcome.code == 0, outcome.err
    numbers = [f"{tens}{ones}" for tens in "abcd" for ones in "efgh"]
    pairs = [{"prompt": f"say {each} ", "chosen": f"good {each}", "rejected": f"bad {each}"} for each in numbers]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each["prompt"]}) + "\n" for each in pairs))
    (folder / "plain.jinja").write_text(TEMPLATE)
    return folder


def learn(folder: Path, name: str, source: str, finetune: dict[str, Any], **sections: Any) -> tuple[Workplace, Outcome]:
    """Train beside `base` at tp 2 x dp 2 into the folder `name`."""
    spec = yaml.safe_load((folder / "spec.yaml").read_text())
    spec |= {
        "finetune": {"chat_template": "plain.jinja", **finetune, "adapter": ADAPTER},
        "parallel": {"tp": 2, "dp": 2},
    }
    spec["data"] |= {"source": [source]}
    spec["optimizer"] |= {"lr": 0.02}
    spec["checkpoint"] = {"init_from": "base"}
    spec["train"] |= {"num_steps": 3, "output_dir": str(folder / name / "run")}
    for section, fields in sections.items():
        spec[section] |= fields
    (folder / name).mkdir()
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    return Workplace(folder / name), trimaran(folder, "train", f"{name}.yaml")


def learned(workplace: Workplace) -> set[str]:
    """The last parts of the names that the newest checkpoint has."""
    newest = max(workplace.checkpoints.iterdir())
    return {".".join(name.split(".")[-2:]) for name in Checkpoint.open(newest).names()}


def test_preferences_begin_at_the_reference_which_is_the_frozen_base(place: Path) -> None:
    workplace, outcome = learn(place, "preference", "pairs.jsonl", {"method": "preference"})
    assert outcome.code == 0, outcome.err
    rows = workplace.rows()
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[-1]["loss"] < 0.68  # type: ignore[operator]
    assert learned(workplace) == {"adapter.a", "adapter.b"}


def test_a_reward_model_has_a_score_head_beside_its_adapters(place: Path) -> None:
    model = {"score_head": "only"}
    workplace, outcome = learn(place, "reward", "pairs.jsonl", {"method": "reward"}, model=model)
    assert outcome.code == 0, outcome.err
    rows = workplace.rows()
    assert rows[-1]["loss"] < rows[0]["loss"]  # type: ignore[operator]
    assert learned(workplace) == {"adapter.a", "adapter.b", "score.weight"}
    refused = trimaran(place, "export", str(workplace.run), "--adapter")
    assert refused.code == 2
    assert "has learned a score head beside its adapters" in refused.err
    merged = trimaran(place, "export", str(workplace.run), "--merge")
    assert merged.code == 0, merged.err
    config = json.loads((workplace.run / "huggingface" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")


def test_answers_are_sampled_from_the_adapters_that_train(place: Path) -> None:
    """The run stops by itself where a ratio of sampling to training is not 1 before the first update."""
    rl = {"rewards": ["length:4"], "group_size": 4, "prompts_per_step": 2, "max_new_tokens": 8, "kl": 0.05}
    workplace, outcome = learn(place, "rl", "prompts.jsonl", {"method": "rl", "rl": rl}, train={"global_batch_size": 8})
    assert outcome.code == 0, outcome.err
    assert len(workplace.rows()) == 3
    assert learned(workplace) == {"adapter.a", "adapter.b"}
