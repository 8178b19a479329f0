"""The units of a corpus, which are what splits consist of; how they are encoded and written, wherever that is done."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.account import Account
from trimaran.runtime.data.corpus import Unit
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.permutation import Int64Array, held_out_units, sample_units
from trimaran.runtime.data.tokens.shards import ShardWriter
from trimaran.runtime.data.tokens.tokenizer import Tokenizer

SPLITS: Final = ("train", "held_out")  # so that `held_out` of a unit is its index
Mask = npt.NDArray[np.bool_]
Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
Encode = Callable[[Sequence[str]], list[list[int]]]
# Enough text to keep every core of the encoder busy, little enough to hold in memory several times over.
_BATCH_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class Units:
    """What a reading of the corpus finds.

    Attributes:
        sizes: [n] int64, characters of each unit.
        counts: the corpus of each part, in order, and the number of its units; parts of a corpus follow each other.
        limit: the most characters of a section.
        sha256: of the text.
        first_tokens: the place of the first unit that came as token ids, "" where there is none.
    """

    account: Account
    sizes: Int64Array
    counts: Sequence[tuple[str, int]]
    limit: int
    sha256: str
    first_tokens: str

    @property
    def corpora(self) -> dict[str, slice]:
        """Name -> the units of a corpus, as a range; without those that have none."""
        found: dict[str, slice] = {}
        for (name, count), (start, stop) in zip(self.counts, self._ranges, strict=True):
            if count:
                found[name] = slice(found[name].start if name in found else start, stop)
        return found

    @property
    def _ranges(self) -> Iterator[tuple[int, int]]:
        return pairwise(accumulate((count for _, count in self.counts), initial=0))

    def of_parts(self, mask: Mask) -> list[Mask]:
        """Return what a mask of all units says of those of each part."""
        return [mask[start:stop] for start, stop in self._ranges]

    def held_out(self, fraction: float, seed: int) -> Mask:
        """Return [n] bool: whether each unit is held out, the same share of every corpus."""
        parts = [held_out_units(self.sizes[of], fraction, seed + i) for i, of in enumerate(self.corpora.values())]
        return np.concatenate(parts)

    def sample(self, allowed: Mask, num_bytes: int | None, weights: Mapping[str, float], seed: int) -> Mask:
        """Return [n] bool: the units that the tokenizer is trained on, of each corpus by its weight; None: all."""
        if num_bytes is None:
            return allowed
        characters = num_bytes * self.account.totals["characters"] / max(1, self.account.totals["bytes"])
        total = sum(weights.get(name, 1.0) for name in self.corpora)
        chosen = np.zeros_like(allowed)
        for index, (name, of) in enumerate(self.corpora.items()):
            candidates = np.arange(of.start, of.stop)[allowed[of]]
            if len(candidates) and weights.get(name, 1.0):
                quota = characters * weights.get(name, 1.0) / total
                chosen[candidates[sample_units(self.sizes[candidates], quota, seed + index)]] = True
        return chosen


class Corpus(Protocol):
    """The text that is prepared, and who works on it."""

    def measure(self, limit: int) -> Units:
        """Read the corpus in sections of at most so many characters."""

    def train(self, units: Units, chosen: Mask, vocab_size: int, *, with_mask: bool) -> Tokenizer:
        """Train a tokenizer on the chosen units."""

    def encode(self, folder: Path, units: Units, held_out: Mask, encoding: "Encoding") -> dict[str, dict[str, Any]]:
        """Write the shards of both splits into a folder; return the manifest's record of each.

        What the tokenizer can't write is noted in the account of the units.

        Raises:
            DataError: that is more than may be lost.
        """


@dataclass(frozen=True)
class Encoding:
    """How texts become tokens.

    Attributes:
        fast: whether by `FastEncoder`, which gives the same ids.
        dtype: of the shards.
        max_lost_fraction: the largest share of the characters that the tokenizer may be unable to write.
    """

    tokenizer: Tokenizer
    fast: bool
    dtype: str
    max_lost_fraction: float

    def check(self, account: Account) -> None:
        """Raise DataError where too much could not be written."""
        account.check(self.max_lost_fraction, ["unknown"])


def encode_units(
    units: Iterator[Unit],
    tokenizer: Tokenizer,
    encode: Encode,
    account: Account,
    check: Callable[[], None],
) -> Iterator[tuple[int, Unit, Tokens]]:
    """Yield (index, unit, token ids) of every unit; the characters that the ids lack are noted in `account`.

    Args:
        check: called now and then; it may end the work.
    """
    for batch in _batches(units):
        texts = [unit.text for _, unit in batch]
        try:
            encoded = encode(texts)
        except DataError:
            for _, unit in batch:  # which one it is
                _encode_alone(unit, tokenizer)
            raise
        for (_, unit), lost in zip(batch, tokenizer.lost_characters(texts, encoded), strict=True):
            account.note("unknown", unit.place, lost)
        check()
        for (index, unit), ids in zip(batch, encoded, strict=True):
            if len(unit.tokens) and (largest := int(np.max(unit.tokens))) >= tokenizer.vocab_size:
                rule = f"{unit.place} has the token {largest}, and data.tokenizer only {tokenizer.vocab_size}"
                raise DataError(f"{rule}; name the tokenizer that made it")
            yield index, unit, unit.tokens if len(unit.tokens) else ids


def _encode_alone(unit: Unit, tokenizer: Tokenizer) -> None:
    try:
        tokenizer.encode(unit.text)
    except DataError as error:
        raise DataError(f"{unit.place}: {error}") from error


def _batches(units: Iterator[Unit]) -> Iterator[list[tuple[int, Unit]]]:
    """Yield numbered units in batches of about `_BATCH_CHARACTERS`."""
    batch: list[tuple[int, Unit]] = []
    characters = 0
    for index, unit in enumerate(units):
        batch.append((index, unit))
        characters += len(unit.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def write_splits(
    units: Iterator[tuple[int, Unit, Tokens]], held_out: Mask, shards: Sequence[ShardWriter], eot_id: int
) -> dict[str, dict[str, Any]]:
    """Write encoded units, which begin and end with a document, to their splits; return the record of each split.

    Args:
        shards: the writer of each of SPLITS.
    """
    writers = [_SplitWriter(each, eot_id) for each in shards]
    for index, unit, tokens in units:
        writers[int(held_out[index])].add(index, unit, tokens)
    return {name: writer.close() for name, writer in zip(SPLITS, writers, strict=True)}


class _SplitWriter:
    """Writes one split.

    An end-of-text token follows each document, and each gap where a section belongs to the other split.
    """

    def __init__(self, writer: ShardWriter, eot_id: int) -> None:
        self._writer = writer
        self._eot_id = eot_id
        self._last_index: int | None = None
        self._counts = {"units": 0, "characters": 0, "bytes": 0}

    def add(self, index: int, unit: Unit, tokens: Tokens) -> None:
        if self._last_index is not None and not (unit.continues and self._last_index == index - 1):
            self._writer.write([self._eot_id])
        self._writer.write(tokens[:-1] if len(unit.tokens) and tokens[-1] == self._eot_id else tokens)
        self._last_index = index
        self._counts["units"] += 1
        self._counts["characters"] += len(unit.text)
        self._counts["bytes"] += len(unit.text.encode())

    def close(self) -> dict[str, Any]:
        """Return the manifest's record of what was written."""
        if self._last_index is not None:
            self._writer.write([self._eot_id])
        shards = self._writer.close()
        return {
            **self._counts,
            "tokens": sum(shard.tokens for shard in shards),
            "shards": [shard.record for shard in shards],
        }
