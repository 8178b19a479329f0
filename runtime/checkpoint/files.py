"""Durable files: safetensors written and hashed in one pass, sha256 of a file, fsync of a folder."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimaran.runtime.files import naming, open_regular

CHUNK_BYTES = 16 << 20
DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
}
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write tensors as a safetensors file, fsync it, and return its size in bytes and its sha256.

    The format (github.com/huggingface/safetensors, "Format") is eight bytes of little-endian header size, a JSON
    header, and the raw data without gaps. The library is not used because this way the digest costs no second read of
    the file, an error keeps its errno, and tensors on a device are copied to the host one at a time.

    Args:
        path: target; an existing file is replaced.
        tensors: name in the file -> contiguous tensor, float32, float64, bfloat16 or float16, any shape and device.
        metadata: text about the file as a whole, stored in its header.

    Raises:
        OSError: the disk refused (no space, quota, read-only).
    """
    # Wide dtypes first, so that every tensor starts at a multiple of its own item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest = hashlib.sha256()
    with naming(path), path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        for chunk in _chunks([tensors[name] for name in names], _header(names, tensors, metadata)):
            hashed = hasher.submit(digest.update, chunk)  # hashing and writing both release the GIL
            _write_all(file.fileno(), chunk)
            hashed.result()
        size = file.tell()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file, read as a stream.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file and fsync it."""
    with naming(path), path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make new files and renames in `folder` durable across a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(names: Sequence[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """The size field and the JSON header, padded with spaces to eight bytes so that the data is aligned."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _chunks(tensors: Sequence[Tensor], header: bytes) -> Iterator[memoryview]:
    """The bytes of the file in order, in views of at most CHUNK_BYTES."""
    yield memoryview(header)
    for tensor in tensors:
        view = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]


def _write_all(descriptor: int, chunk: memoryview) -> None:
    """Write the whole chunk: on a nearly full disk one `write` may take a part before the next fails with ENOSPC."""
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]
