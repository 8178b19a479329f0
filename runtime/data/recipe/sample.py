"""Some documents of every corpus as a recipe would keep or remove them, to look at before it is run."""

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest

from trimaran.runtime.data.document import Document, Loss
from trimaran.runtime.data.readers.part import ReadSettings
from trimaran.runtime.data.readers.read import read_part
from trimaran.runtime.data.recipe.recipe import Recipe, SourcePart
from trimaran.runtime.data.recipe.steps import apply_steps, cleaning, filtering
from trimaran.runtime.data.recipe.tally import Tally


def sample_documents(recipe: Recipe, count: int) -> Iterator[tuple[str, str, str]]:
    """Yield of up to `count` documents the id, the text, and why cleaning or filters remove it, "" where they do not.

    The corpora take turns, and so do parts spread over each.
    """
    steps, tally = [*cleaning(recipe.clean), *filtering(recipe.filter)], Tally()
    for _, item in zip(range(count), _documents(recipe, count), strict=False):
        if isinstance(item, Loss):
            yield item.place, "", f"{item.reason} {item.detail}".rstrip()
        else:
            _, removal = apply_steps(steps, item, tally)
            text = item.text or item.raw.decode("utf-8", "replace")
            yield item.id, text, "" if removal is None else f"{removal.reason} {removal.detail}".rstrip()


def _documents(recipe: Recipe, count: int) -> Iterator[Document | Loss]:
    corpora: dict[str, list[SourcePart]] = {}
    for source in recipe.parts:
        corpora.setdefault(source.part.corpus, []).append(source)
    spread = [_spread(parts, count // len(corpora)) for parts in corpora.values()]
    for turns in ([few for few, _ in spread], [rest for _, rest in spread]):
        sources = [source for turn in zip_longest(*turns) for source in turn if source is not None]
        readers = [
            read_part(source.part, ReadSettings(source.text_field, recipe.max_document_bytes)) for source in sources
        ]
        while readers:
            for reader in list(readers):
                item = next(reader, None)
                if item is None:
                    readers.remove(reader)
                elif isinstance(item, Document) or item.is_document:
                    yield item


def _spread(parts: Sequence[SourcePart], count: int) -> tuple[list[SourcePart], list[SourcePart]]:
    """Return about `count` of the parts at even distances, and the others."""
    stride = max(1, len(parts) // max(1, count))
    return list(parts[::stride]), list(chain(*(parts[start::stride] for start in range(1, stride))))
