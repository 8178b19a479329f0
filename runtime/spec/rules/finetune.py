"""Rules of the section `finetune`."""

from collections.abc import Iterator
from typing import Final

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import FieldError
from trimaran.runtime.spec.fields import RunFields
from trimaran.runtime.spec.rules.table import Rules

RULES: Final = Rules()
_BUILT: Final[tuple[str, ...]] = ()


@RULES.needs("finetune.method")
def _method_is_built(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.finetune is not None and spec.finetune.method not in _BUILT:
        method = spec.finetune.method
        yield FieldError("finetune.method", f"{method} is not built yet", method, "leave the section finetune out")


@RULES.needs("finetune.method", "model.objective")
def _finetuning_continues_text(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
    if spec.finetune is not None and not shape.is_causal:
        rule = f"a model of objective {shape.objective} writes no answers, which finetuning is about"
        fix = "leave the section finetune out, or set model.objective to causal_lm"
        yield FieldError("finetune", rule, spec.finetune.method, fix)


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
