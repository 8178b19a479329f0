"""Every family is the published one, in both directions: several random models of transformers for each family.

A model is saved by transformers, read from its folder, and computed by our network: logits, loss and every gradient are
equal. Then its weights and config go the way back, and transformers loads them from a folder with nothing missing or
left over.

Tolerances. float32: both compute the same formulas in another order; 1e-5 of the largest logit holds with room.
float64: transformers takes norms, softmax and rotary angles in float32 whatever the model's dtype, so it runs under
`in_float64`, which makes float64 of that; 1e-10 and 1e-9 are some thousand roundings. ALiBi's slopes are float32
numbers here, and BLOOM's GELU has the root of 2 / pi to eight digits.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon

from tests.models.huggingface_models import (
    BATCH,
    SEQ,
    SMALL_MODELS,
    VOCAB,
    Imported,
    Tensors,
    falcon,
    gradients_of,
    in_float64,
)
from trimaran.models.batch import Microbatch
from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface import FAMILIES, Family, family_of, resolve
from trimaran.models.huggingface.forms import PLUS_ONE, TWO_ROWS_FEWER
from trimaran.models.parallel.group import single
from trimaran.models.parallel.parameter import LayerContext
from trimaran.models.transformer import Stage, build_stages

LOGITS_FLOAT64, GRADIENTS_FLOAT64, ALIBI = 1e-10, 1e-9, 100


def to_theirs(family: Family, config: TransformerConfig, ours: Tensors) -> Tensors:
    theirs: Tensors = {}
    for unit in resolve(family, config):
        made = unit.to_theirs([ours[name] for name in unit.ours], config)
        assert [tuple(tensor.shape) for tensor in made] == unit.their_shapes(config)
        theirs |= dict(zip(unit.theirs, made, strict=True))
    return theirs


def stage_with(config: TransformerConfig, weights: Tensors, dtype: torch.dtype = torch.float32) -> Stage:
    """The whole network on one rank with the given weights: every one of them is used, and no other is left."""
    context = LayerContext(single("tp"), False, dtype, torch.device("cpu"))
    (stage,) = build_stages(config, [range(config.num_layers)], [0], context, seed=0)
    parameters = dict(stage.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
    return stage


def tokens_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    tokens = torch.randint(VOCAB, (BATCH, SEQ), generator=generator)
    labels = torch.cat((tokens[:, 1:], torch.full((BATCH, 1), -100)), dim=1)
    return tokens, labels


def our_logits(stage: Stage) -> Tensor:
    with torch.no_grad():
        return stage.logits(stage.run_layers(None, tokens_and_labels()[0]))


@pytest.fixture(params=SMALL_MODELS)
def imported(request: pytest.FixtureRequest, tmp_path: Path) -> Imported:
    return Imported(SMALL_MODELS[request.param](), tmp_path / "saved")


def test_float32_logits_and_loss_equal_and_go_back_to_transformers(imported: Imported, tmp_path: Path) -> None:
    theirs, config, family = imported.model, imported.config, imported.family
    tokens, labels = tokens_and_labels()
    with torch.no_grad():
        expected = theirs(input_ids=tokens, labels=tokens)  # shifts the labels itself
    scale = expected.logits.abs().max()
    assert expected.logits.std() > 0.1, "logits near zero would agree by themselves"
    stage = stage_with(config, imported.weights)
    torch.testing.assert_close(our_logits(stage), expected.logits, rtol=0, atol=1e-5 * scale)
    with torch.no_grad():
        loss = stage(None, Microbatch(tokens, labels, 0)) / (BATCH * (SEQ - 1))
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)

    unread = sum(2 * config.hidden_size for unit in resolve(family, config) if unit.form is TWO_ROWS_FEWER)
    assert config.num_parameters() == sum(tensor.numel() for tensor in imported.weights.values())
    assert config.num_parameters() == sum(parameter.numel() for parameter in theirs.parameters()) - unread

    weights = to_theirs(family, config, imported.weights)
    inexact = {
        name for unit in resolve(family, config) if unit.form in (PLUS_ONE, TWO_ROWS_FEWER) for name in unit.theirs
    }
    assert weights.keys() == imported.stored.keys()
    for name, tensor in weights.items():
        if name in inexact:
            torch.testing.assert_close(
                tensor[-config.max_seq_len :], imported.stored[name][-config.max_seq_len :], rtol=0, atol=1e-7
            )
        else:
            assert torch.equal(tensor, imported.stored[name]), name
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family.from_config(config)), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    again, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not any(report.values()), report
    assert type(again) is type(theirs)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, expected.logits, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_float64_logits_and_every_gradient_equal(name: str, tmp_path: Path) -> None:
    tokens, labels = tokens_and_labels()
    with in_float64():
        theirs = SMALL_MODELS[name]()
        expected_logits = theirs(input_ids=tokens).logits
    imported = Imported(theirs, tmp_path / "saved")
    stage = stage_with(imported.config, imported.weights, torch.float64)
    assert expected_logits.dtype == torch.float64
    F.cross_entropy(expected_logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    stage(None, Microbatch(tokens, labels, 0)).backward()

    loosened = ALIBI if imported.config.position == "alibi" else 1
    torch.testing.assert_close(our_logits(stage), expected_logits.detach(), rtol=0, atol=loosened * LOGITS_FLOAT64)
    expected = gradients_of(imported, tmp_path / "gradients")
    for ours, parameter in stage.named_parameters():
        assert parameter.grad is not None, ours
        assert parameter.grad.abs().max() > 1e-3, f"{ours}: a gradient of zero would agree by itself"
        atol = loosened * GRADIENTS_FLOAT64
        torch.testing.assert_close(
            parameter.grad, expected[ours], rtol=0, atol=atol, msg=lambda text, ours=ours: f"{ours}: {text}"
        )


def test_falcons_alibi_is_rounded_by_transformers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers rounds Falcon's ALiBi to bfloat16: seen where slopes are no powers of two. BLOOM's is exact."""
    imported = Imported(falcon(alibi=True, hidden_size=48, num_attention_heads=12)(), tmp_path / "saved")
    ours = our_logits(stage_with(imported.config, imported.weights))
    tokens, _ = tokens_and_labels()
    with torch.no_grad():
        rounded = imported.model(input_ids=tokens).logits
        monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", modeling_bloom.build_alibi_tensor)
        exact = imported.model(input_ids=tokens).logits
    assert (rounded - exact).abs().max() > 1e-4
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5 * exact.abs().max())


