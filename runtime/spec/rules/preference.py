"""Rules of methods that compare answers, and of the score head."""

from collections.abc import Iterator
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules

RULES: Final = Rules()


@RULES.needs("finetune.method", "model.score_head")
def _the_score_head_fits_the_method(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    method = None if spec.finetune is None else spec.finetune.method
    kind = shape.score_head
    if method == "reward" and kind != "only":
        rule = "a reward model scores answers, so it has a score head in place of the projection to the vocabulary"
        yield FieldError("model.score_head", rule, kind, "set it to only")
    elif method != "reward" and kind == "only":
        rule = "a model with a score head alone writes no text, so it learns by finetune.method reward alone"
        yield FieldError("model.score_head", rule, kind, "set it to none, or finetune.method to reward")


@RULES.needs("finetune.method", "finetune.centering")
def _centering_is_for_rewards(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.finetune is not None and spec.finetune.centering and spec.finetune.method != "reward":
        rule = f"centers the scores of method reward, and finetune.method is {spec.finetune.method}"
        yield FieldError("finetune.centering", rule, spec.finetune.centering, "set it to 0, or the method to reward")


@RULES.needs("finetune.preference", "finetune.preference.loss", "finetune.preference.label_smoothing")
def _smoothing_is_for_dpo(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings = None if spec.finetune is None else spec.finetune.preference
    if settings is not None and settings.label_smoothing and settings.loss != "dpo":
        rule = f"smooths the labels of dpo, and the loss is {settings.loss}"
        fix = "set it to 0, or the loss to dpo"
        yield FieldError("finetune.preference.label_smoothing", rule, settings.label_smoothing, fix)


_KINDS: Final = ("desirable_weight", "undesirable_weight")


@RULES.needs("finetune.preference", "finetune.preference.loss", *(f"finetune.preference.{name}" for name in _KINDS))
def _weights_of_kinds_are_for_kto(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings = None if spec.finetune is None else spec.finetune.preference
    if settings is None or settings.loss == "kto":
        return
    for name in _KINDS:
        if getattr(settings, name) != 1:
            rule = f"weighs good or bad answers, which kto learns from, and the loss is {settings.loss}"
            fix = "set it to 1, or the loss to kto"
            yield FieldError(f"finetune.preference.{name}", rule, getattr(settings, name), fix)


@RULES.needs(
    "finetune.preference",
    "finetune.preference.loss",
    "finetune.preference.reference",
    "finetune.preference.sft_weight",
)
def _orpo_has_no_reference(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings = None if spec.finetune is None else spec.finetune.preference
    if settings is None or settings.loss != "orpo":
        return
    if settings.reference is not None:
        rule = "orpo compares the answers without a reference"
        yield FieldError("finetune.preference.reference", rule, settings.reference, "take it out")
    if settings.sft_weight:
        rule = "orpo has the cross entropy of the chosen answers already, with weight 1"
        yield FieldError("finetune.preference.sft_weight", rule, settings.sft_weight, "set it to 0")


@RULES.needs("finetune.preference", "finetune.preference.reference", "checkpoint.init_from")
def _a_reference_has_a_start(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    settings = None if spec.finetune is None else spec.finetune.preference
    if settings is not None and settings.reference is not None and spec.checkpoint.init_from is None:
        rule = "is another model than the one that the run starts from, and checkpoint.init_from names none"
        fix = "set checkpoint.init_from to the run to start from, or reference to null"
        yield FieldError("finetune.preference.reference", rule, settings.reference, fix)
