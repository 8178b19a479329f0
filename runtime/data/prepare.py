"""From a corpus to token shards, once: split, train a tokenizer, encode, record.

Runs without torch, before any rank starts.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.corpus import (
    SECTION_CHARACTERS,
    CorpusCounts,
    SourceFile,
    Unit,
    find_files,
    hash_files,
    iter_units,
)
from trimaran.runtime.data.files import DataError, build_once, hash_file
from trimaran.runtime.data.permutation import held_out_units
from trimaran.runtime.data.quickstart import ensure_quickstart
from trimaran.runtime.data.shards import ShardInfo, ShardWriter, TokenShards, dtype_for
from trimaran.runtime.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from trimaran.runtime.spec import RunSpec

QUICKSTART = "quickstart"
SPLITS = ("train", "held_out")
# Raised whenever the same settings would give other shards, so that the cache of an older version is not reused.
FORMAT = 1
# Enough text to keep every core of the encoder busy, little enough to hold in memory several times over.
_BATCH_CHARACTERS = 4 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """A prepared corpus: both splits, the tokenizer, and the manifest, which records how they were made.

    `folder` holds all of it.
    """

    train: TokenShards
    held_out: TokenShards
    tokenizer: Tokenizer
    manifest: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class _Settings:
    """All settings besides the text that decide the content of the shards."""

    tokenizer_file: Path | None
    vocab_size: int
    held_out_fraction: float
    seed: int
    with_mask: bool


def prepare_data(spec: "RunSpec") -> PreparedData:
    """Prepare the corpus of a run spec, or open it where it was prepared before; see `prepare`.

    Raises DataError also when the tokenizer has more tokens than the model's vocabulary, or no mask token where the
    objective needs one.
    """
    data, shape = spec.data, spec.transformer
    prepared = prepare(
        data.source,
        cache_dir=Path(data.cache_dir),
        text_field=data.text_field,
        tokenizer_file=Path(data.tokenizer) if data.tokenizer else None,
        end_of_text=data.end_of_text,
        vocab_size=data.tokenizer_vocab_size,
        held_out_fraction=data.held_out_fraction,
        seed=spec.seed,
        with_mask=shape.objective == "masked_lm",
    )
    check_vocabulary(prepared.tokenizer, shape.vocab_size)
    return prepared


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise DataError when the tokenizer can produce ids that the model's embedding doesn't have."""
    if tokenizer.vocab_size > model_vocab_size:
        rule = f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary only {model_vocab_size}"
        raise DataError(
            f"{rule}; set model.vocab_size (or data.tokenizer_vocab_size) to {tokenizer.vocab_size} or more"
        )


