"""From a corpus to token shards, once: split, train a tokenizer, encode, record.

Runs without torch, before any rank starts.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trimaran.runtime.data.account import Account
from trimaran.runtime.data.engine.parts import KEPT
from trimaran.runtime.data.engine.task import InThisProcess, Output, Progress, TaskRunner
from trimaran.runtime.data.files import DataError, NotPrepared, build_once, hash_file, once_per_change
from trimaran.runtime.data.quickstart import ensure_quickstart
from trimaran.runtime.data.recipe.curated import MANIFEST, Curated
from trimaran.runtime.data.sources import MEGATRON, QUICKSTART, SECTION_CHARACTERS, SourceFile, find_files
from trimaran.runtime.data.tokens.build import FORMAT, BuildSettings, Digests, build, check_tokenizer
from trimaran.runtime.data.tokens.kept import KeptCorpus
from trimaran.runtime.data.tokens.plain import PlainCorpus
from trimaran.runtime.data.tokens.shards import ShardInfo, TokenShards, verify_shards
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.data.tokens.units import SPLITS, Corpus
from trimaran.runtime.files import read_json
from trimaran.runtime.folder_lock import NO_JOB

if TYPE_CHECKING:
    from trimaran.runtime.spec import RunSpec

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


def prepare_data(
    spec: "RunSpec",
    tokenizer_file: Path | None = None,
    *,
    curated: Curated | None = None,
    runner: TaskRunner | None = None,
    progress: Progress = lambda *_: None,
    former: Digests | None = None,
    build_missing: bool = True,
    environment: Mapping[str, str] = NO_JOB,
) -> PreparedData:
    """Prepare the corpus of a run spec, or open it where it was prepared before; see `prepare`.

    Args:
        tokenizer_file: the tokenizer where the spec names none; None trains one.
        curated: what the spec's recipe keeps, in the place of the sources; see `prepare` for `runner` and `progress`.
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
        runner=runner,
        progress=progress,
        tokenizer_train_bytes=data.tokenizer_train_bytes,
        weights={name: corpus.weight for name, corpus in data.corpora.items()},
        former=former,
        build_missing=build_missing,
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
    runner: TaskRunner | None = None,
    progress: Progress = lambda *_: None,
    tokenizer_train_bytes: int | None = None,
    weights: Mapping[str, float] = MappingProxyType({}),
    former: Digests | None = None,
    build_missing: bool = True,
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
        runner: makes the tokens of that (None: this process, part by part).
        progress: told how far that is.
        tokenizer_train_bytes: about how much text the tokenizer is trained on, spread over it; None for all.
        weights: corpus -> its share of that, 1 for those without.
        former: what a resumed run has trained on so far; DataError, before anything is tokenized, where it has changed.
        build_missing: whether to prepare what was not prepared before; NotPrepared otherwise.
        environment: see `Holder.here`.
    """
    if not 0 <= held_out_fraction < 1:
        raise DataError(f"data.held_out_fraction ({held_out_fraction}) must be at least 0 and below 1; 0.02 is usual")
    settings = BuildSettings(
        tokenizer_file,
        vocab_size,
        held_out_fraction,
        seed,
        with_mask,
        max_lost_fraction,
        model_vocab_size,
        former,
        tokenizer_train_bytes,
        weights,
    )
    tokenizer = Tokenizer.load(tokenizer_file, end_of_text) if tokenizer_file else None
    if tokenizer is not None:
        check_tokenizer(tokenizer, with_mask, model_vocab_size)
    corpus: Corpus
    if curated is not None:
        corpus = KeptCorpus(_parts_of(curated), runner or InThisProcess(curated.root), progress)
        source = _kept_source(curated)
    else:
        files, source = _collect_source(sources, cache_dir, text_field, max_lost_fraction, environment)
        corpus = PlainCorpus(files)
    identity = {
        "format": FORMAT,
        "source_sha256": source["sha256"],
        "tokenizer": hash_file(tokenizer_file) if tokenizer_file else vocab_size,
        "section_characters": SECTION_CHARACTERS,
        "held_out_fraction": held_out_fraction,
        "seed": seed,
        # Left out where it has no effect, so that corpora prepared without the field are found.
        **({"with_mask": True} if with_mask and not tokenizer_file else {}),
        **(
            {"tokenizer_train_bytes": tokenizer_train_bytes, "weights": dict(weights)}
            if tokenizer_train_bytes is not None and not tokenizer_file
            else {}
        ),
        **({"end_of_text": end} if tokenizer is not None and (end := tokenizer.unusual_end_of_text) else {}),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / "data" / key
    if not folder.is_dir():
        if not build_missing:
            raise NotPrepared(f"{folder} is not there yet; run trimaran prepare")
        if runner is not None:
            runner.begin()  # its lock before that of the folder, in every process
    build_once(folder, lambda temporary: build(temporary, corpus, source, settings, tokenizer), environment)
    prepared = open_prepared(folder, verify=True)
    check_tokenizer(prepared.tokenizer, with_mask, model_vocab_size, trained=tokenizer_file is None)
    prepared.account.check(max_lost_fraction)
    # The same text may have been found elsewhere when it was prepared.
    return replace(prepared, manifest={**prepared.manifest, "source": source})


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


def _parts_of(curated: Curated) -> list[tuple[Output, str]]:
    """Return what the tasks of a recipe have written, with the corpus of each part."""
    corpora = (part["corpus"] for part in curated.manifest["parts"])
    return list(zip(curated.outputs, corpora, strict=True))


def _kept_source(curated: Curated) -> dict[str, Any]:
    """Return the manifest's record of what a recipe keeps."""
    kept = [[corpus, output.files[KEPT][0]] for output, corpus in _parts_of(curated)]
    return {
        "named": sorted(curated.manifest["sources"]),
        "sha256": hashlib.sha256(json.dumps(kept).encode()).hexdigest(),
        "found": Account().record,
        "quickstart": None,
        "recipe": {"folder": str(curated.folder), "sha256": hash_file(curated.folder / MANIFEST)},
    }


def hash_source(files: Sequence[SourceFile], cache_dir: Path) -> str:
    """Return one sha256 of the kinds and contents of the files in order.

    Names and paths don't enter, so a moved corpus has the same hash. A file that is known in the cache by its time of
    change is not read again.
    """
    paths = [path for file in files for path in file.paths]
    record = hashlib.sha256("\n".join(str(path.absolute()) for path in paths).encode("utf-8", "surrogateescape"))
    hashes = iter(once_per_change(paths, cache_dir / "sources" / f"{record.hexdigest()[:16]}.json", hash_file))
    digest = hashlib.sha256()
    for file in files:
        kind = file.kind if file.kind in ("txt", MEGATRON) else f"{file.kind} {file.text_field}"
        content = " ".join(islice(hashes, len(file.paths)))
        digest.update(f"{kind}{file.compression} {content}\n".encode())
    return digest.hexdigest()
