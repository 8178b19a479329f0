"""The work of `prepare`: measure the corpus, train a tokenizer, have the shards of both splits written, record it."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimaran.models.fields import counted
from trimaran.runtime.data.files import DataError, hash_file
from trimaran.runtime.data.sources import SECTION_CHARACTERS
from trimaran.runtime.data.tokens.shards import dtype_for
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.data.tokens.units import Corpus, Encoding, Units
from trimaran.runtime.files import read_json

CHANGED = (
    "have changed since {since}, or an earlier version has cut them otherwise, so its tokens mean something else now; "
    "put the former files back, or choose another train.output_dir for a new run"
)
"""The end of the sentence about data of a run that is not what it was."""
# Raised whenever the same settings would give other shards, so that the cache of an older version is not reused.
FORMAT = 2
# To find out whether the faster engine gives the same ids takes a second.
_BULK_BYTES = 16 << 20
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


def _measured(corpus: Corpus, settings: BuildSettings, named: str) -> Units:
    """Read the corpus once, a small one twice.

    Raises:
        DataError: the text is not that of `settings.former`, or too much of it is lost.
    """
    units = corpus.measure(SECTION_CHARACTERS)
    if units.first_tokens and settings.tokenizer_file is None:
        rule = f"{units.first_tokens} has token ids and no text, and they mean nothing without their tokenizer"
        raise DataError(f"{rule}; name its tokenizer.json in data.tokenizer")
    if settings.former is not None and settings.former.text != units.sha256:
        raise DataError(f"the files of data.source {CHANGED.format(since='this run began')}")
    if not len(units.sizes):
        told = units.account.told() or "no documents"
        raise DataError(f"data.source {named} holds no text: {told}; name files with text")
    units.account.check(settings.max_lost_fraction)
    shorter = int(units.account.totals["characters"] * settings.held_out_fraction / _HELD_OUT_SECTIONS)
    if settings.held_out_fraction > 0 and shorter < SECTION_CHARACTERS:
        units = corpus.measure(max(_SHORTEST_SECTION, shorter))
    return units


def build(
    folder: Path, corpus: Corpus, source: dict[str, Any], settings: BuildSettings, tokenizer: Tokenizer | None
) -> None:
    """Write tokenizer.json, the shards of both splits and manifest.json into an empty folder.

    Reads the corpus two or three times, a small one once more.
    """
    units = _measured(corpus, settings, ", ".join(source["named"]))
    account = units.account
    held_out = units.held_out(settings.held_out_fraction, settings.seed)
    if settings.held_out_fraction > 0 and not held_out.any():
        logger.warning(
            "the corpus is a single document without white space to cut it at: "
            "nothing is held out, so there is no held-out loss"
        )
    trained = tokenizer is None
    if tokenizer is None:
        size = min(account.totals["bytes"], settings.tokenizer_train_bytes or account.totals["bytes"]) / 1e6
        logger.info("training a tokenizer of %d tokens on %.1f MB of text", settings.vocab_size, size)
        chosen = units.sample(~held_out, settings.tokenizer_train_bytes, settings.weights, settings.seed)
        tokenizer = corpus.train(units, chosen, settings.vocab_size, with_mask=settings.with_mask)
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
    is_large = account.totals["bytes"] >= _BULK_BYTES
    reason = tokenizer.why_not_fast() if is_large else ""
    fast = is_large and not reason
    engine = "tiktoken's engine" if fast else f"tokenizers, because {reason}" if reason else "tokenizers"
    documents = counted(account.totals["documents"], "document")
    if units.first_tokens:
        logger.info("taking the token ids of %s as they are", documents)
    else:
        logger.info("tokenizing %s by %s", documents, engine)
    splits = corpus.encode(folder, units, held_out, Encoding(tokenizer, fast, dtype, settings.max_lost_fraction))
    manifest = {
        "format": FORMAT,
        "source": source,
        "corpus": account.record,
        "text_sha256": units.sha256,
        "tokenizer": _tokenizer_record(folder, tokenizer, settings, trained),
        "seed": settings.seed,
        "held_out_fraction": settings.held_out_fraction,
        "section_characters": units.limit,
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
