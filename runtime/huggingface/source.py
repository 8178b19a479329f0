"""A Hugging Face model folder: its config, the names, dtypes and shapes of its tensors, and each tensor on request.

Only safetensors are read. Files are read by position instead of being memory mapped, so that a conversion takes the
memory of a few tensors and not of all pages touched so far.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimaran.runtime.files import check_regular, open_regular, parse_json, read_bytes
from trimaran.runtime.huggingface.refusals import (
    INDEX,
    WEIGHTS,
    ConversionError,
    missing_shards,
    no_config,
    no_safetensors,
    refuse_quantized,
    refuse_stand_in,
)

# Names of weight dtypes in a safetensors header. The others (I8, F8_E4M3, ...) are quantized and meaningless without
# their scales.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor: file, dtype as the header names it, shape, and byte range."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class ModelFolder:
    """An open folder with config.json and safetensors, one file or many with an index.

    Every header has been checked against its file's size.

    Attributes:
        config: config.json.
        tensors: every stored tensor by name.
    """

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
        self.path, self.config, self.tensors = path, config, tensors

    @classmethod
    def open(cls, path: Path) -> "ModelFolder":
        """Open a folder: reads config.json, the index and the headers, no weights.

        Raises:
            ConversionError: it is no folder, lacks config.json or safetensors, or one of the files is damaged or points
                elsewhere.
        """
        if not path.exists():
            raise ConversionError(
                f"{path} does not exist; give a folder with config.json and {WEIGHTS}, or a .gguf file"
            )
        if not path.is_dir():
            raise ConversionError(
                f"{path} is not a folder; give the folder with config.json and {WEIGHTS}, or a .gguf file"
            )
        for entry in path.iterdir():
            if entry.exists() and not entry.is_dir():
                _check_regular(entry)  # transformers opens others than the files that are read here
        config = _read_config(path)
        if (path / WEIGHTS).is_file():
            tensors = read_header(path / WEIGHTS)
        elif (path / INDEX).is_file():
            tensors = _read_indexed(path)
        else:
            raise no_safetensors(path)
        refuse_quantized(path, config, tensors)
        if (path / "adapter_config.json").is_file():
            raise ConversionError(
                f"{path} holds a model and an adapter to it, and which of the two is meant is not known; move "
                "adapter_config.json out of the folder to import the model alone, or merge the adapter into it (peft: "
                "merge_and_unload) and import what that saves"
            )
        return cls(path, config, tensors)

    def described_as(self, **changes: Any) -> "ModelFolder":
        """Return the folder with other values in config.json; the file itself does not change."""
        return ModelFolder(self.path, {**self.config, **changes}, self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(stored.num_bytes for stored in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, in its stored dtype.

        Raises:
            ConversionError: it can't be read, or its dtype is not one of weights.
        """
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise ConversionError(
                f"tensor {name} is stored as {stored.dtype}; only {', '.join(DTYPES)} are weights that can be trained"
            )
        data = torch.empty(stored.num_bytes, dtype=torch.uint8)
        view = data.numpy().data
        try:
            with check_regular(stored.file).open("rb", buffering=0) as file:
                file.seek(stored.start)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise ConversionError(
                            f"{stored.file} ends inside tensor {name}: it was cut while it was read; copy it again"
                        )
                    view = view[count:]
        except OSError as error:
            raise ConversionError(f"{stored.file} can't be read: {error.strerror or error}") from error
        return data.view(DTYPES[stored.dtype]).view(stored.shape)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ConversionError: the file is missing, too large, not JSON or not an object.
    """
    refuse_stand_in(path)
    try:
        value = parse_json(read_bytes(path))
    except OSError as error:
        raise ConversionError(f"{path} can't be read: {error.strerror or error}; copy it again") from error
    except ValueError as error:  # both JSON and UTF-8 errors
        raise ConversionError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a {type(value).__name__} where an object is wanted; copy it again")
    return value


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        ConversionError: it is truncated, or its header does not describe it.
    """
    refuse_stand_in(path)
    try:
        with safe_open(
            check_regular(path), framework="pt"
        ):  # safe_open checks that the ranges are contiguous, fit shape and dtype, and fill the file
            pass
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length))
    except SafetensorError as error:
        raise ConversionError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
    except OSError as error:
        raise ConversionError(f"{path} can't be read: {error.strerror or error}") from error
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return tensors


def _check_regular(path: Path) -> None:
    try:
        check_regular(path)
    except OSError as error:
        raise ConversionError(f"{path} can't be read: {error.strerror}; take it out of the folder") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise no_config(path)
    config = read_json(path / "config.json")
    refuse_quantized(path, config, ())
    return config


def _read_indexed(path: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards in the index; each must be in the file that the index names."""
    index = path / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ConversionError(f"{index} has no weight_map from tensor names to file names; copy it again")
    for file in set(names.values()):
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            raise ConversionError(
                f"{index} points at {file!r}; every shard must be a .safetensors file in the folder itself, "
                "or a stranger's index could read any file of yours"
            )
    if absent := [file for file in set(names.values()) if not (path / file).is_file()]:
        raise missing_shards(index, absent)
    files = {file: read_header(path / file) for file in sorted(set(names.values()))}
    for name, file in names.items():
        if name not in files[file]:
            raise ConversionError(
                f"{index} says that tensor {name} is in {file}, and it is not; copy the index and that shard again"
            )
    extra = [name for file, tensors in files.items() for name in tensors if names.get(name) != file]
    if extra:
        raise ConversionError(
            f"the shards hold {len(extra)} tensors that {index} does not name, such as {extra[0]}; copy the index again"
        )
    return {name: files[file][name] for name, file in names.items()}
