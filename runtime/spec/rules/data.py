"""Rules of the corpora and of the stages in which their weights change."""

import difflib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError
from trimaran.runtime.evaluate.datasets import SETS
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules
from trimaran.runtime.spec.sections import DataSection

RULES: Final = Rules()
_DEFAULT: Final = DataSection()


@RULES.needs("data.source", "data.corpora")
def _source_or_corpora(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    source = spec.data.source
    if spec.data.corpora and source != _DEFAULT.source:
        rule = "source and corpora exclude each other, and both are given"
        fix = "give the source a name: write it as data.corpora.NAME.source and take data.source out"
        yield FieldError("data.source", rule, source, fix)


@RULES.needs("data.text_field", "data.corpora")
def _text_field_of_corpora(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    text_field = spec.data.text_field
    if spec.data.corpora and text_field != _DEFAULT.text_field:
        rule = f"text_field ({text_field}) is that of data.source, and every corpus has one of its own"
        fix = "write it as text_field of the corpora that need it, and take data.text_field out"
        yield FieldError("data.text_field", rule, text_field, fix)


@RULES.needs("data.stages", "data.stages[N].weights", "data.corpora")
def _stages_weigh_corpora(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    names = spec.data.corpora
    if spec.data.stages and not names:
        rule = "stages change the weights of corpora, and data.corpora has none"
        yield FieldError("data.stages", rule, spec.data.stages, "name the corpora in data.corpora, or set this to null")
        return
    for number, stage in enumerate(spec.data.stages or ()):
        for name in stage.weights:
            if name not in names:
                path = f"data.stages[{number}].weights.{name}"
                yield FieldError(path, f"{name} is no corpus", stage.weights[name], _fix_of_name(name, list(names)))


def _fix_of_name(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"write one of data.corpora: {', '.join(names[:20])}"


@RULES.needs("data.stages", "data.stages[N].tokens")
def _stages_follow_each_other(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    stages = spec.data.stages or ()
    if stages and stages[0].tokens:
        rule = f"the first stage must begin at 0 tokens, got {stages[0].tokens}"
        yield FieldError("data.stages[0].tokens", rule, stages[0].tokens, "set it to 0, or put a stage before it")
    for number, (before, stage) in enumerate(pairwise(stages), start=1):
        if stage.tokens <= before.tokens:
            rule = f"tokens ({stage.tokens}) must be above those of the stage before ({before.tokens})"
            fix = f"put the stages in order, or set it to {before.tokens + 1} or more"
            yield FieldError(f"data.stages[{number}].tokens", rule, stage.tokens, fix)


@RULES.needs(
    "data.decontaminate",
    "data.decontaminate.against",
    "data.decontaminate.against[N].set",
    "data.decontaminate.against[N].fields",
)
def _evaluation_sets(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    section = spec.data.decontaminate
    for number, each in enumerate(section.against if section is not None else ()):
        path = f"data.decontaminate.against[{number}]"
        if each.set is None and not each.fields:
            fix = f"name its fields, such as [question, answer], or name a known set ({', '.join(SETS)}) in set"
            yield FieldError(f"{path}.fields", "a file needs the fields that make an item", [], fix)
        elif each.set is not None and each.set not in SETS:
            near = difflib.get_close_matches(each.set, SETS, n=1)
            fix = f"did you mean {near[0]}?" if near else f"take one of {', '.join(SETS)}, or write file and fields"
            yield FieldError(f"{path}.set", f"{each.set} is no set that is known by name", each.set, fix)
        elif each.set is not None and each.fields:
            fix = "take the fields out: file is then the folder that has the set's files"
            yield FieldError(f"{path}.fields", f"the fields of {each.set} are known", each.fields, fix)
