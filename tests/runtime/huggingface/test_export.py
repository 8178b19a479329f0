"""A run becomes a folder that transformers loads: same weights and logits, standard names, its tokenizer and a card."""

import json
import math
import runpy
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.encoders import xlnet
from tests.models.huggingface_models import SMALL_MODELS
from tests.runtime.huggingface.huggingface_folders import (
    HIDDEN,
    TEMPLATE,
    VOCAB,
    gpt2,
    llama,
    logits_of,
    parameters_of,
    saved,
    tokenizer_of,
    weights_of,
)
from trimaran.models.parallel.shard import ShardPiece, whole
from trimaran.models.transformer import parameter_shapes
from trimaran.runtime.checkpoint.store import save_in_parts
from trimaran.runtime.huggingface.exporting import ExportOptions, export_model, shards_of
from trimaran.runtime.huggingface.importing import import_model
from trimaran.runtime.huggingface.progress import Progress
from trimaran.runtime.huggingface.proof import ProofError
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.state import TrainState

TOKENS = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA and its run, in one folder."""
    place = tmp_path_factory.mktemp("imported")
    import_model(saved(llama(), place / "model", tokenizer=True), place / "run")
    return place


def make_run(
    folder: Path,
    model: dict[str, Any],
    *,
    tokenizer: bool = True,
    step: int = 40,
    finetune: dict[str, Any] | None = None,
) -> Path:
    """A run as training leaves it, with drawn weights, metrics and a manifest of its data."""
    shape = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_heads": 4,
        "ffn_hidden_size": 48,
        "vocab_size": VOCAB,
        "max_seq_len": 64,
    }
    spec = parse_spec(
        {
            "model": {**shape, **model},
            "data": {"source": ["my-texts"], "tokenizer_vocab_size": VOCAB, "tokenizer": finetune and "tokenizer.json"},
            "finetune": finetune,
            "optimizer": {"lr": 0.003},
            "train": {
                "num_steps": 60,
                "global_batch_size": 4,
                "micro_batch_size": 1,
                "seq_len": 16,
                "output_dir": str(folder),
            },
        }
    )
    write_weights(folder, spec, step)
    if tokenizer:
        tokenizer_of(VOCAB).save(folder / "tokenizer.json")
    rows = [{"step": n, "loss": 5.0 - n / 20, "tokens_seen": 64 * n} for n in range(1, 61)]
    rows += [
        {"step": 40, "held_out_loss": 3.25, "held_out_perplexity": 25.79},
        {"step": 60, "held_out_loss": 1.0, "held_out_perplexity": 2.7},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = {
        "source": {"named": ["texts/corpus.txt"]},
        "corpus": {"documents": 1234, "characters": 567890, "dropped": {"empty document": 3}},
        "splits": {"train": {"tokens": 99000}, "held_out": {"tokens": 1000}},
    }
    (folder / "data_manifest.json").write_text(json.dumps(manifest))
    return folder


def write_weights(folder: Path, spec: RunSpec, step: int, factor: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    pieces = [
        ShardPiece(name, "weight", factor * torch.randn(shape, generator=generator).flatten(), whole(shape), shape, 0)
        for name, shape in parameter_shapes(spec.transformer).items()
    ]
    state = {**asdict(TrainState(step, 64 * step)), "seed": 1, "layout": {}, "spec": spec.model_dump(mode="json")}
    save_in_parts(folder / "checkpoints", step, [pieces], state)


def assert_nothing_left(place: Path, *allowed: str) -> None:
    assert sorted(path.name for path in place.iterdir()) == sorted(allowed)


# --- round trips


def test_a_round_trip_gives_the_same_weights_and_logits(imported: Path, tmp_path: Path) -> None:
    exported = export_model(imported / "run", tmp_path / "out", ExportOptions())
    before, after = weights_of(imported / "model"), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits_of(imported / "model", TOKENS), logits_of(tmp_path / "out", TOKENS))
    assert (exported.architecture, exported.dtype) == ("LlamaForCausalLM", "float32")
    assert all(agreement.holds for agreement in exported.agreements)
    assert len(exported.agreements) == 2


def test_what_stood_beside_the_weights_is_there_again(imported: Path, tmp_path: Path) -> None:
    export_model(imported / "run", tmp_path / "out", ExportOptions())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (imported / "model" / name).read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (imported / "model", tmp_path / "out")
    )
    for name in (
        "bos_token_id",
        "eos_token_id",
        "model_type",
        "hidden_size",
        "num_key_value_heads",
        "rms_norm_eps",
        "architectures",
    ):
        assert before[name] == after[name]
    assert after["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_proven_to_the_same_tolerance(imported: Path, tmp_path: Path, dtype: str) -> None:
    """Both sides compute in float32 from the rounded weights, so only the order of sums differs."""
    exported = export_model(imported / "run", tmp_path / "out", ExportOptions(dtype=dtype))  # type: ignore[arg-type]
    wanted = getattr(torch, dtype)
    before, after = weights_of(imported / "model"), weights_of(tmp_path / "out")
    assert all(torch.equal(before[name].to(wanted), after[name]) for name in before)
    assert all(agreement.max_error < 1e-5 * agreement.scale for agreement in exported.agreements)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == wanted


def test_a_bfloat16_model_stays_one(tmp_path: Path) -> None:
    import_model(saved(gpt2().bfloat16(), tmp_path / "model"), tmp_path / "run")
    assert export_model(tmp_path / "run", tmp_path / "out", ExportOptions()).dtype == "bfloat16"
    before, after = weights_of(tmp_path / "model"), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["gemma", "opt", "xlnet"])
def test_what_the_parameters_cannot_hold_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    """Gemma's norms lose bits in 1 + w; of OPT and XLNet the network has no place for some tensors."""
    said: list[str] = []
    model = xlnet() if name == "xlnet" else SMALL_MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)), alpha=0.01)
    saved(model, tmp_path / "model")  # type: ignore[arg-type]
    import_model(tmp_path / "model", tmp_path / "run", progress=Progress(said.append))
    export_model(tmp_path / "run", tmp_path / "out", ExportOptions())
    before, after = weights_of(tmp_path / "model"), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)
    assert any("are kept in import.safetensors" in text for text in said)

    (tmp_path / "run" / "import.safetensors").unlink()
    export_model(tmp_path / "run", tmp_path / "without", ExportOptions(), Progress(said.append))
    lost = [each for each, tensor in weights_of(tmp_path / "without").items() if not torch.equal(tensor, before[each])]
    assert lost, "without the originals numbers change: the test can fail"
    assert any("zeros are written" in text for text in said) == (name != "gemma")


