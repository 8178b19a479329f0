"""The recipe of a run spec: its corpora as parts of files whose content is known, and its sections."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimaran.runtime.data.account import Account
from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.files import DataError, hash_file, know_files, once_per_change
from trimaran.runtime.data.quickstart import ensure_quickstart
from trimaran.runtime.data.readers.part import ReadSettings
from trimaran.runtime.data.readers.parts import check_first, find_parts
from trimaran.runtime.data.readers.streams import is_remote
from trimaran.runtime.data.recipe.curated import folder_of_recipe, open_curated
from trimaran.runtime.data.recipe.named_files import named_files
from trimaran.runtime.data.recipe.recipe import Recipe, SourcePart
from trimaran.runtime.data.recipe.steps import cleaning, evaluation_sets, filtering
from trimaran.runtime.data.sources import QUICKSTART
from trimaran.runtime.folder_lock import NO_JOB
from trimaran.runtime.spec.sections.recipe.dedup import DecontaminateSection

if TYPE_CHECKING:
    from trimaran.runtime.spec import RunSpec

_DEDUP_PACKAGES = {"rensa": "near", "pydivsufsort": "substring"}
_PAGES = ("html", "warc")
_ONE = "source"
"""The name of the corpus where `data.source` has the only one."""


def recipe_of(
    spec: "RunSpec", environment: Mapping[str, str] = NO_JOB, *, fetch: bool = True, identify: bool = True
) -> Recipe:
    """Return the recipe of a spec; lists the sources and hashes the files that have changed since they were last seen.

    Args:
        environment: see `Holder.here`.
        identify: whether files are hashed, which writes to the cache; a recipe without can't be run.
        fetch: whether the quickstart corpus is fetched where it is not there yet; it is left out otherwise.

    Raises:
        DataError: a source is missing, can't be read, or too much of it would be passed over; a file, a package or an
            earlier run that a section names is missing or wrong.
    """
    data, cache_dir = spec.data, Path(spec.data.cache_dir)
    recipe = Recipe(
        parts=[],
        max_document_bytes=data.max_document_bytes,
        max_lost_fraction=data.max_lost_fraction,
        substring_memory=None if data.worker_memory is None else int(data.worker_memory * (1 << 30)),
        **{name: _json(getattr(data, name)) for name in ("clean", "filter", "dedup", "decontaminate")},
    )
    _check_sections(recipe)
    sources: list[SourcePart] = []
    passed_over: dict[str, Any] = {}
    for name, corpus in _corpora(spec).items():
        account = Account()
        settings = ReadSettings(corpus["text_field"], data.max_document_bytes)
        there = fetch or (cache_dir / QUICKSTART / "corpus.jsonl").is_file()
        sources_here = [source for source in corpus["source"] if there or source != QUICKSTART]
        if not sources_here:
            continue
        named = [_path_of(source, cache_dir, environment) for source in sources_here]
        parts = find_parts(name, named, settings, account, format=corpus["format"], cache_dir=cache_dir)
        account.check(data.max_lost_fraction)
        check_first(parts, settings)
        sources += [SourcePart(part, "", corpus["text_field"]) for part in parts]
        passed_over[name] = account.record
    if recipe.clean is None:
        _check_no_pages(sources)
    recipe = replace(recipe, parts=sources, passed_over=passed_over)
    return _identified(recipe, named_files(data), cache_dir) if identify else recipe


def _check_no_pages(sources: Sequence[SourcePart]) -> None:
    for source in sources:
        if source.part.format in _PAGES:
            raise DataError(
                f"{source.part.file} has pages, which become text in cleaning, and the spec has no data.clean; write "
                "data.clean: {} for its defaults"
            )


def _check_sections(recipe: Recipe) -> None:
    """Make every step once: what is missing or wrong is told before any work."""
    require_extra("pyarrow")
    cleaning(recipe.clean)
    filtering(recipe.filter)
    if recipe.decontaminate is not None:
        evaluation_sets(DecontaminateSection.model_validate(recipe.decontaminate))
    if recipe.dedup is not None:
        require_extra(*(name for name, wanted in _DEDUP_PACKAGES.items() if recipe.dedup[wanted]))
        for folder in recipe.dedup["against"]:
            try:
                open_curated(folder_of_recipe(Path(folder)))
            except DataError as error:
                raise DataError(f"data.dedup.against: {error}") from error


def _corpora(spec: "RunSpec") -> dict[str, dict[str, Any]]:
    if spec.data.corpora:
        return {name: corpus.model_dump() for name, corpus in spec.data.corpora.items()}
    return {_ONE: {"source": spec.data.source, "text_field": spec.data.text_field, "format": None}}


def _json(section: Any) -> Any:
    return None if section is None else section.model_dump(mode="json")


def _path_of(source: str, cache_dir: Path, environment: Mapping[str, str]) -> str:
    return str(ensure_quickstart(cache_dir, environment=environment).path) if source == QUICKSTART else source


def _identified(recipe: Recipe, named: Mapping[str, Sequence[Path]], cache_dir: Path) -> Recipe:
    """Return the recipe with the sha256 of all its files; of a remote file its stamp, as the store tells it."""
    files = dict.fromkeys(source.part.file for source in recipe.parts)
    local = [Path(file) for file in files if not is_remote(file)]
    digests = dict(zip(map(str, local), once_per_change(local, cache_dir / "sources.json", hash_file), strict=True))
    parts = [replace(each, sha256=digests.get(each.part.file, each.part.stamp)) for each in recipe.parts]
    all_named = list(dict.fromkeys(path for paths in named.values() for path in paths))
    known = dict(zip(all_named, know_files(all_named, cache_dir / "named_files.json"), strict=True))
    mine = {name: tuple(known[path] for path in paths) for name, paths in named.items()}
    return replace(recipe, parts=parts, named_files=mine)
