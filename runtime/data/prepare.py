"""From a corpus to token shards, once: split, train a tokenizer, encode, record.

Runs without torch, before any rank starts.
"""

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimaran.models.fields import counted
from trimaran.runtime.data.account import Account
from trimaran.runtime.data.corpus import SECTION_CHARACTERS, Unit, iter_units
from trimaran.runtime.data.files import DataError, build_once, hash_file, once_per_change
from trimaran.runtime.data.permutation import held_out_units
from trimaran.runtime.data.quickstart import ensure_quickstart
from trimaran.runtime.data.recipe.curated import MANIFEST, Curated
from trimaran.runtime.data.shards import ShardInfo, ShardWriter, TokenShards, dtype_for, verify_shards
from trimaran.runtime.data.sources import KEPT_NAME, SourceFile, find_files
from trimaran.runtime.data.tokenizer import Tokenizer
from trimaran.runtime.files import read_json
from trimaran.runtime.folder_lock import NO_JOB

if TYPE_CHECKING:
    from trimaran.runtime.spec import RunSpec

QUICKSTART = "quickstart"
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
# The sections of a small corpus are such that this many of them make up its held-out text, but no shorter than a few
# sentences.
_HELD_OUT_SECTIONS = 4
_SHORTEST_SECTION = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """A prepared corpus: both splits, the tokenizer, and the manifest, which records how they were made.

    `folder` holds all of it; `account` is that of the text in the manifest.
    """

    train: TokenShards
    held_out: TokenShards
    tokenizer: Tokenizer
    manifest: dict[str, Any]
    folder: Path
    account: Account


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
class _Settings:
    """All settings besides the text; those above `max_lost_fraction` decide the content of the shards."""

    tokenizer_file: Path | None
    vocab_size: int
    held_out_fraction: float
    seed: int
    with_mask: bool
    max_lost_fraction: float
    model_vocab_size: int | None
    former: Digests | None


def prepare_data(
    spec: "RunSpec",
    tokenizer_file: Path | None = None,
    *,
    curated: Curated | None = None,
    former: Digests | None = None,
    environment: Mapping[str, str] = NO_JOB,
) -> PreparedData:
    """Prepare the corpus of a run spec, or open it where it was prepared before; see `prepare`.

    Args:
        tokenizer_file: the tokenizer where the spec names none; None trains one.
        curated: what the spec's recipe keeps, in the place of the sources.
    """
    data, shape = spec.data, spec.transformer
    return prepare(
        data.source,
        cache_dir=Path(data.cache_dir),
        text_field=data.text_field,
        tokenizer_file=Path(data.tokenizer) if data.tokenizer else tokenizer_file,
        end_of_text=data.end_of_text,
        vocab_size=data.tokenizer_vocab_size,
        held_out_fraction=data.held_out_fraction,
        seed=spec.seed,
        with_mask=shape.objective == "masked_lm",
        max_lost_fraction=data.max_lost_fraction,
        model_vocab_size=shape.vocab_size,
        curated=curated,
        former=former,
        environment=environment,
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
    max_lost_fraction: float = 0.05,
    model_vocab_size: int | None = None,
    curated: Curated | None = None,
    former: Digests | None = None,
    environment: Mapping[str, str] = NO_JOB,
) -> PreparedData:
    """Return the token shards of the sources, from the cache where the same text and settings were prepared before.

    The cache key is a hash of the content, so an edited or moved corpus is recognized; files that have changed since
    the last call are read once to hash them, and so are shards. Two processes may call this at once. Ranks should
    `open_prepared` the folder instead.

    Args:
        sources: files, folders and globs, read in this order; see `find_files`. The word "quickstart" is the built-in
            corpus and comes first at any position (a folder of that name is "./quickstart").
        tokenizer_file: an existing tokenizer.json; None trains byte-level BPE of `vocab_size` on the training split.
        end_of_text: the token of `tokenizer_file` that ends a document; None to find it.
        held_out_fraction: share of the units (documents, or sections of long ones) kept out of training, in [0, 1).
        with_mask: whether the tokenizer must have a mask token.
        max_lost_fraction: the largest share of the text that may be lost for one reason; DataError above it.
        model_vocab_size: the most tokens that the tokenizer may have; DataError above it.
        curated: what a recipe keeps of the sources, which is read in their place.
        former: what a resumed run has trained on so far; DataError, before anything is tokenized, where it has changed.
        environment: see `Holder.here`.
    """
    if not 0 <= held_out_fraction < 1:
        raise DataError(f"data.held_out_fraction ({held_out_fraction}) must be at least 0 and below 1; 0.02 is usual")
    settings = _Settings(
        tokenizer_file, vocab_size, held_out_fraction, seed, with_mask, max_lost_fraction, model_vocab_size, former
    )
    tokenizer = Tokenizer.load(tokenizer_file, end_of_text) if tokenizer_file else None
    if tokenizer is not None:
        check_tokenizer(tokenizer, with_mask, model_vocab_size)
    if curated is not None:
        files, source = _kept_source(curated, cache_dir)
    else:
        files, source = _collect_source(sources, cache_dir, text_field, max_lost_fraction, environment)
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
    build_once(folder, lambda temporary: _build(temporary, files, source, settings, tokenizer), environment)
    prepared = open_prepared(folder, verify=True)
    check_tokenizer(prepared.tokenizer, with_mask, model_vocab_size, trained=tokenizer_file is None)
    prepared.account.check(max_lost_fraction)
    # The same text may have been found elsewhere when it was prepared.
    return replace(prepared, manifest={**prepared.manifest, "source": source})


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