def prepare(
    sources: Sequence[str],
    *,
    cache_dir: Path,
    text_field: str = "text",
    tokenizer_file: Path | None = None,
    end_of_text: str | None = None,
    vocab_size: int = 4096,
    held_out_fraction: float = 0.02,
    seed: int = 1234,
    with_mask: bool = False,
) -> PreparedData:
    """Return the token shards of the sources, from the cache where the same text and settings were prepared before.

    The cache key is a hash of the content, so an edited or moved corpus is recognized; every call therefore reads the
    corpus once to hash it. Two processes may call this at once. Ranks should `open_prepared` the folder instead.

    Args:
        sources: files, folders and globs of .txt and .jsonl (or .gz of them), read in this order. The word "quickstart"
            is the built-in corpus and comes first at any position (a folder of that name is "./quickstart").
        tokenizer_file: an existing tokenizer.json; None trains byte-level BPE of `vocab_size` on the training split.
        end_of_text: the token of `tokenizer_file` that ends a document; None to find it.
        held_out_fraction: share of the units (documents, or sections of long ones) kept out of training, in [0, 1).
        with_mask: whether the tokenizer must have a mask token.
    """
    if not 0 <= held_out_fraction < 1:
        raise DataError(f"data.held_out_fraction ({held_out_fraction}) must be at least 0 and below 1; 0.02 is usual")
    files, source = _collect_source(sources, cache_dir, text_field)
    settings = _Settings(tokenizer_file, vocab_size, held_out_fraction, seed, with_mask)
    tokenizer = Tokenizer.load(tokenizer_file, end_of_text) if tokenizer_file else None
    if tokenizer is not None and with_mask:
        tokenizer.required_mask_id()
    identity = {
        "format": FORMAT,
        "source_sha256": source["sha256"],
        "tokenizer": hash_file(tokenizer_file) if tokenizer_file else vocab_size,
        "section_characters": SECTION_CHARACTERS,
        "held_out_fraction": held_out_fraction,
        "seed": seed,
        # Left out where it has no effect, so that corpora prepared without the field are found.
        **({"with_mask": True} if with_mask and not tokenizer_file else {}),
        **({"end_of_text": end} if tokenizer is not None and (end := tokenizer.unusual_end_of_text) else {}),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / "data" / key
    build_once(folder, lambda temporary: _build(temporary, files, source, settings, tokenizer))
    return open_prepared(folder)


def open_prepared(folder: Path, verify_hashes: bool = False) -> PreparedData:
    """Open a folder that `prepare` made. Checks the tokenizer and the sizes of the shards, and their sha256 on request.

    Raises DataError naming what is missing or damaged.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        dtype, splits = manifest["dtype"], manifest["splits"]
        opened = {
            name: TokenShards(folder, name, dtype, [ShardInfo(**shard) for shard in splits[name]["shards"]])
            for name in SPLITS
        }
        tokenizer_sha256 = manifest["tokenizer"]["sha256"]
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise DataError(
            f"the manifest {path} is missing or damaged ({problem}); delete the folder and the data is prepared again"
        ) from error
    if verify_hashes:
        for shards in opened.values():
            shards.verify_hashes()
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file() or hash_file(tokenizer_file) != tokenizer_sha256:
        raise DataError(
            f"{tokenizer_file} is missing or differs from its manifest; "
            "delete the folder and the data is prepared again"
        )
    return PreparedData(opened["train"], opened["held_out"], Tokenizer.load(tokenizer_file), manifest, folder)


def _collect_source(
    sources: Sequence[str], cache_dir: Path, text_field: str
) -> tuple[list[SourceFile], dict[str, Any]]:
    """Return the files of the sources in order, and the manifest's record of them."""
    files: list[SourceFile] = []
    passed_over: dict[str, int] = {}
    quickstart = None
    if QUICKSTART in sources:
        corpus = ensure_quickstart(cache_dir)
        files.append(SourceFile(corpus.path, "text"))
        quickstart = corpus.notes
    named = [source for source in sources if source != QUICKSTART]
    if named or not files:
        found, counted = find_files(named)
        files += [SourceFile(path, text_field) for path in found]
        passed_over = dict(counted)
    return files, {
        "named": list(sources),
        "sha256": hash_files(files),
        "passed_over": passed_over,
        "quickstart": quickstart,
    }


def _build(
    folder: Path, files: list[SourceFile], source: dict[str, Any], settings: _Settings, tokenizer: Tokenizer | None
) -> None:
    """Write tokenizer.json, the shards of both splits and manifest.json into an empty folder.

    Reads the corpus two or three times.
    """
    counts = CorpusCounts()
    for _ in iter_units(files, counts):
        pass
    if not counts.units:
        raise DataError(
            f"data.source {', '.join(source['named'])} holds no text: "
            f"{counts.dropped or 'no documents'}; name files with text"
        )
    held_out = held_out_units(counts.units, settings.held_out_fraction, settings.seed)
    if settings.held_out_fraction > 0 and not held_out.any():
        logger.warning(
            "the corpus is a single document without a line end to cut it at: "
            "nothing is held out, so there is no held-out loss"
        )
    trained = tokenizer is None
    if tokenizer is None:
        logger.info("training a tokenizer of %d tokens on %.1f MB of text", settings.vocab_size, counts.bytes / 1e6)
        texts = (unit.text for unit, out in zip(iter_units(files, CorpusCounts()), held_out, strict=True) if not out)
        tokenizer = Tokenizer.train(texts, settings.vocab_size, with_mask=settings.with_mask)
        if tokenizer.vocab_size < settings.vocab_size:
            logger.warning(
                "the corpus gives a tokenizer of %d tokens, fewer than the %d asked for",
                tokenizer.vocab_size,
                settings.vocab_size,
            )
    tokenizer.save(folder / "tokenizer.json")
    dtype = dtype_for(tokenizer.vocab_size)
    logger.info("tokenizing %d documents", counts.documents)
    splits = _write_splits(folder, iter_units(files, CorpusCounts()), held_out, tokenizer, dtype)
    manifest = {
        "format": FORMAT,
        "source": source,
        "corpus": asdict(counts),
        "tokenizer": _tokenizer_record(folder, tokenizer, settings, trained),
        "seed": settings.seed,
        "held_out_fraction": settings.held_out_fraction,
        "section_characters": SECTION_CHARACTERS,
        "dtype": dtype,
        "byte_order": "little",
        "splits": splits,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    logger.info(
        "prepared %d documents: %s tokens", counts.documents, {name: split["tokens"] for name, split in splits.items()}
    )


def _tokenizer_record(folder: Path, tokenizer: Tokenizer, settings: _Settings, trained: bool) -> dict[str, Any]:
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
        self._writer.write(tokens)
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
            "shards": [asdict(shard) for shard in shards],
        }


def _write_splits(
    folder: Path, units: Iterator[Unit], held_out: npt.NDArray[np.bool_], tokenizer: Tokenizer, dtype: str
) -> dict[str, dict[str, Any]]:
    """Encode every unit and write it to its split; return the manifest's record of each."""
    with ExitStack() as stack:
        writers = {
            name: _SplitWriter(stack.enter_context(ShardWriter(folder, name, dtype)), tokenizer.eot_id)
            for name in SPLITS
        }
        for batch in _batches(units):
            for (index, unit), tokens in zip(
                batch, tokenizer.encode_batch([unit.text for _, unit in batch]), strict=True
            ):
                writers["held_out" if held_out[index] else "train"].add(index, unit, tokens)
        return {name: writer.close() for name, writer in writers.items()}


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
