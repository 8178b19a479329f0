"""The tasks that make tokens of what a recipe keeps: they measure a part, train a tokenizer, encode a part."""

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from trimaran.runtime.data.account import Account
from trimaran.runtime.data.corpus import Unit, units_of
from trimaran.runtime.data.dedup.arrays import save_arrays
from trimaran.runtime.data.document import TOKENS
from trimaran.runtime.data.engine.parts import KEPT, read_kept
from trimaran.runtime.data.engine.watch import Watch
from trimaran.runtime.data.tokens.end_of_text import keep_end_of_text
from trimaran.runtime.data.tokens.shards import ShardWriter
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.data.tokens.units import SPLITS, Encode, Mask, encode_units, write_splits

UNITS: Final = "units.npz"
TOKENIZER: Final = "tokenizer.json"
_ONE_SHARD: Final = 1 << 62
Result = dict[str, Any]


def kept_units(folder: Path, account: Account, limit: int) -> Iterator[Unit]:
    """Yield the units of what a recipe keeps of a part, and count them in `account`."""
    account.totals["files"] += 1
    account.totals["file_bytes"] += (folder / KEPT).stat().st_size
    for document in read_kept(folder):
        account.totals["records"] += 1
        if TOKENS in document.fields:
            unit = Unit("", False, document.id, document.fields[TOKENS].tolist())
            account.totals.update(documents=1, characters=unit.size, bytes=unit.size, units=1)
            yield unit
        else:
            yield from units_of(document.text, document.id, account, limit)


def measure_part(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the sizes of a part's units, and a hash of each document. Returns the account."""
    del watch
    account, sizes, first_tokens = Account(), array("q"), ""
    hashes = [hashlib.sha256()]  # the first is of no document
    digests = bytearray()
    for unit in kept_units(inputs[0], account, arguments["limit"]):
        if not unit.continues:
            digests += hashes[-1].digest()
            hashes[-1] = hashlib.sha256()
        hashes[-1].update(unit.text.encode() + bytes(array("I", unit.tokens)))
        sizes.append(unit.size)
        first_tokens = first_tokens or (unit.place if unit.tokens else "")
    digests += hashes[-1].digest()
    of_documents = np.frombuffer(digests[hashes[0].digest_size :], np.uint8)
    save_arrays(folder / UNITS, {"sizes": np.array(sizes, np.int64), "digests": of_documents}, {})
    return {"account": account.record, "units": len(sizes), "first_tokens": first_tokens}


def train_tokenizer(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Train a tokenizer on the chosen units of all parts."""
    del watch
    texts = (
        unit.text
        for part, chosen in zip(inputs, map(unpack_mask, arguments["chosen"]), strict=True)
        if chosen.any()
        for unit, wanted in zip(kept_units(part, Account(), arguments["limit"]), chosen, strict=False)
        if wanted
    )
    Tokenizer.train(texts, arguments["vocab_size"], with_mask=arguments["with_mask"]).save(folder / TOKENIZER)
    return {}


def save_tokenizer(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write a tokenizer where workers find it."""
    del inputs, watch
    (folder / TOKENIZER).write_text(arguments["definition"], encoding="utf-8")
    keep_end_of_text(folder, arguments["end_of_text"])
    return {}


def encode_part(arguments: Mapping[str, Any], inputs: Sequence[Path], folder: Path, watch: Watch) -> Result:
    """Write the tokens of a part's units, one file for each split that has any. Inputs: the part, the tokenizer.

    Returns the record of each split, and the account of what the tokenizer can't write.
    """
    del watch
    tokenizer, encode = _engine(inputs[1] / TOKENIZER, arguments["fast"])
    account, held_out = Account(), unpack_mask(arguments["held_out"])
    units = kept_units(inputs[0], Account(), arguments["limit"])
    encoded = encode_units(units, tokenizer, encode, account, lambda: None)
    with ExitStack() as stack:
        shards = [stack.enter_context(ShardWriter(folder, name, arguments["dtype"], _ONE_SHARD)) for name in SPLITS]
        found = write_splits(encoded, held_out, shards, tokenizer.eot_id)
    size = sum(split["bytes"] for split in found.values())
    return {"splits": found, "account": account.record, "text_bytes": {"in": size}}


@lru_cache(1)
def _engine(path: Path, fast: bool) -> tuple[Tokenizer, Encode]:
    """Return a tokenizer, and what encodes on one thread; a process reads it once."""
    tokenizer = Tokenizer.load(path)
    return tokenizer, tokenizer.fast_encoder(threads=1) if fast else tokenizer.encode_batch


def pack_mask(mask: Mask) -> str:
    """Return a mask as text, for a task's arguments."""
    return np.packbits(mask).tobytes().hex()


def unpack_mask(packed: str) -> Mask:
    """Return a mask that was packed, and up to seven False more."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8)).astype(bool)
