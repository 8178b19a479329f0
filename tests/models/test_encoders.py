"""transformers' BERT and XLNet with the same random weights give our logits, loss and gradients, there and back."""

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from tests.models.encoders import BATCH, SEQ, STEPS, VOCAB, Encoder, batch_of, make, stage_with, their_gradients
from trimaran.models.batch import Microbatch
from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface import family_for, family_of, locate, resolve
from trimaran.models.presets import preset
from trimaran.runtime.infer.generate import check_prompts

NAMES = list(STEPS)


def tokens() -> Tensor:
    return torch.randint(VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_float32_logits_equal(name: str) -> None:
    encoder = make(STEPS[name][0], torch.float32)
    stage = stage_with(encoder.config, encoder.weights(), torch.float32)
    with torch.no_grad():
        expected = encoder.theirs(input_ids=tokens()).logits
        logits = stage.logits(stage.run_layers(None, tokens()))
    assert expected.std() > 0.1, "logits near zero would agree by themselves"
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_float64_loss_and_every_gradient_equal(name: str) -> None:
    build, objective, their_loss = STEPS[name]
    encoder, batch = make(build, torch.float64), batch_of(objective)
    stage = stage_with(encoder.config, encoder.weights(), torch.float64)
    expected_loss = their_loss(encoder.theirs, batch)
    loss = stage(None, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-10)
    expected = their_gradients(encoder, expected_loss)
    for parameter_name, parameter in stage.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 1e-3, f"{parameter_name}: a gradient of zero would agree by itself"
        torch.testing.assert_close(
            parameter.grad,
            expected[parameter_name],
            rtol=0,
            atol=1e-9,
            msg=lambda text, name=parameter_name: f"{name}: {text}",
        )


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_is_the_model_of_transformers(name: str) -> None:
    encoder = make(STEPS[name][0], torch.float32)
    assert family_for(encoder.config) is encoder.family
    written = encoder.family.from_config(encoder.config)
    theirs = encoder.theirs.config
    config = type(theirs).from_dict({**theirs.to_dict(), **written})  # type: ignore[operator, union-attr]
    exported = type(encoder.theirs)(config).eval()
    missing, unexpected = exported.load_state_dict(encoder.to_theirs(encoder.weights()), strict=False)
    stored = {name for name, _ in exported.named_parameters()}
    assert not unexpected
    assert not stored & set(missing)
    with torch.no_grad():
        torch.testing.assert_close(
            exported(input_ids=tokens()).logits, encoder.theirs(input_ids=tokens()).logits, rtol=0, atol=0
        )


@pytest.fixture
def masked() -> Encoder:
    return make(STEPS["bert"][0], torch.float32)


def test_attention_sees_both_directions(masked: Encoder) -> None:
    stage = stage_with(masked.config, masked.weights(), torch.float32)
    first = tokens()
    last_changed = first.clone()
    last_changed[:, -1] = (last_changed[:, -1] + 1) % VOCAB
    with torch.no_grad():
        difference = stage.run_layers(None, first) - stage.run_layers(None, last_changed)
    assert difference[:, 0].abs().max() > 1e-3


def test_labels_of_every_position_give_the_same_loss_as_targets(masked: Encoder) -> None:
    stage, batch = stage_with(masked.config, masked.weights(), torch.float32), batch_of(STEPS["bert"][1])
    assert batch.targets is not None
    everywhere = torch.full_like(batch.tokens, -100).scatter(1, batch.targets, batch.labels)
    with torch.no_grad():
        torch.testing.assert_close(
            stage(None, batch), stage(None, Microbatch(batch.tokens, everywhere, batch.first_sample))
        )


@pytest.mark.parametrize(("name", "count"), [("bert-base", 109_514_298), ("bert-large", 335_174_458)])
def test_presets_have_the_parameters_of_transformers(name: str, count: int) -> None:
    assert preset(name).num_parameters() == count
    written = family_for(preset(name)).from_config(preset(name))
    with torch.device("meta"):
        theirs = BertForMaskedLM(BertConfig(**written))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count


def test_a_file_of_the_whole_pretraining_model_is_read_without_its_other_heads(masked: Encoder) -> None:
    whole = BertForPreTraining(masked.theirs.config)  # type: ignore[arg-type]
    units = resolve(masked.family, masked.config)
    names = list(whole.state_dict())
    assert any("pooler" in name for name in names)
    found = locate(masked.family, units, names)
    assert found.spare_head == "cls.predictions.decoder.weight"
    assert set(found.names.values()) <= set(names)
    old = [
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for name in names
    ]
    assert (
        locate(masked.family, units, old).names["bert.embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.gamma"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"is_decoder": True}, "is_decoder true is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings false is not supported"),
        ({"hidden_act": "silu"}, "hidden_act 'silu' is not supported"),
    ],
)
def test_options_of_bert_that_we_do_not_have_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        family_of({"model_type": "bert"}).to_config({**BertConfig().to_dict(), **changes})


def test_a_masked_model_is_not_exported_as_another_family_nor_continues_text(masked: Encoder) -> None:
    with pytest.raises(ValueError, match="no architecture of Hugging Face"):
        family_for(masked.config.model_copy(update={"position": "rotary"}))
    with pytest.raises(
        ValueError, match="objective masked_lm predicts hidden tokens from both sides and continues no text"
    ):
        check_prompts([[1, 2]], masked.config)


def test_a_gated_head_transform_is_refused() -> None:
    with pytest.raises(ValueError, match="has no gate, and activation is swiglu"):
        TransformerConfig(num_layers=1, hidden_size=8, num_heads=2, vocab_size=9, max_seq_len=4, head_transform=True)
