"""Rules of the section `finetune`."""

from collections.abc import Iterator
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError, one_of
from trimaran.runtime.data.sources import QUICKSTART
from trimaran.runtime.finetune.data.records import FORMATS_OF
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules

RULES: Final = Rules()


@RULES.needs("finetune.method", "model.objective")
def _finetuning_continues_text(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.finetune is not None and not shape.is_causal:
        rule = f"a model of objective {shape.objective} writes no answers, which finetuning is about"
        fix = "leave the section finetune out, or set model.objective to causal_lm"
        yield FieldError("finetune", rule, spec.finetune.method, fix)


@RULES.needs("data.format", "finetune.method")
def _format_of_examples(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    format = spec.data.format
    if format == "auto":
        return
    if spec.finetune is None:
        rule = f"format ({format}) says how records hold examples, which only a run that finetunes learns from"
        yield FieldError("data.format", rule, format, "add a section finetune, or take data.format out")
    elif format not in FORMATS_OF[spec.finetune.method]:
        known = FORMATS_OF[spec.finetune.method]
        rule = f"method {spec.finetune.method} does not learn from records of format {format}"
        yield FieldError("data.format", rule, format, f"set it to {one_of(known)}, or to auto")


@RULES.needs(
    "finetune.method",
    "data.source",
    "data.corpora",
    "data.clean",
    "data.filter",
    "data.dedup",
    "data.decontaminate",
)
def _examples_come_from_files(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.finetune is None:
        return
    if spec.data.has_recipe:
        rule = (
            "a recipe (corpora, clean, filter, dedup, decontaminate) prepares text, and finetune learns from examples"
        )
        yield FieldError(
            "data", rule, spec.finetune.method, "take these sections out, and name the files in data.source"
        )
    elif QUICKSTART in spec.data.source:
        rule = "quickstart is a text, and finetune learns from examples"
        yield FieldError("data.source", rule, spec.data.source, "name .json, .jsonl or .parquet files of examples")


@RULES.needs("finetune.method", "data.tokenizer", "checkpoint.init_from")
def _examples_have_a_tokenizer(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.finetune is not None and spec.data.tokenizer is None and spec.checkpoint.init_from is None:
        rule = f"method {spec.finetune.method} needs a model that is there, or at least its tokenizer"
        fix = "set it to the run folder of the model (trimaran import makes one), or set data.tokenizer"
        yield FieldError("checkpoint.init_from", rule, None, fix)


@RULES.needs("finetune.method", "finetune.loss_on")
def _loss_on_is_for_sft(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.finetune is not None and spec.finetune.method != "sft" and spec.finetune.loss_on != "answers":
        rule = f"loss_on ({spec.finetune.loss_on}) is for method sft; method {spec.finetune.method} reads the answers"
        fix = "set finetune.loss_on to answers, or finetune.method to sft"
        yield FieldError("finetune.loss_on", rule, spec.finetune.loss_on, fix)


_RECORDS: Final = {"preference": "preference", "rl": "rl"}


@RULES.needs("finetune.method", "finetune.preference", "finetune.rl")
def _records_belong_to_the_method(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.finetune is None:
        return
    for name, method in _RECORDS.items():
        if getattr(spec.finetune, name) is not None and spec.finetune.method != method:
            rule = f"is there for method {method} alone, and finetune.method is {spec.finetune.method}"
            fix = f"set finetune.method to {method}, or leave finetune.{name} out"
            yield FieldError(f"finetune.{name}", rule, spec.finetune.method, fix)
    if spec.finetune.method == "rl" and spec.finetune.rl is None:
        rule = "is needed by method rl, which learns from rewards"
        yield FieldError("finetune.rl", rule, None, "add it with a list of rewards, such as rewards: [exact_match]")
