"""Whether examples are what a method compares: pairs, or rated answers of both kinds. No torch."""

from typing import TYPE_CHECKING

from trimaran.models.fields import counted
from trimaran.runtime.data.files import DataError
from trimaran.runtime.finetune.data.store import ExampleSet
from trimaran.runtime.spec.sections.finetune import PreferenceSettings

if TYPE_CHECKING:
    from trimaran.runtime.spec import RunSpec


def preference_of(spec: "RunSpec") -> PreferenceSettings | None:
    """Return the settings of method preference; None for another method."""
    if spec.finetune is None or spec.finetune.method != "preference":
        return None
    return spec.finetune.preference or PreferenceSettings()


def compares(spec: "RunSpec") -> bool:
    """Return whether a run learns from comparisons of answers."""
    return spec.finetune is not None and spec.finetune.method in ("reward", "preference")


def check_comparable(spec: "RunSpec", train: ExampleSet, held_out: ExampleSet) -> None:
    """Raise DataError where a run that compares answers can't learn from these examples."""
    if not compares(spec):
        return
    settings = preference_of(spec)
    is_kto = settings is not None and settings.loss == "kto"
    for examples in (train, held_out):
        wrong = _first_of_another_kind(examples, 1 if is_kto else 2)
        if wrong is not None:
            has, learns, fix = (
                ("a pair", "single answers", "unpaired")
                if is_kto
                else ("a single answer", "pairs of a chosen and a rejected one", "preference")
            )
            name = "finetune.method reward" if settings is None else f"finetune.preference.loss {settings.loss}"
            raise DataError(
                f"{examples.origin(wrong)} is {has}, and {name} learns from {learns}; give records of data.format "
                f"{fix}, or take another loss"
            )
    if is_kto:
        _check_both_kinds(train)


def _first_of_another_kind(examples: ExampleSet, documents: int) -> int | None:
    """Return the first example that has not so many documents."""
    if examples.num_documents == documents * examples.num_examples:
        return None  # an example has one or two
    return next(number for number in range(examples.num_examples) if len(examples.documents_of(number)) != documents)


def _check_both_kinds(examples: ExampleSet) -> None:
    good = int((examples.values > 0).sum())
    if good in (0, examples.num_examples):
        found, lacking = ("good", "false") if good else ("bad", "true")
        raise DataError(
            f"kto learns from good and from bad answers, and all {counted(examples.num_examples, 'example')} of the "
            f"training split are {found}; add some with label {lacking}"
        )
