"""The section finetune and data.format in a run spec: what belongs together, and a sentence for what does not."""

from typing import Any

import pytest

from trimaran.runtime.spec import RunSpec, SpecError, describe, parse_spec

SPEC: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "vocab_size": 512},
    "data": {"source": ["chats.jsonl"]},
    "finetune": {"epochs": 3},
    "optimizer": {"lr": 1e-4},
    "train": {"global_batch_size": 8, "micro_batch_size": 2, "seq_len": 64},
    "checkpoint": {"init_from": "runs/base"},
}


def parsed(**sections: Any) -> RunSpec:
    return parse_spec({**SPEC, **{name: {**SPEC.get(name, {}), **section} for name, section in sections.items()}})


def test_epochs_say_how_long_the_run_is() -> None:
    spec = parsed()
    assert spec.train.num_steps == 0
    assert dict(describe(spec))["total tokens"] == "told once the examples are prepared, by finetune.epochs"
    # Its rules about steps wait for the examples.
    assert parsed(lr_schedule={"warmup_steps": 10}).lr_schedule.warmup_steps == 10
    assert parsed(lr_schedule={"name": "wsd", "warmup_steps": 10}).lr_schedule.name == "wsd"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"finetune": {"epochs": None}}, "train.num_steps: num_steps is required, and at least 1; got 0; set it to"),
        (
            {"data": {"format": "preference"}},
            "data.format: method sft does not learn from records of format preference; ",
        ),
        ({"data": {"format": "chatml"}}, "data.format: must be auto, text, messages, sharegpt, alpaca"),
        ({"data": {"source": ["quickstart"]}}, "data.source: quickstart is a text, and finetune learns from examples"),
        ({"data": {"clean": {}}}, "data: a recipe (corpora, clean, filter, dedup, decontaminate) prepares text"),
        ({"checkpoint": {"init_from": None}}, "checkpoint.init_from: method sft needs a model that is there"),
        ({"model": {"objective": "masked_lm"}}, "finetune: a model of objective masked_lm writes no answers"),
        ({"finetune": {"rl": {"rewards": ["exact_match"]}}}, "finetune.rl: is there for method rl alone"),
    ],
)
def test_what_does_not_belong_together(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as error:
        parsed(**sections)
    assert words in str(error.value)


def test_a_format_needs_a_section_finetune() -> None:
    with pytest.raises(SpecError, match=r"data\.format: format \(messages\) says how records hold examples"):
        parse_spec(
            {**SPEC, "finetune": None, "data": {"format": "messages"}, "train": {**SPEC["train"], "num_steps": 3}}
        )


def test_dropout_grows_with_depth() -> None:
    model = {"num_layers": 4, "hidden_dropout": 0.3, "first_hidden_dropout": 0.0}
    shape = parsed(model=model).transformer
    assert [shape.hidden_dropout_of(layer) for layer in range(4)] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    same = parsed(model={"num_layers": 4, "hidden_dropout": 0.3}).transformer
    assert {same.hidden_dropout_of(layer) for layer in range(4)} == {0.3}
