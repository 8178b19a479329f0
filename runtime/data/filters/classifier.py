"""A fastText model of the user's own as a filter: of quality, education, toxicity, bias."""

from pathlib import Path

from trimaran.runtime.data.document import Counts, Document, Removal
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.filters.fasttext_file import load_model
from trimaran.runtime.spec.sections.recipe.filter import ClassifierSettings


class ClassifierFilter:
    """Removes documents whose text scores less than `min` for a label; leaves the score in the document's fields."""

    name = "classifiers"

    def __init__(self, settings: ClassifierSettings) -> None:
        """Raises DataError for a file that is no fastText model, or a label that the model lacks."""
        path = Path(settings.file)
        self._model, self._label, self._least = load_model(path), settings.label.removeprefix("__label__"), settings.min
        if self._label not in self._model.labels:
            known = ", ".join(self._model.labels[:50]) + (" and others" if len(self._model.labels) > 50 else "")
            raise DataError(f"filter.classifiers: {path} has no label {settings.label}; its labels are {known}")
        self._rule = f"classifiers.{path.stem}.{self._label}"

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        """Score the text."""
        score = self._model.scores(document.text).get(self._label, 0.0)
        document.fields[self._rule] = score
        return Removal(self._rule, f"{score:.3g}, below {self._least:g}") if score < self._least else None
