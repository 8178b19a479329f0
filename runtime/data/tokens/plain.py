"""A corpus of files that are read as they are, by this process."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from trimaran.runtime.data.account import Account
from trimaran.runtime.data.corpus import Unit, iter_units
from trimaran.runtime.data.document import TOKENS, Loss
from trimaran.runtime.data.files import DataError, unreadable
from trimaran.runtime.data.readers.megatron import read_megatron
from trimaran.runtime.data.readers.part import Damage, Part, ReadSettings, Tally
from trimaran.runtime.data.sources import MEGATRON, SourceFile
from trimaran.runtime.data.tokens.linked import link_shards
from trimaran.runtime.data.tokens.shards import ShardWriter
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.data.tokens.units import SPLITS, Encoding, Mask, Units, encode_units, write_splits

_ANY_SIZE: Final = ReadSettings(max_document_bytes=1 << 62)


@dataclass(frozen=True)
class PlainCorpus:
    """Files of text, or of Megatron's token ids, without a recipe; implements `Corpus`."""

    files: Sequence[SourceFile]

    def measure(self, limit: int) -> Units:
        """Read the corpus in sections of at most so many characters."""
        account, digest, sizes, first_tokens = Account(), hashlib.sha256(), array("q"), ""
        for unit in _units(self.files, account, limit):
            sizes.append(unit.size)
            digest.update(("" if unit.continues else "\0").encode() + unit.text.encode())
            if len(unit.tokens):
                digest.update(np.asarray(unit.tokens, "<u4").tobytes())
                first_tokens = first_tokens or unit.place
        counts = [("", len(sizes))]
        return Units(account, np.array(sizes, np.int64), counts, limit, digest.hexdigest(), first_tokens)

    def train(self, units: Units, chosen: Mask, vocab_size: int, *, with_mask: bool) -> Tokenizer:
        """Train a tokenizer on the chosen units."""
        read = _units(self.files, Account(), units.limit)
        texts = (unit.text for unit, wanted in zip(read, chosen, strict=True) if wanted)
        return Tokenizer.train(texts, vocab_size, with_mask=with_mask)

    def encode(self, folder: Path, units: Units, held_out: Mask, encoding: Encoding) -> dict[str, dict[str, Any]]:
        """Write the shards of both splits into a folder; return the manifest's record of each."""
        tokenizer = encoding.tokenizer
        if not held_out.any() and (linked := link_shards(folder, SPLITS[0], self.files, tokenizer, encoding.dtype)):
            counts = {"units": len(held_out), "characters": 0, "bytes": 0}
            tokens = sum(shard.tokens for shard in linked)
            whole = {**counts, "tokens": tokens, "shards": [shard.record for shard in linked]}
            return {SPLITS[0]: whole, SPLITS[1]: {**dict.fromkeys(whole, 0), "shards": []}}
        encode = tokenizer.fast_encoder() if encoding.fast else tokenizer.encode_batch
        read = _units(self.files, Account(), units.limit)
        encoded = encode_units(read, tokenizer, encode, units.account, lambda: encoding.check(units.account))
        with ExitStack() as stack:
            shards = [stack.enter_context(ShardWriter(folder, name, encoding.dtype)) for name in SPLITS]
            return write_splits(encoded, held_out, shards, tokenizer.eot_id)


def _units(files: Sequence[SourceFile], account: Account, limit: int) -> Iterator[Unit]:
    """Yield the units of all files in order and update `account`; see `iter_units`."""
    for file in files:
        yield from _token_units(file, account) if file.kind == MEGATRON else iter_units([file], account, limit)


def _token_units(file: SourceFile, account: Account) -> Iterator[Unit]:
    """Yield each document of Megatron's .bin and .idx as a unit.

    Raises:
        DataError: they are damaged, or can't be read; names the file and the document.
    """
    account.totals["files"] += 1
    remedy = "write the .bin and its .idx anew"
    try:
        account.totals["file_bytes"] += sum(path.stat().st_size for path in file.paths)
        part = Part("", str(file.path), file.path.name, MEGATRON)
        for number, document in enumerate(read_megatron(part, _ANY_SIZE, Tally()), start=1):
            place = f"{file.path}, document {number:,}"
            account.totals["records"] += 1
            if isinstance(document, Loss):
                if document.reason != "read.empty":
                    raise DataError(f"{place}: {document.detail}; {remedy}")
                account.note("empty", place)
                continue
            unit = Unit("", False, place, document.fields[TOKENS])
            account.totals.update(documents=1, characters=unit.size, bytes=unit.size, units=1)
            yield unit
    except Damage as damage:
        raise DataError(f"{file.path}: {damage.detail}; {remedy}") from None
    except OSError as error:
        raise unreadable(file.path, error) from error