def test_numbers_that_training_has_changed_are_exported(tmp_path: Path) -> None:
    """Of a table of positions the two rows that no position reads, and no other, are those of the imported model."""
    saved(SMALL_MODELS["opt"](), tmp_path / "model")
    spec = import_model(tmp_path / "model", tmp_path / "run").spec
    write_weights(tmp_path / "run", spec, 5)
    export_model(tmp_path / "run", tmp_path / "out", ExportOptions())
    name = "model.decoder.embed_positions.weight"
    before, after = weights_of(tmp_path / "model")[name], weights_of(tmp_path / "out")[name]
    assert torch.equal(before[:2], after[:2])
    assert torch.equal(after[2:], parameters_of(tmp_path / "run")["position"])


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    write_weights(run, parse_spec_of(run), 41, factor=math.nan)
    with pytest.raises(ConversionError, match=r"model.embed_tokens.weight holds infinite values or NaN"):
        export_model(run, tmp_path / "out", ExportOptions())
    assert_nothing_left(tmp_path, "run")


def test_values_that_float16_lacks_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    write_weights(run, parse_spec_of(run), 41, factor=1e6)
    with pytest.raises(ConversionError, match=r"beyond float16's largest, 65504; export with --dtype bfloat16"):
        export_model(run, tmp_path / "out", ExportOptions(dtype="float16"))
    assert_nothing_left(tmp_path, "run")


