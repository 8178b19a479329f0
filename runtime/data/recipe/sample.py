"""Some documents of every corpus as a recipe would keep or remove them, to look at before it is run."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, zip_longest
from select import select
from signal import SIGKILL

from trimaran.runtime.data.document import Document, Loss, Step
from trimaran.runtime.data.readers.part import ReadSettings
from trimaran.runtime.data.readers.read import read_part
from trimaran.runtime.data.recipe.recipe import Recipe, SourcePart
from trimaran.runtime.data.recipe.steps import TOO_SLOW, apply_steps, cleaning, filtering
from trimaran.runtime.data.recipe.tally import Tally


def sample_documents(recipe: Recipe, count: int, timeout_s: float) -> Iterator[tuple[str, str, str]]:
    """Yield of up to `count` documents the id, the text, and why cleaning or filters remove it, "" where they do not.

    The corpora take turns, and so do parts spread over each.

    Args:
        timeout_s: the most seconds of one document.
    """
    steps = [*cleaning(recipe.clean), *filtering(recipe.filter)]
    for _, item in zip(range(count), _documents(recipe, count), strict=False):
        if isinstance(item, Loss):
            yield item.place, "", f"{item.reason} {item.detail}".rstrip()
        else:
            text, why = _apply_within(timeout_s, steps, item)
            yield item.id, text or item.raw.decode("utf-8", "replace"), why


def _apply_within(timeout_s: float, steps: Sequence[Step], document: Document) -> tuple[str, str]:
    """Return the text after the steps and why they remove it, from a child that is ended after a while.

    A library that holds the interpreter can be ended in no other way.
    """
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException), os.fdopen(writes, "wb") as out:
            _, removal = apply_steps(steps, document, Tally())
            why = "" if removal is None else f"{removal.reason} {removal.detail}".rstrip()
            out.write(json.dumps([document.text, why]).encode())
        os._exit(0)
    os.close(writes)
    content, deadline = b"", time.monotonic() + timeout_s
    with os.fdopen(reads, "rb", buffering=0) as found:
        while select([found], [], [], max(0.0, deadline - time.monotonic()))[0]:
            piece = found.read(1 << 16)
            if not piece:
                break
            content += piece
        else:
            os.kill(child, SIGKILL)
    os.waitpid(child, 0)
    try:
        text, why = json.loads(content)
    except ValueError:
        return document.text, TOO_SLOW
    return text, why


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
