"""Stages that look at one document after the other: reading and cleaning, filtering, decontamination."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from math import inf
from pathlib import Path
from typing import Any, Final

from trimaran.runtime.data.clean.steps import clean_steps
from trimaran.runtime.data.decontaminate import Decontaminate, EvaluationSets, read_items, read_items_of_set
from trimaran.runtime.data.document import TOKENS, Document, Loss, Removal, Step
from trimaran.runtime.data.engine.parts import PartWriter, Removed, read_kept
from trimaran.runtime.data.engine.task import PIECE
from trimaran.runtime.data.engine.watch import Watch
from trimaran.runtime.data.filters.steps import filter_steps
from trimaran.runtime.data.readers.part import Part, ReadSettings
from trimaran.runtime.data.readers.read import read_part
from trimaran.runtime.data.readers.slices import find_slices
from trimaran.runtime.data.recipe.tally import Tally
from trimaran.runtime.spec.sections.recipe.clean import CleanSection
from trimaran.runtime.spec.sections.recipe.dedup import DecontaminateSection
from trimaran.runtime.spec.sections.recipe.filter import FilterSection

EMPTY: Final = "empty.text"
TOO_SLOW: Final = "slow.document"
_SLOW: Final = ("slow", Removal(TOO_SLOW, "over data.task_timeout_s"))


def read_and_clean(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> dict[str, Any]:
    """Do one part of a source: a task's function. Returns the tally of every piece of about `piece_bytes`."""
    del inputs
    settings = ReadSettings(arguments["text_field"], arguments["max_document_bytes"])
    parts = [Part(**part) for part in arguments["parts"]]
    items = enumerate(chain.from_iterable(read_part(part, settings) for part in parts))
    steps, pieces, ahead = cleaning(arguments["clean"]), list[dict[str, Any]](), list(islice(items, 1))
    while ahead or not pieces:
        piece = folder / PIECE.format(len(pieces))
        piece.mkdir()
        pieces.append(_run(steps, chain(ahead, items), piece, watch, parts[0].corpus, arguments["piece_bytes"]))
        ahead = list(islice(items, 1))
    return {"pieces": pieces}


def slice_file(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> dict[str, Any]:
    """Find the slices of a packed file: a task's function. Writes nothing."""
    del inputs, folder, watch
    return {"slices": find_slices(Part(**arguments["part"]), arguments["slice_bytes"])}


def filter_kept(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> dict[str, Any]:
    """Filter what an earlier task has kept: a task's function. Returns the tally."""
    return _run(filtering(arguments["filter"]), enumerate(read_kept(inputs[0])), folder, watch)


def decontaminate_kept(
    arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch
) -> dict[str, Any]:
    """Remove evaluation items from what an earlier task has kept: a task's function. Returns the tally, and `hits`."""
    section = DecontaminateSection.model_validate(arguments["decontaminate"])
    step = Decontaminate(evaluation_sets(section), section.action)
    tally = _run([step], enumerate(read_kept(inputs[0])), folder, watch)
    return {**tally, "hits": [hit._asdict() for hit in step.hits]}


def evaluation_sets(section: DecontaminateSection) -> EvaluationSets:
    """Return the runs of words of the sets that a section names."""
    sets = {}
    for each in section.against:
        if each.set is None:
            sets[each.file] = read_items(Path(each.file), each.fields)
        else:
            sets[f"{each.set} of {each.file}"] = read_items_of_set(each.set, Path(each.file))
    return EvaluationSets.of_items(sets, section.ngram)


def cleaning(section: Mapping[str, Any] | None) -> list[Step]:
    """Return the steps of a `data.clean` as JSON."""
    return [] if section is None else clean_steps(CleanSection.model_validate(section))


def filtering(section: Mapping[str, Any] | None) -> list[Step]:
    """Return the steps of a `data.filter` as JSON."""
    return [] if section is None else filter_steps(FilterSection.model_validate(section))


def _run(
    steps: Sequence[Step],
    items: Iterator[tuple[int, Document | Loss]],
    folder: Path,
    watch: Watch,
    corpus: str = "",
    most_bytes: float = inf,
) -> dict[str, Any]:
    """Write what the steps keep and remove of numbered items, until about `most_bytes` are written."""
    tally = Tally()
    with PartWriter(folder) as writer:
        while writer.size < most_bytes and (numbered := next(items, None)) is not None:
            number, item = numbered
            if isinstance(item, Loss):
                tally.lose(item, corpus)
                if item.is_document:
                    writer.remove(Removed(item.place, corpus, "", "", "read", item.reason, item.detail, ""))
                continue
            size = size_of(item)
            tally.enter(size)
            with watch.document(number):
                slow = number in watch.slow
                stage, removal = _SLOW if slow else apply_steps(steps, item, tally)
            if removal is None:
                tally.keep(size_of(item), item.corpus, item.language, item.fields)
                writer.keep(item)
            else:
                tally.remove(size, item.corpus, item.language, removal.reason)
                writer.remove(Removed.of(item, stage, removal))
    return tally.record


def size_of(document: Document) -> int:
    """Return the bytes of a document as it came in."""
    if TOKENS in document.fields:
        return 4 * len(document.fields[TOKENS])
    return len(document.raw) or len(document.text.encode("utf-8", "surrogatepass"))


def apply_steps(steps: Sequence[Step], document: Document, tally: Tally) -> tuple[str, Removal | None]:
    """Do the steps until one removes the document; return its name and why, ("", None) where it stays."""
    if TOKENS in document.fields:
        return "", None
    for step in steps:
        removal = step(document, tally.counts)
        if removal is not None:
            return step.name, removal
    if not document.text.strip():
        return "empty", Removal(EMPTY)
    return "", None