def parse_spec_of(run: Path) -> RunSpec:
    from trimaran.runtime.train.init_from import open_weights
    from trimaran.runtime.train.state import spec_of

    return spec_of(open_weights(run)[0])


def test_shards_have_standard_names_and_an_index(imported: Path, tmp_path: Path) -> None:
    export_model(imported / "run", tmp_path / "out", ExportOptions(shard_bytes=30_000))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    after = weights_of(tmp_path / "out")
    assert index["weight_map"].keys() == after.keys()
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert torch.equal(logits_of(imported / "model", TOKENS), logits_of(tmp_path / "out", TOKENS))


def test_shards_are_filled_in_order() -> None:
    assert shards_of({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d"],
    }
    assert shards_of({"a": 3, "b": 3}, 6) == {"model.safetensors": ["a", "b"]}


def test_transformers_keeps_weights_on_disk_where_memory_is_short(imported: Path, tmp_path: Path) -> None:
    """The proof of a model that is larger than the limit gives the same answer, and leaves none of its files."""
    exported = export_model(imported / "run", tmp_path / "out", ExportOptions(dtype="bfloat16", memory_bytes=60_000))
    assert all(agreement.holds for agreement in exported.agreements)
    assert not (tmp_path / "out" / "offload").exists()


# --- runs that were trained here


SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"num_kv_heads": 2}, "LlamaForCausalLM"),
    "llama-tied": ({"tie_embeddings": True}, "LlamaForCausalLM"),
    "gpt2": (
        {
            "position": "learned",
            "norm": "layernorm",
            "activation": "gelu_tanh",
            "bias": True,
            "tie_embeddings": True,
            "ffn_hidden_size": 4 * HIDDEN,
        },
        "GPT2LMHeadModel",
    ),
    "window": ({"attention_window": 9}, "MistralForCausalLM"),
    "falcon": (
        {
            "num_kv_heads": 1,
            "norm": "layernorm",
            "norm_bias": True,
            "activation": "gelu",
            "block": "parallel_one_norm",
            "tie_embeddings": True,
            "ffn_hidden_size": 4 * HIDDEN,
        },
        "FalconForCausalLM",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_run_of_ours_is_loaded_by_transformers(tmp_path: Path, name: str) -> None:
    model, architecture = SHAPES[name]
    run = make_run(tmp_path / "run", model)
    exported = export_model(run, tmp_path / "out", ExportOptions())
    assert exported.architecture == architecture
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == architecture
    assert loaded.num_parameters() == sum(tensor.numel() for tensor in parameters_of(run).values())


def test_the_tokenizer_gives_the_same_tokens_and_ends_texts(tmp_path: Path) -> None:
    export_model(make_run(tmp_path / "run", {}), tmp_path / "out", ExportOptions())
    ours, theirs = tokenizer_of(VOCAB), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("abc def", "Größe 7\n\n  x", "海"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token, theirs.eos_token_id) == (ours.eot_token, ours.eot_id)
    assert theirs("abc<|endoftext|>")["input_ids"][-1] == ours.eot_id
    assert theirs.model_max_length == 64
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == ours.eot_id
    out = model.generate(**theirs("abc", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert out.shape[1] > len(ours.encode("abc"))


def test_the_card_says_what_is_known_and_no_more(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    export_model(run, tmp_path / "my-model", ExportOptions())
    card = (tmp_path / "my-model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    for words in (
        "# my-model",
        "trained from random weights",
        "| steps | 40 |",
        "2,560 (4 sequences of 16 a step)",
        "3.9750 a token",  # the mean of steps 1 to 40, not of the later ones that this checkpoint has not seen
        "held-out loss | 3.2500 a token",
        "`corpus.txt`: 1,234 documents",
        "99,000 tokens for training",
        "3 (empty document)",
        'from_pretrained("my-model")',
        "random tokens",
        "max abs error",
        "grants no licence",
    ):
        assert words in card, words
    assert str(tmp_path) not in card
    assert "\n\n\n" not in card
    read = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert read.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["trimaran"]
    }  # fmt: skip
    assert read.text.startswith("\n# my-model\n")


def test_the_code_on_the_card_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export_model(make_run(tmp_path / "run", {}), tmp_path / "my-model", ExportOptions())
    code = (tmp_path / "my-model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "card.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("card.py")  # in this process, which has transformers already
    assert "The " in capsys.readouterr().out


def test_the_card_of_an_import_claims_no_training(imported: Path, tmp_path: Path) -> None:
    export_model(imported / "run", tmp_path / "out", ExportOptions())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "imported from `model` and not trained further" in card
    assert "## Training" not in card
    assert str(imported) not in card


def test_a_run_without_metrics_manifest_or_tokenizer_is_exported_all_the_same(tmp_path: Path) -> None:
    said: list[str] = []
    run = make_run(tmp_path / "run", {}, tokenizer=False)
    (run / "metrics.jsonl").write_text("{ broken\n{}\n")
    (run / "data_manifest.json").unlink()
    exported = export_model(run, tmp_path / "out", ExportOptions(), Progress(said.append))
    assert [agreement.what for agreement in exported.agreements] == ["random tokens"]
    assert any("no tokenizer.json" in text for text in said)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "is not known here" in card
    assert "training loss" not in card
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


def test_one_checkpoint_of_a_run_can_be_exported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    write_weights(run, parse_spec_of(run), 50, factor=0.2)
    export_model(run / "checkpoints" / "step-00000040", tmp_path / "out", ExportOptions())
    assert "| steps | 40 |" in (tmp_path / "out" / "README.md").read_text()
    export_model(run, tmp_path / "newest", ExportOptions())
    assert "| steps | 50 |" in (tmp_path / "newest" / "README.md").read_text()


# --- what is refused


def test_a_model_that_no_family_expresses_is_refused_with_the_reasons(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"position": "alibi", "norm": "rmsnorm", "activation": "geglu"})
    with pytest.raises(ConversionError, match="the model can't be exported: no architecture") as caught:
        export_model(run, tmp_path / "out", ExportOptions())
    assert str(caught.value).count(";") >= 2, "a reason for each of the nearest"
    assert_nothing_left(tmp_path, "run")


def test_a_family_that_is_asked_for_must_exist_and_fit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    with pytest.raises(ConversionError, match=r"family 'lama' is not known; the families are .*llama"):
        export_model(run, tmp_path / "out", ExportOptions(family="lama"))
    with pytest.raises(ConversionError, match="can't be exported"):
        export_model(run, tmp_path / "out", ExportOptions(family="gpt2"))
    assert export_model(run, tmp_path / "out", ExportOptions(family="mistral")).architecture == "MistralForCausalLM"


def test_a_folder_that_is_there_is_spared(imported: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep me")
    with pytest.raises(ConversionError, match="is there already"):
        export_model(imported / "run", tmp_path / "out", ExportOptions())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_damaged_checkpoint_is_not_exported(imported: Path, tmp_path: Path) -> None:
    shutil.copytree(imported / "run", tmp_path / "run")
    file = next((tmp_path / "run" / "checkpoints").rglob("rank-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(RuntimeError, match="sha256"):
        export_model(tmp_path / "run", tmp_path / "out", ExportOptions())
    assert_nothing_left(tmp_path, "run")


def test_wrong_weights_in_the_files_are_refused(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof can fail: one number of one tensor is not what the checkpoint has."""
    from trimaran.runtime.huggingface import exporting

    real = exporting.write_safetensors

    def wrong(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[int, str]:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed["model.layers.1.mlp.down_proj.weight"][3, 4] += 1.0
        return real(path, changed, metadata)

    monkeypatch.setattr(exporting, "write_safetensors", wrong)
    with pytest.raises(ProofError, match=r"differ by more than 0\.0001"):
        export_model(imported / "run", tmp_path / "out", ExportOptions())
    assert_nothing_left(tmp_path)