# For every option that changes no shape: a model that has it, and another value, or for None the value of a model
# without the option.
SEEN: list[tuple[str, str, Any]] = [
    ("gpt2", "activation", "gelu"),
    ("gpt2-untied-unscaled", "attention_scale", None),
    ("gptj", "rotary_interleaved", False),
    ("gptj", "rotary_dim", 6),
    ("gpt_neo", "attention_pattern", None),
    ("gpt_neo", "attention_window", 6),
    ("gpt_neox", "block", "sequential"),
    ("gpt_neox-sequential-linear", "rotary_scaling", None),
    ("falcon-rw", "alibi_scale", 1.0),
    ("llama", "rotary_base", 10000.0),
    ("llama-3", "rotary_scaling", None),
    ("llama-dynamic", "rotary_scaling", None),
    ("llama-linear", "rotary_scaling", None),
    ("llama-one-kv-head-tied", "norm_eps", 1e-6),
    ("llama-wide-heads", "activation", "geglu_tanh"),
    ("llama-yarn", "rotary_scaling", None),
    (
        "llama-yarn-scales",
        "rotary_scaling",
        {"kind": "yarn", "factor": 4.0, "original_max_position": 8, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    ("mistral", "attention_window", None),
    ("qwen2-windows", "attention_pattern", None),
    ("gemma", "embedding_scale", 1.0),
    ("gemma2", "attention_scale", None),
    ("gemma2", "attention_softcap", None),
    ("gemma2", "logits_softcap", None),
    ("gemma2", "attention_pattern", None),
    ("palm", "logits_scale", 1.0),
    ("palm", "rotary_interleaved", False),
]


@pytest.mark.parametrize(("name", "field", "other"), SEEN, ids=[f"{name}-{field}" for name, field, _ in SEEN])
def test_one_option_that_is_read_wrong_is_seen(name: str, field: str, other: Any, tmp_path: Path) -> None:
    """The comparison of logits can fail: by ten times its tolerance and more, for each of these options."""
    imported = Imported(SMALL_MODELS[name](), tmp_path / "saved")
    values = {**imported.family.to_config(imported.hf)}
    assert values[field] != other
    changed = TransformerConfig.model_validate({**values, field: other})
    right, wrong = (our_logits(stage_with(config, imported.weights)) for config in (imported.config, changed))
    assert (right - wrong).abs().max() > 1e-4 * right.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "falcon-40b", "gpt_neox", "llama-grouped-biases"])
def test_two_weights_that_are_swapped_are_seen(name: str, tmp_path: Path) -> None:
    """Keys for values, and gate for up, change the logits."""
    imported = Imported(SMALL_MODELS[name](), tmp_path / "saved")
    right = our_logits(stage_with(imported.config, imported.weights))
    for part in ("attention.kv.weight", *(["mlp.up.weight"] if imported.config.is_gated else [])):
        swapped = {**imported.weights, f"layers.1.{part}": imported.weights[f"layers.1.{part}"].flip(0)}
        assert (right - our_logits(stage_with(imported.config, swapped))).abs().max() > 1e-2


def test_every_family_is_tried() -> None:
    tried = {family_of({"model_type": build().config.model_type}).name for build in SMALL_MODELS.values()}
    assert tried == {
        family.name for family in FAMILIES if family.to_config({}).get("objective", "causal_lm") == "causal_lm"
    }
