"""A reward model becomes a classifier of one label that transformers loads, with the same scores."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.runtime.huggingface.huggingface_folders import VOCAB
from tests.runtime.huggingface.test_export import make_run
from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.llama import LLAMA as LLAMA_FAMILY
from trimaran.models.huggingface.weights import resolve
from trimaran.models.layers.score import SCORE_WEIGHT
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.transformer import build_stages, parameter_shapes
from trimaran.runtime.checkpoint.folder import newest_checkpoint
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.huggingface.exporting import ExportOptions, export_model
from trimaran.runtime.huggingface.importing import import_model
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.huggingface.scores import architecture_of, classifier_keys, units_of, without_scores
from trimaran.runtime.train.state import spec_of

LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "num_kv_heads": 2}
GPT2 = {"position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True, "tie_embeddings": True}
REWARD = {"method": "reward"}
TOKENS = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(3))


def scores_of(run: Path) -> torch.Tensor:
    """Our scores [batch, seq] of TOKENS."""
    path = newest_checkpoint(run)
    assert path is not None
    checkpoint = Checkpoint.open(path)
    config = spec_of(checkpoint).transformer
    context = LayerContext(single("tp"), sequence_parallel=False, dtype=torch.float32, device=torch.device("cpu"))
    (stage,) = build_stages(config, [range(2)], [0], context, seed=0, draws_weights=False)
    stage.load(checkpoint.read)
    with torch.no_grad():
        return stage.scores(stage.run_layers(None, TOKENS), torch.arange(TOKENS.numel())).view_as(TOKENS)


@pytest.mark.parametrize(("model", "kind"), [(LLAMA, "Llama"), (GPT2, "GPT2")])
def test_transformers_gives_an_exported_reward_model_the_same_scores(
    model: dict[str, object], kind: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", {**model, "score_head": "only"}, finetune=REWARD)
    exported = export_model(run, tmp_path / "out", ExportOptions())
    assert exported.architecture == f"{kind}ForSequenceClassification"
    assert {each.what for each in exported.agreements} == {"random tokens", "real text"}
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", local_files_only=True)
    assert theirs.config.num_labels == 1
    ours = scores_of(run)
    with torch.no_grad():
        alone = [float(theirs(input_ids=TOKENS[:1, :length]).logits) for length in range(1, 13)]
        torch.testing.assert_close(torch.tensor(alone), ours[0], rtol=1e-5, atol=1e-5)
        theirs.config.pad_token_id = VOCAB - 1
        padded = TOKENS.where(torch.arange(12) < torch.tensor([[12], [5], [8]]), VOCAB - 1)
        found = theirs(input_ids=padded, attention_mask=(padded != VOCAB - 1).long()).logits
    torch.testing.assert_close(found[:, 0], ours[range(3), [11, 4, 7]], rtol=1e-5, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "generate" not in card


def test_a_classifier_names_no_padding_that_may_end_a_text(tmp_path: Path) -> None:
    export_model(
        make_run(tmp_path / "run", {**LLAMA, "score_head": "only"}, finetune=REWARD), tmp_path / "out", ExportOptions()
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] is not None
    assert config["pad_token_id"] is None


def test_a_value_head_beside_the_other_is_left_out() -> None:
    config = TransformerConfig.model_validate(
        {**LLAMA, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 50, "score_head": "beside"}
        | {"max_seq_len": 16}
    )
    plain = without_scores(config)
    assert SCORE_WEIGHT in parameter_shapes(config)
    units = units_of(resolve(LLAMA_FAMILY, plain), plain)
    assert sorted(name for unit in units for name in unit.ours) == sorted(
        parameter_shapes(config).keys() - {SCORE_WEIGHT}
    )
    assert architecture_of(LLAMA_FAMILY, config) == "LlamaForCausalLM"
    assert classifier_keys(config, "LlamaForCausalLM", {}) == {}


def test_a_family_without_a_classifier_is_refused(tmp_path: Path) -> None:
    palm = {"norm": "layernorm", "block": "parallel_one_norm", "rotary_interleaved": True, "tie_embeddings": True}
    run = make_run(tmp_path / "run", {**LLAMA, **palm, "score_head": "only"}, finetune=REWARD)
    with pytest.raises(ConversionError, match="transformers has no CohereForSequenceClassification"):
        export_model(run, tmp_path / "out", ExportOptions())


def parameters_of(run: Path) -> dict[str, torch.Tensor]:
    path = newest_checkpoint(run)
    assert path is not None
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read_global(name, "weight") for name in checkpoint.names()}


@pytest.mark.parametrize("model", [LLAMA, GPT2])
def test_an_exported_reward_model_imports_to_the_bit_and_exports_the_same_again(
    model: dict[str, object], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", {**model, "score_head": "only"}, finetune=REWARD)
    export_model(run, tmp_path / "out", ExportOptions())
    imported = import_model(tmp_path / "out", tmp_path / "back")
    assert imported.spec.transformer.score_head == "only"
    assert imported.spec.finetune is not None
    assert imported.spec.finetune.method == "reward"
    assert {each.what for each in imported.agreements} == {"random tokens", "real text"}
    before, after = parameters_of(run), parameters_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(scores_of(run), scores_of(tmp_path / "back"))
    export_model(tmp_path / "back", tmp_path / "again", ExportOptions())
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {**LLAMA, "score_head": "only"}, finetune=REWARD)
    export_model(run, tmp_path / "out", ExportOptions())
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    for labels in ({"id2label": {"0": "bad", "1": "good"}}, {"id2label": None}):
        changed = {name: value for name, value in (content | labels | {"num_labels": 2}).items() if value is not None}
        (tmp_path / "out" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConversionError, match="LlamaForSequenceClassification of 2 labels, and only one of 1"):
            import_model(tmp_path / "out", tmp_path / "back")
