"""Megatron's .bin files as token shards without a copy, where they are what shards would be, to the byte."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trimaran.runtime.data.files import DataError, hash_file
from trimaran.runtime.data.readers.megatron import document_ends
from trimaran.runtime.data.sources import MEGATRON, SourceFile
from trimaran.runtime.data.tokens.shards import DTYPES, ShardInfo, TokenArray
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import check_regular


def link_shards(
    folder: Path, split: str, files: Sequence[SourceFile], tokenizer: Tokenizer, dtype: str
) -> list[ShardInfo]:
    """Link the .bin files into a folder as the shards of a split; return their records, none where they must be copied.

    They are such shards if all have the tokens' dtype, one document directly after the other, and each document ends
    with the end-of-text token.

    Raises:
        DataError: a token is beyond the tokenizer; names the file.
    """
    if not all(file.kind == MEGATRON for file in files):
        return []
    mapped = [_map(file.path, tokenizer.eot_id, dtype) for file in files]
    found: list[ShardInfo] = []
    for file, tokens in zip(files, mapped, strict=True):
        if tokens is None:
            return []
        largest = int(tokens.max())
        if largest >= tokenizer.vocab_size:
            rule = f"{file.path} has the token {largest}, and data.tokenizer only {tokenizer.vocab_size}"
            raise DataError(f"{rule}; name the tokenizer that made it")
        name = f"{split}-{len(found):05d}.bin"
        (folder / name).symlink_to(file.path.resolve())
        found.append(ShardInfo(name, len(tokens), tokens.nbytes, hash_file(file.path)))
    return found


def _map(path: Path, eot_id: int, dtype: str) -> TokenArray | None:
    """Return the tokens of a .bin that can be a shard as it is, None of another."""
    ends = document_ends(path, DTYPES[dtype].itemsize)
    if ends is None or not len(ends):
        return None
    tokens: TokenArray = np.memmap(check_regular(path), dtype=DTYPES[dtype], mode="r")
    is_shard = int(ends[-1]) == len(tokens) and bool((tokens[ends - 1] == eot_id).all())
    return tokens if is_shard else None