def open_prepared(folder: Path, verify: bool = False) -> PreparedData:
    """Open a folder that `prepare` made. Checks the tokenizer and the sizes of the shards.

    Raises DataError naming what is missing or damaged.

    Args:
        verify: whether to check the content of shards that have changed since they were last checked.
    """
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
        dtype, splits = manifest["dtype"], manifest["splits"]
        opened = {
            name: TokenShards(folder, name, dtype, [ShardInfo(**shard) for shard in splits[name]["shards"]])
            for name in SPLITS
        }
        tokenizer_sha256, account = manifest["tokenizer"]["sha256"], Account.read(manifest["corpus"])
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"the manifest {path} is missing or damaged ({problem}); delete the folder and the data is prepared again"
        ) from error
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file() or hash_file(tokenizer_file) != tokenizer_sha256:
        raise DataError(
            f"{tokenizer_file} is missing or differs from its manifest; "
            "delete the folder and the data is prepared again"
        )
    tokenizer = Tokenizer.load(tokenizer_file)
    if verify:
        verify_shards(folder, list(opened.values()), tokenizer.vocab_size)
    return PreparedData(opened["train"], opened["held_out"], tokenizer, manifest, folder, account)


def _collect_source(
    sources: Sequence[str], cache_dir: Path, text_field: str, max_lost_fraction: float, environment: Mapping[str, str]
) -> tuple[list[SourceFile], dict[str, Any]]:
    """Return the files of the sources in order, and the manifest's record of them."""
    files: list[SourceFile] = []
    account = Account()
    quickstart = None
    if QUICKSTART in sources:
        corpus = ensure_quickstart(cache_dir, environment=environment)
        files.append(SourceFile(corpus.path, "text"))
        quickstart = corpus.notes
    named = [source for source in sources if source != QUICKSTART]
    if named or not files:
        files += find_files(named, text_field, account, cache_dir)
        account.check(max_lost_fraction)
    return files, {
        "named": list(sources),
        "sha256": hash_source(files, cache_dir),
        "found": account.record,
        "quickstart": quickstart,
    }


def _kept_source(curated: Curated, cache_dir: Path) -> tuple[list[SourceFile], dict[str, Any]]:
    """Return the files of what a recipe keeps, and the manifest's record of them."""
    files = [SourceFile(folder / KEPT_NAME, "") for folder in curated.parts]
    return files, {
        "named": sorted(curated.manifest["sources"]),
        "sha256": hash_source(files, cache_dir),
        "found": Account().record,
        "quickstart": None,
        "recipe": {"folder": str(curated.folder), "sha256": hash_file(curated.folder / MANIFEST)},
    }


def hash_source(files: Sequence[SourceFile], cache_dir: Path) -> str:
    """Return one sha256 of the kinds and contents of the files in order.

    Names and paths don't enter, so a moved corpus has the same hash. A file that is known in the cache by its time of
    change is not read again.
    """
    paths = [file.path for file in files]
    record = hashlib.sha256("\n".join(str(path.absolute()) for path in paths).encode("utf-8", "surrogateescape"))
    hashes = once_per_change(paths, cache_dir / "sources" / f"{record.hexdigest()[:16]}.json", hash_file)
    digest = hashlib.sha256()
    for file, content in zip(files, hashes, strict=True):
        kind = file.kind if file.kind == "txt" else f"{file.kind} {file.text_field}"
        digest.update(f"{kind}{file.compression} {content}\n".encode())
    return digest.hexdigest()


