"""The files that the sections of a recipe name: what they hold decides what a stage does, as settings do."""

from pathlib import Path

from trimaran.runtime.data.clean.spelling import ENGLISH
from trimaran.runtime.evaluate.datasets import find_item_files
from trimaran.runtime.spec.sections.data import DataSection
from trimaran.runtime.spec.sections.recipe.clean import CleanSection
from trimaran.runtime.spec.sections.recipe.dedup import DecontaminateSection
from trimaran.runtime.spec.sections.recipe.filter import FilterSection


def named_files(data: DataSection) -> dict[str, list[Path]]:
    """Return section -> the files that it names, each once.

    `dedup` names runs: their documents are inputs of its tasks, known by their content already.

    Raises:
        DataError: two files could be an evaluation set.
    """
    found = {
        "clean": _of_cleaning(data.clean) if data.clean else [],
        "filter": _of_filters(data.filter) if data.filter else [],
        "decontaminate": _of_sets(data.decontaminate) if data.decontaminate else [],
    }
    return {name: [Path(path) for path in dict.fromkeys(map(str, paths))] for name, paths in found.items()}


def _of_cleaning(section: CleanSection) -> list[Path]:
    return [] if section.spelling in (None, ENGLISH) else [Path(str(section.spelling))]


def _of_filters(section: FilterSection) -> list[Path]:
    files = list(section.url_blocklist or [])
    files += [each.file for each in section.toxicity.lexicons] if section.toxicity else []
    return [Path(file) for file in (*files, *(each.file for each in section.classifiers))]


def _of_sets(section: DecontaminateSection) -> list[Path]:
    found: list[Path] = []
    for each in section.against:
        found += [Path(each.file)] if each.set is None else find_item_files(each.set, Path(each.file))
    return found
