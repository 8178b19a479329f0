"""What prepared examples decide of a run: its length, its vocabulary, and the files that concern conversations."""

import json
from pathlib import Path
from typing import Any

from trimaran.models.fields import counted
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import read_json, write_text
from trimaran.runtime.finetune.data.prepare import PreparedExamples, steps_of_epochs
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.loading import spec_with

_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"


def with_examples(spec: RunSpec, data: PreparedExamples) -> RunSpec:
    """Return the spec with the steps of finetune.epochs, and a vocabulary that has the chat template's tokens.

    Raises:
        DataError: train.num_steps is given too, and differs; or see `check_vocabulary`.
        SpecError: the run is too short for its other fields, such as lr_schedule.warmup_steps.
    """
    check_vocabulary(spec, data.tokenizer)
    changes: dict[str, object] = {}
    steps = steps_of_epochs(spec, data.train)
    if steps is not None and spec.train.num_steps not in (0, steps) and spec.finetune is not None:
        raise DataError(
            f"finetune.epochs ({spec.finetune.epochs:g}) takes {steps} steps, and train.num_steps is "
            f"{spec.train.num_steps}; leave one of them out"
        )
    if steps is not None and spec.train.num_steps == 0:
        changes["train.num_steps"] = steps
    if data.tokenizer.vocab_size > spec.transformer.vocab_size:
        changes["model.vocab_size"] = data.tokenizer.vocab_size
    return spec_with(spec.model_dump(mode="json"), changes, "the run with its examples") if changes else spec


def check_vocabulary(spec: RunSpec, tokenizer: Tokenizer) -> None:
    """Raise DataError where the chat template needs tokens that the model lacks, and its embedding is frozen."""
    more = tokenizer.vocab_size - spec.transformer.vocab_size
    if more > 0 and spec.finetune is not None and spec.finetune.adapter is not None:
        raise DataError(
            f"finetune.chat_template {spec.finetune.chat_template} writes {counted(more, 'token')} more than the "
            f"{spec.transformer.vocab_size:,} that the model has, and with finetune.adapter its embedding is frozen; "
            "take a template that writes turns in tokens of the model, or first train all weights with this one"
        )


def write_chat_files(spec: RunSpec, data: PreparedExamples, folder: Path) -> None:
    """Write the chat template into a run folder, and name the token that ends a turn in generation_config.json.

    Without the latter a program that reads an export would not stop at the end of an answer.
    """
    template = data.manifest["chat_template"]
    if template is not None and spec.finetune is not None and spec.finetune.chat_template is not None:
        write_text(folder / _TEMPLATE, template)
    config: dict[str, Any] = read_json(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    former = config.get("eos_token_id")
    ends = [each for each in (former if isinstance(former, list) else [former]) if isinstance(each, int)]
    ends = list(dict.fromkeys([data.end_of_turn, *ends, data.tokenizer.eot_id]))
    pad = config.get("pad_token_id")
    config |= {"eos_token_id": ends, "pad_token_id": data.tokenizer.eot_id if pad is None else pad}
    write_text(folder / _GENERATION, json.dumps(config, indent=2) + "\n")