def _read_units(
    files: list[SourceFile], settings: _Settings, named: str
) -> tuple[Account, npt.NDArray[np.int64], int, str]:
    """Read the corpus; return its account, the characters of every unit, the most of a section, and the text's sha256.

    Raises DataError where the text is not that of `settings.former`.
    """
    account, limit, digest = Account(), SECTION_CHARACTERS, hashlib.sha256()
    sizes = array("q")
    for unit in iter_units(files, account):
        sizes.append(len(unit.text))
        digest.update(("" if unit.continues else "\0").encode() + unit.text.encode())
    if settings.former is not None and settings.former.text != digest.hexdigest():
        raise DataError(f"the files of data.source {CHANGED.format(since='this run began')}")
    if not sizes:
        raise DataError(f"data.source {named} holds no text: {account.told() or 'no documents'}; name files with text")
    account.check(settings.max_lost_fraction)
    shorter = int(account.totals["characters"] * settings.held_out_fraction / _HELD_OUT_SECTIONS)
    if settings.held_out_fraction > 0 and shorter < limit:
        account, limit = Account(), max(_SHORTEST_SECTION, shorter)
        sizes = array("q", (len(unit.text) for unit in iter_units(files, account, limit)))
    return account, np.array(sizes, dtype=np.int64), limit, digest.hexdigest()


def _build(
    folder: Path, files: list[SourceFile], source: dict[str, Any], settings: _Settings, tokenizer: Tokenizer | None
) -> None:
    """Write tokenizer.json, the shards of both splits and manifest.json into an empty folder.

    Reads the corpus two or three times, a small one once more.
    """
    account, sizes, limit, text_sha256 = _read_units(files, settings, ", ".join(source["named"]))
    held_out = held_out_units(sizes, settings.held_out_fraction, settings.seed)
    if settings.held_out_fraction > 0 and not held_out.any():
        logger.warning(
            "the corpus is a single document without white space to cut it at: "
            "nothing is held out, so there is no held-out loss"
        )
    trained = tokenizer is None
    if tokenizer is None:
        size = account.totals["bytes"] / 1e6
        logger.info("training a tokenizer of %d tokens on %.1f MB of text", settings.vocab_size, size)
        units = iter_units(files, Account(), limit)
        texts = (unit.text for unit, out in zip(units, held_out, strict=True) if not out)
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
    logger.info("tokenizing %s", counted(account.totals["documents"], "document"))
    encoded = _encoded(iter_units(files, Account(), limit), tokenizer, account, settings.max_lost_fraction)
    splits = _write_splits(folder, encoded, held_out, tokenizer.eot_id, dtype)
    manifest = {
        "format": FORMAT,
        "source": source,
        "corpus": account.record,
        "text_sha256": text_sha256,
        "tokenizer": _tokenizer_record(folder, tokenizer, settings, trained),
        "seed": settings.seed,
        "held_out_fraction": settings.held_out_fraction,
        "section_characters": limit,
        "dtype": dtype,
        "byte_order": "little",
        "splits": splits,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


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
    folder: Path,
    units: Iterator[tuple[int, Unit, list[int]]],
    held_out: npt.NDArray[np.bool_],
    eot_id: int,
    dtype: str,
) -> dict[str, dict[str, Any]]:
    """Write every encoded unit to its split; return the manifest's record of each."""
    with ExitStack() as stack:
        writers = {name: _SplitWriter(stack.enter_context(ShardWriter(folder, name, dtype)), eot_id) for name in SPLITS}
        for index, unit, tokens in units:
            writers["held_out" if held_out[index] else "train"].add(index, unit, tokens)
        return {name: writer.close() for name, writer in writers.items()}


def _encoded(
    units: Iterator[Unit], tokenizer: Tokenizer, account: Account, max_lost_fraction: float
) -> Iterator[tuple[int, Unit, list[int]]]:
    """Yield (index, unit, token ids) of every unit; the characters that the ids lack are noted, with a limit."""
    for batch in _batches(units):
        texts = [unit.text for _, unit in batch]
        try:
            encoded = tokenizer.encode_batch(texts)
        except DataError:
            for _, unit in batch:  # which one it is
                _encode_alone(unit, tokenizer)
            raise
        for (_, unit), lost in zip(batch, tokenizer.lost_characters(texts, encoded), strict=True):
            account.note("unknown", unit.place, lost)
        account.check(max_lost_fraction, ["unknown"])
        yield from ((index, unit, ids) for (index, unit), ids in zip(batch, encoded, strict=True))


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
