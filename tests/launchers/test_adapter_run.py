"""Adapters from the command line: a run beside a base, resumed, refused, generated from, exported and imported."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.launchers.runs import Outcome, Workplace, assert_same_bits, losses, make_workplace, trimaran
from trimaran.runtime.checkpoint.reshard import Checkpoint

pytestmark = pytest.mark.slow
LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}


@dataclass(frozen=True)
class Adapted:
    """A workplace whose `run` trained adapters, and what its commands printed; `base` beside it has all weights."""

    workplace: Workplace
    outcome: Outcome

    @property
    def folder(self) -> Path:
        return self.workplace.folder

    def train(self, *overrides: str) -> Outcome:
        return self.workplace.train(*overrides)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    folder = tmp_path_factory.mktemp("adapted")
    model = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24, **LLAMA}
    train = {"num_steps": 6, "eval_interval": 0}
    workplace = make_workplace(folder, model=model, train=train, checkpoint={"interval": 3})
    base = workplace.train("train.output_dir=base")
    assert base.code == 0, base.err
    lines = (folder / "corpus.txt").read_text().splitlines()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:200]))
    spec = yaml.safe_load((folder / "spec.yaml").read_text())
    spec["data"]["source"] = ["texts.jsonl"]
    spec["checkpoint"]["init_from"] = "base"
    adapter = {"rank": 4, "dropout": 0.1, "targets": ["attention.q", "attention.kv", "mlp"]}
    spec["finetune"] = {"truncation": "right", "adapter": adapter}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return Adapted(workplace, workplace.train("optimizer.lr=0.02"))


def copy_of(adapted: Adapted, folder: Path) -> Adapted:
    shutil.copytree(adapted.folder, folder, dirs_exist_ok=True)
    text = (folder / "spec.yaml").read_text().replace(str(adapted.folder), str(folder))
    (folder / "spec.yaml").write_text(text)
    return Adapted(Workplace(folder), adapted.outcome)


def test_a_run_saves_adapters_alone_and_names_its_base(adapted: Adapted) -> None:
    assert adapted.outcome.code == 0, adapted.outcome.err
    assert "adapters of the frozen weights of base/checkpoints/step-00000006" in adapted.outcome.out
    checkpoint = Checkpoint.open(adapted.workplace.checkpoints / "step-00000006")
    layers = [f"layers.{i}.{name}" for i in (0, 1) for name in ("attention.kv", "attention.q", "mlp.down", "mlp.up")]
    assert checkpoint.names() == sorted(f"{layer}.adapter.{each}" for layer in layers for each in ("a", "b"))
    base = checkpoint.state["base"]
    whole = Checkpoint.open(adapted.folder / "base" / "checkpoints" / "step-00000006")
    assert base == {"source": "base", "folder": str(whole.path), "sha256": whole.digest}
    rows = adapted.workplace.rows()
    assert len({row["loss"] for row in rows}) == 6


def test_check_counts_what_learns(adapted: Adapted) -> None:
    checkpoint = Checkpoint.open(adapted.workplace.checkpoints / "step-00000006")
    count = sum(checkpoint.read_global(name, "weight").numel() for name in checkpoint.names())
    told = trimaran(adapted.folder, "check", "spec.yaml")
    assert told.code == 0, told.err
    assert f"{count:,} parameters of rank 4 beside attention.q, attention.kv, mlp" in " ".join(told.out.split())


def test_a_resumed_run_has_the_same_bits(adapted: Adapted, tmp_path: Path) -> None:
    again = copy_of(adapted, tmp_path)
    shutil.rmtree(again.workplace.checkpoints / "step-00000006")
    outcome = again.train("optimizer.lr=0.02")
    assert outcome.code == 0, outcome.err
    assert "resuming at step 3" in outcome.out
    assert losses(again.workplace) == losses(adapted.workplace)
    last = "step-00000006"
    assert_same_bits(again.workplace.checkpoints / last, adapted.workplace.checkpoints / last)


def test_another_layout_resumes_and_another_base_or_rank_is_refused(adapted: Adapted, tmp_path: Path) -> None:
    again = copy_of(adapted, tmp_path)
    shutil.rmtree(again.workplace.checkpoints / "step-00000006")
    shutil.copytree(again.folder / "base", again.folder / "other")
    shutil.rmtree(again.folder / "other" / "checkpoints" / "step-00000006")
    for override, said in (
        ("checkpoint.init_from=other", "other holds other weights"),
        ("finetune.adapter.rank=3", "finetune.adapter.rank: 4 -> 3"),
        ("finetune=null", "finetune.adapter"),
    ):
        outcome = again.train("optimizer.lr=0.02", override)
        assert outcome.code == 2, outcome.out
        assert said in outcome.err
        assert "Traceback" not in outcome.err
    outcome = again.train("optimizer.lr=0.02", "parallel.tp=1", "parallel.pp=2", "zero.stage=3")
    assert outcome.code == 0, outcome.err
    for found, expected in zip(losses(again.workplace), losses(adapted.workplace), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_text_comes_straight_from_the_run_and_exports_load(adapted: Adapted, tmp_path: Path) -> None:
    run = str(adapted.workplace.run)
    arguments = ("--prompt", "To be", "--max-new-tokens", "12", "--temperature", "0")
    text = trimaran(adapted.folder, "generate", run, *arguments)
    assert text.code == 0, text.err
    merged = trimaran(adapted.folder, "export", run, str(tmp_path / "merged"), "--merge")
    assert merged.code == 0, merged.err
    assert "logits of transformers and of this runtime agree" in merged.err
    alone = trimaran(adapted.folder, "export", run, str(tmp_path / "adapter"), "--adapter")
    assert alone.code == 0, alone.err
    assert "adapters of rank 4 beside 12 layers of LlamaForCausalLM" in alone.err
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.1
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.mlp.gate_proj.lora_A.weight" in names
    back = trimaran(adapted.folder, "import", str(tmp_path / "adapter"), "back", "--base", "base")
    assert back.code == 0, back.err
    again = trimaran(adapted.folder, "generate", "back", *arguments)
    assert again.out == text.out
    assert trimaran(adapted.folder, "generate", "base", *arguments).out != text.out


def test_what_can_not_be_exported_is_told(adapted: Adapted) -> None:
    for arguments, said in (
        (("export", "base", "--adapter"), "has no adapters, for it trained all weights"),
        (("export", "base", "--merge"), "has no adapters to merge"),
        (("export", str(adapted.workplace.run), "--merge", "--adapter"), "give one of them"),
    ):
        outcome = trimaran(adapted.folder, *arguments)
        assert outcome.code == 2
        assert said in outcome.err
