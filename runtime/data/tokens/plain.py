"""A corpus of files that are read as they are, by this process."""

import hashlib
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimaran.runtime.data.account import Account
from trimaran.runtime.data.corpus import iter_units
from trimaran.runtime.data.sources import SourceFile
from trimaran.runtime.data.tokens.shards import ShardWriter
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.data.tokens.units import SPLITS, Encoding, Mask, Units, encode_units, write_splits


@dataclass(frozen=True)
class PlainCorpus:
    """Files of text, without a recipe; implements `Corpus`."""

    files: Sequence[SourceFile]

    def measure(self, limit: int) -> Units:
        """Read the corpus in sections of at most so many characters."""
        account, digest, sizes = Account(), hashlib.sha256(), array("q")
        for unit in iter_units(self.files, account, limit):
            sizes.append(unit.size)
            digest.update(("" if unit.continues else "\0").encode() + unit.text.encode())
        return Units(account, np.array(sizes, np.int64), [("", len(sizes))], limit, digest.hexdigest(), "")

    def train(self, units: Units, chosen: Mask, vocab_size: int, *, with_mask: bool) -> Tokenizer:
        """Train a tokenizer on the chosen units."""
        read = iter_units(self.files, Account(), units.limit)
        texts = (unit.text for unit, wanted in zip(read, chosen, strict=True) if wanted)
        return Tokenizer.train(texts, vocab_size, with_mask=with_mask)

    def encode(self, folder: Path, units: Units, held_out: Mask, encoding: Encoding) -> dict[str, dict[str, Any]]:
        """Write the shards of both splits into a folder; return the manifest's record of each."""
        tokenizer = encoding.tokenizer
        encode = tokenizer.fast_encoder() if encoding.fast else tokenizer.encode_batch
        read = iter_units(self.files, Account(), units.limit)
        encoded = encode_units(read, tokenizer, encode, units.account, lambda: encoding.check(units.account))
        with ExitStack() as stack:
            shards = [stack.enter_context(ShardWriter(folder, name, encoding.dtype)) for name in SPLITS]
            return write_splits(encoded, held_out, shards, tokenizer.eot_id)
