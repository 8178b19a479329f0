"""The work of `prepare`: read the units of a corpus, train a tokenizer, encode, and write the shards of both splits."""

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimaran.models.fields import counted
from trimaran.runtime.data.account import Account
from trimaran.runtime.data.corpus import SECTION_CHARACTERS, Unit, iter_units
from trimaran.runtime.data.files import DataError, hash_file
from trimaran.runtime.data.permutation import held_out_units, sample_units
from trimaran.runtime.data.sources import SourceFile
from trimaran.runtime.data.tokens.shards import ShardWriter, dtype_for
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import read_json

SPLITS = ("train", "held_out")
CHANGED = (
    "have changed since {since}, or an earlier version has cut them otherwise, so its tokens mean something else now; "
    "put the former files back, or choose another train.output_dir for a new run"
)
"""The end of the sentence about data of a run that is not what it was."""
# Raised whenever the same settings would give other shards, so that the cache of an older version is not reused.
FORMAT = 2
# Enough text to keep every core of the encoder busy, little enough to hold in memory several times over.
_BATCH_CHARACTERS = 4 << 20
# To find out whether the faster engine gives the same ids takes a second.
_BULK_BYTES = 16 << 20
Encode = Callable[[Sequence[str]], list[list[int]]]
# The sections of a small corpus are such that this many of them make up its held-out text, but no shorter than a few
# sentences.
_HELD_OUT_SECTIONS = 4
_SHORTEST_SECTION = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Digests:
    """The sha256 of a corpus's text, without how files hold it, and of the tokenizer."""

    text: str
    tokenizer: str

    @staticmethod
    def read(path: Path) -> "Digests | None":
        """Return those in a manifest, None where it can't be read or an earlier version wrote it."""
        try:
            manifest = read_json(path)
            return Digests(str(manifest["text_sha256"]), str(manifest["tokenizer"]["sha256"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class BuildSettings:
    """All settings besides the text; those above `max_lost_fraction` decide the content of the shards."""

    tokenizer_file: Path | None
    vocab_size: int
    held_out_fraction: float
    seed: int
    with_mask: bool
    max_lost_fraction: float
    model_vocab_size: int | None
    former: Digests | None
    tokenizer_train_bytes: int | None
    weights: Mapping[str, float]


def check_tokenizer(tokenizer: Tokenizer, with_mask: bool, most: int | None, *, trained: bool = False) -> None:
    """Raise DataError when the tokenizer has ids that the model's embedding doesn't have, or lacks a mask token.

    Args:
        most: the size of the model's vocabulary.
        trained: whether it was trained on the text, to a size that the spec names.
    """
    if with_mask:
        tokenizer.required_mask_id()
    if most is not None and tokenizer.vocab_size > most:
        rule = f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary only {most}"
        field = "data.tokenizer to another one" if not trained else f"data.tokenizer_vocab_size to {most}"
        raise DataError(f"{rule}; set model.vocab_size to {tokenizer.vocab_size} or more, or {field}")


@dataclass(frozen=True)
class _Units:
    """What a first reading of the corpus finds.

    Attributes:
        sizes: [n] int64, characters of each unit.
        corpora: name -> the units of it, as a range; units of a corpus follow each other.
        limit: the most characters of a section.
        sha256: of the text.
    """

    account: Account
    sizes: npt.NDArray[np.int64]
    corpora: Mapping[str, slice]
    limit: int
    sha256: str

    def held_out(self, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
        """Return [n] bool: whether each unit is held out, the same share of every corpus."""
        parts = [held_out_units(self.sizes[of], fraction, seed + i) for i, of in enumerate(self.corpora.values())]
        return np.concatenate(parts)

    def sample(self, allowed: npt.NDArray[np.bool_], settings: BuildSettings) -> npt.NDArray[np.bool_]:
        """Return [n] bool: the units that the tokenizer is trained on, of each corpus by its weight."""
        most, weights = settings.tokenizer_train_bytes, settings.weights
        if most is None:
            return allowed
        characters = most * self.account.totals["characters"] / max(1, self.account.totals["bytes"])
        total = sum(weights.get(name, 1.0) for name in self.corpora)
        chosen = np.zeros_like(allowed)
        for index, (name, of) in enumerate(self.corpora.items()):
            candidates = np.arange(of.start, of.stop)[allowed[of]]
            if len(candidates) and weights.get(name, 1.0):
                quota = characters * weights.get(name, 1.0) / total
                chosen[candidates[sample_units(self.sizes[candidates], quota, settings.seed + index)]] = True
        return chosen


def _read_units(files: list[SourceFile], settings: BuildSettings, named: str) -> _Units:
    """Read the corpus once, a small one twice.

    Raises DataError where the text is not that of `settings.former`.
    """
    account, limit, digest = Account(), SECTION_CHARACTERS, hashlib.sha256()
    sizes, names = array("q"), list[str]()
    for unit in iter_units(files, account):
        sizes.append(unit.size)
        names.append(unit.corpus)
        digest.update(("" if unit.continues else "\0").encode() + unit.text.encode() + bytes(array("I", unit.tokens)))
        if unit.tokens and settings.tokenizer_file is None:
            rule = f"{unit.place} has token ids and no text, and they mean nothing without their tokenizer"
            raise DataError(f"{rule}; name its tokenizer.json in data.tokenizer")
    if settings.former is not None and settings.former.text != digest.hexdigest():
        raise DataError(f"the files of data.source {CHANGED.format(since='this run began')}")
    if not sizes:
        raise DataError(f"data.source {named} holds no text: {account.told() or 'no documents'}; name files with text")
    account.check(settings.max_lost_fraction)
    shorter = int(account.totals["characters"] * settings.held_out_fraction / _HELD_OUT_SECTIONS)
    if settings.held_out_fraction > 0 and shorter < limit:
        account, limit = Account(), max(_SHORTEST_SECTION, shorter)
        units = [(unit.size, unit.corpus) for unit in iter_units(files, account, limit)]
        sizes, names = array("q", (size for size, _ in units)), [name for _, name in units]
    bounds = [0, *(index for index in range(1, len(names)) if names[index] != names[index - 1]), len(names)]
    corpora = {names[start]: slice(start, stop) for start, stop in pairwise(bounds)}
    return _Units(account, np.array(sizes, dtype=np.int64), corpora, limit, digest.hexdigest())


def build(
    folder: Path, files: list[SourceFile], source: dict[str, Any], settings: BuildSettings, tokenizer: Tokenizer | None
) -> None:
    """Write tokenizer.json, the shards of both splits and manifest.json into an empty folder.

    Reads the corpus two or three times, a small one once more.
    """
    found = _read_units(files, settings, ", ".join(source["named"]))
    account, limit = found.account, found.limit
    held_out = found.held_out(settings.held_out_fraction, settings.seed)
    if settings.held_out_fraction > 0 and not held_out.any():
        logger.warning(
            "the corpus is a single document without white space to cut it at: "
            "nothing is held out, so there is no held-out loss"
        )
    trained = tokenizer is None
    if tokenizer is None:
        size = min(account.totals["bytes"], settings.tokenizer_train_bytes or account.totals["bytes"]) / 1e6
        logger.info("training a tokenizer of %d tokens on %.1f MB of text", settings.vocab_size, size)
        units, chosen = iter_units(files, Account(), limit), found.sample(~held_out, settings)
        texts = (unit.text for unit, wanted in zip(units, chosen, strict=True) if wanted)
        tokenizer = Tokenizer.train(texts, settings.vocab_size, with_mask=settings.with_mask)
        if tokenizer.vocab_size < settings.vocab_size:
            logger.warning(
                "the corpus gives a tokenizer of %d tokens, fewer than the %d asked for",
                tokenizer.vocab_size,
                settings.vocab_size,
            )
    check_tokenizer(tokenizer, settings.with_mask, settings.model_vocab_size, trained=trained)
    tokenizer.save(folder / "tokenizer.json")
    if settings.former is not None and settings.former.tokenizer != hash_file(folder / "tokenizer.json"):
        raise DataError(f"the tokenizer (data.tokenizer) {CHANGED.format(since='this run began')}")
    dtype = dtype_for(tokenizer.vocab_size)
    documents = counted(account.totals["documents"], "document")
    encode: Encode = tokenizer.encode_batch
    engine = "tokenizers"
    if account.totals["bytes"] >= _BULK_BYTES:
        encode, engine = tokenizer.bulk_encoder()
    logger.info("tokenizing %s by %s", documents, engine)
    units = iter_units(files, Account(), limit)
    encoded = _encoded(units, tokenizer, encode, account, settings.max_lost_fraction)
    splits = _write_splits(folder, encoded, held_out, tokenizer.eot_id, dtype)
    manifest = {
        "format": FORMAT,
        "source": source,
        "corpus": account.record,
        "text_sha256": found.sha256,
        "tokenizer": _tokenizer_record(folder, tokenizer, settings, trained),
        "seed": settings.seed,
        "held_out_fraction": settings.held_out_fraction,
        "section_characters": limit,
        "dtype": dtype,
        "byte_order": "little",
        "splits": splits,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _tokenizer_record(folder: Path, tokenizer: Tokenizer, settings: BuildSettings, trained: bool) -> dict[str, Any]:
    return {
        "sha256": hash_file(folder / "tokenizer.json"),
        "trained_on": "train" if trained else None,
        "loaded_from": None if trained else str(settings.tokenizer_file),
        "vocab_size": tokenizer.vocab_size,
        "requested_vocab_size": settings.vocab_size if trained else None,
        "eot_token": tokenizer.eot_token,
        "eot_id": tokenizer.eot_id,
    }


class _SplitWriter:
    """Writes one split.

    An end-of-text token follows each document, and each gap where a section belongs to the other split.
    """

    def __init__(self, writer: ShardWriter, eot_id: int) -> None:
        self._writer = writer
        self._eot_id = eot_id
        self._last_index: int | None = None
        self._counts = {"units": 0, "characters": 0, "bytes": 0}

    def add(self, index: int, unit: Unit, tokens: list[int]) -> None:
        if self._last_index is not None and not (unit.continues and self._last_index == index - 1):
            self._writer.write([self._eot_id])
        self._writer.write(tokens[:-1] if unit.tokens and tokens[-1] == self._eot_id else tokens)
        self._last_index = index
        self._counts["units"] += 1
        self._counts["characters"] += len(unit.text)
        self._counts["bytes"] += len(unit.text.encode())

    def close(self) -> dict[str, Any]:
        """Return the manifest's record of this split."""
        if self._last_index is not None:
            self._writer.write([self._eot_id])
        shards = self._writer.close()
        return {
            **self._counts,
            "tokens": sum(shard.tokens for shard in shards),
            "shards": [shard.record for shard in shards],
        }


def _write_splits(
    folder: Path,
    units: Iterator[tuple[int, Unit, list[int]]],
    held_out: npt.NDArray[np.bool_],
    eot_id: int,
    dtype: str,
) -> dict[str, dict[str, Any]]:
    """Write every encoded unit to its split, each corpus to files of its own; return the manifest's record of each."""
    splits: dict[str, dict[str, Any]] = {
        name: {"units": 0, "characters": 0, "bytes": 0, "tokens": 0, "shards": []} for name in SPLITS
    }
    for corpus, of_corpus in groupby(units, key=lambda item: item[1].corpus):
        with ExitStack() as stack:
            writers = {
                name: _SplitWriter(stack.enter_context(ShardWriter(folder, name, dtype, corpus=corpus)), eot_id)
                for name in SPLITS
            }
            for index, unit, tokens in of_corpus:
                writers["held_out" if held_out[index] else "train"].add(index, unit, tokens)
            for name, writer in writers.items():
                for key, value in writer.close().items():
                    splits[name][key] += value
    return splits


def _encoded(
    units: Iterator[Unit], tokenizer: Tokenizer, encode: Encode, account: Account, max_lost_fraction: float
) -> Iterator[tuple[int, Unit, list[int]]]:
    """Yield (index, unit, token ids) of every unit; the characters that the ids lack are noted, with a limit."""
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
        account.check(max_lost_fraction, ["unknown"])
        for (index, unit), ids in zip(batch, encoded, strict=True):
            if unit.tokens and max(unit.tokens) >= tokenizer.vocab_size:
                rule = f"{unit.place} has the token {max(unit.tokens)}, and data.tokenizer only {tokenizer.vocab_size}"
                raise DataError(f"{rule}; name the tokenizer that made it")
            yield index, unit, list(unit.tokens) or ids


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
