"""The filters of a recipe in their order, and what each removed of every language and corpus."""

from collections.abc import Iterator
from typing import Final, NamedTuple

from trimaran.runtime.data.document import Counts, Document, Removal, Step
from trimaran.runtime.data.filters.c4 import C4Filter
from trimaran.runtime.data.filters.classifier import ClassifierFilter
from trimaran.runtime.data.filters.fineweb import FineWebFilter
from trimaran.runtime.data.filters.gopher import GopherFilter
from trimaran.runtime.data.filters.gopher_repetition import GopherRepetitionFilter
from trimaran.runtime.data.filters.language import LanguageFilter
from trimaran.runtime.data.filters.toxicity import ToxicityFilter
from trimaran.runtime.data.filters.url import UrlFilter
from trimaran.runtime.spec.sections.recipe.filter import FilterSection

_UNKNOWN: Final = "unknown"


def filter_steps(settings: FilterSection) -> list[Step]:
    """Return the filters of a recipe, ready to work; without settings there are none.

    The order is that of datatrove's FineWeb recipe, so that figures compare: the URL costs least and needs no text;
    the language is told before what depends on it; repetition and quality see the text before C4 cuts its lines, and
    FineWeb's rules were set on what C4 leaves. Word lists and models come last, as they cost most and judge the text
    that would be trained on.

    Every filter counts what it saw and removed: see `removal_shares`.

    Raises:
        DataError: a file, label or package that a filter needs is missing or wrong.
    """
    steps: list[Step] = []
    if settings.url_blocklist is not None:
        steps.append(UrlFilter(settings.url_blocklist))
    rest: list[Step] = []
    if settings.gopher_repetition is not None:
        rest.append(GopherRepetitionFilter(settings.gopher_repetition))
    if settings.gopher is not None:
        rest.append(GopherFilter(settings.gopher))
    if settings.c4 is not None:
        rest.append(C4Filter(settings.c4))
    if settings.fineweb is not None:
        rest.append(FineWebFilter(settings.fineweb))
    if settings.toxicity is not None:
        rest.append(ToxicityFilter(settings.toxicity))
    rest += [ClassifierFilter(classifier) for classifier in settings.classifiers]
    if rest or settings.languages is not None:  # the shares that a filter removes are told by language
        steps.append(LanguageFilter(settings.languages, settings.min_language_score))
    return [_Counting(step) for step in [*steps, *rest]]


class _Counting:
    """A filter that counts what it sees and removes, by language and corpus."""

    def __init__(self, step: Step) -> None:
        self.name, self._step = step.name, step

    def __call__(self, document: Document, counts: Counts) -> Removal | None:
        removal = self._step(document, counts)
        # After the step: the language filter tells the language.
        counts[_key(self.name, "seen", document)] += 1
        if removal is not None:
            counts[_key(self.name, "removed", document)] += 1
        return removal


def _key(name: str, what: str, document: Document) -> str:
    return f"{name}.{what}:{document.language or _UNKNOWN}:{document.corpus}"


class Share(NamedTuple):
    """What a filter removed of the documents of a corpus in a language.

    Attributes:
        filter: its name in the spec.
        corpus: "" where documents name none.
        language: "unknown" for filters before the language is told.
    """

    filter: str
    corpus: str
    language: str
    seen: int
    removed: int


def removal_shares(counts: Counts) -> Iterator[Share]:
    """Yield the shares that filters counted, in the order of the counts."""
    for key, seen in counts.items():
        step, _, rest = key.partition(":")
        if step.endswith(".seen") and rest:
            name = step.removesuffix(".seen")
            language, _, corpus = rest.partition(":")
            yield Share(name, corpus, language, seen, counts[f"{name}.removed:{rest}"])
