"""Log-probabilities of the reference model: computed once before training, so that a step holds one model.

They are kept in the run folder and, for other runs of the same weights and data, in the cache. A pass that was killed
starts again from its beginning, and gives the same bits at the same layout.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from trimaran.models.parallel.group import all_reduce
from trimaran.runtime.checkpoint.files import write_safetensors
from trimaran.runtime.checkpoint.manifest import MANIFEST_NAME
from trimaran.runtime.data.files import hash_file
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import check_regular
from trimaran.runtime.finetune.comparable import preference_of
from trimaran.runtime.finetune.criteria.batch import document_log_probs
from trimaran.runtime.finetune.documents import Documents
from trimaran.runtime.finetune.forward import ForwardPass, document_values
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.init_from import load_initial_weights, open_weights
from trimaran.runtime.train.train_context import TrainContext, adapter_plan

FILE: Final = "reference.safetensors"
_FORMAT: Final = 1
_KEY, _DATA = "key", "data"  # in the file's metadata: of weights and data, of the data alone
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of documents, by the name of what they belong to [documents each], and how they came."""

    values: Mapping[str, Values]
    told: str


def source_of(spec: RunSpec) -> str | None:
    """Return the run or checkpoint folder of the reference's weights; None where they are drawn."""
    settings = preference_of(spec)
    return (settings.reference if settings is not None else None) or spec.checkpoint.init_from


def reference_log_probs(
    train_context: TrainContext,
    documents: Mapping[str, Documents],
    data: Sequence[str],
    tokenizer: Tokenizer | None,
    *,
    resumed: bool,
) -> Reference:
    """Return the reference's log-probability of each document's learned tokens, the same on all ranks.

    Read where they are known, else computed with the weights of `train_context`, into which the reference's are loaded.
    Collective over the world.

    Args:
        data: hashes of the files that the documents come from.
        tokenizer: see `load_initial_weights`.
        resumed: whether the run has begun: then the values of its beginning are taken, whatever the folder of the
            weights holds by now.

    Raises:
        CheckpointError: the weights can't be read.
        OSError: the values can't be written.
    """
    spec, mesh = train_context.spec, train_context.mesh
    own = Path(spec.train.output_dir) / FILE
    sizes = {name: len(each) for name, each in documents.items()}
    found: dict[str, Values] | None = None
    place, chosen, marks = own, "", dict[str, str]()
    shared = Path(spec.data.cache_dir) / "reference"
    if mesh.rank == 0:
        marks = {_DATA: _hash([_FORMAT, list(data), sizes, spec.precision.dtype, spec.train.seq_len])}
        found = _read(own, sizes, marks) if resumed else None
        if found is None:
            weights, chosen = _weights(spec)
            marks[_KEY] = _hash([marks[_DATA], weights])
            shared = shared / f"{marks[_KEY]}.safetensors"
            found = _read(own, sizes, marks)
            if found is None:
                found, place = _read(shared, sizes, marks), shared
                if found is not None:
                    _write(own, found, marks)
    was_found, source = json.loads(mesh.gather_text(json.dumps([found is not None, chosen]))[0])
    if was_found:
        return Reference(_shared(train_context, found, sizes), f"log-probabilities of the reference: {place}")
    if source:
        load_initial_weights(train_context, tokenizer, source=source)
    forward = ForwardPass.of(train_context)
    values = {name: document_values(forward, each, document_log_probs) for name, each in documents.items()}
    if mesh.rank == 0:
        _write(own, values, marks)
        _write(shared, values, marks)
    count = sum(sizes.values())
    return Reference(values, f"computed the reference's log-probabilities of {count:,} answers: {own}")


def _weights(spec: RunSpec) -> tuple[str, str]:
    """Return the hash of the reference's weights, and the checkpoint that they are in, "" where they are drawn."""
    source = source_of(spec)
    if source is None:
        return _hash(["drawn", spec.seed, spec.transformer.model_dump(mode="json")]), ""
    path = open_weights(Path(source))[0].path
    plan = adapter_plan(spec)
    rounded = "nf4" if plan is not None and plan.is_quantized else ""  # other weights than those of the file
    return hash_file(path / MANIFEST_NAME) + rounded, str(path)


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path, sizes: Mapping[str, int], marks: Mapping[str, str]) -> dict[str, Values] | None:
    """Return the values of a file; None where it is missing or damaged, or its marks are others."""
    if not path.is_file():
        return None
    try:
        with safe_open(check_regular(path), framework="np") as file:
            if not marks.items() <= (file.metadata() or {}).items():
                return None
            found = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):
        return None
    right = {name: (size,) for name, size in sizes.items()} == {name: each.shape for name, each in found.items()}
    return found if right and all(each.dtype == np.float64 for each in found.values()) else None


def _write(path: Path, values: Mapping[str, Values], marks: Mapping[str, str]) -> None:
    """Write the values: another file of that name stays as it is until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_safetensors(temporary, {name: torch.from_numpy(each) for name, each in values.items()}, marks)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _shared(
    train_context: TrainContext, found: Mapping[str, Values] | None, sizes: Mapping[str, int]
) -> dict[str, Values]:
    """Return the values that rank 0 has read, on all ranks. Collective over the world."""
    device = train_context.executor.transport.device
    values = {}
    for name, size in sizes.items():
        mine = np.zeros(size) if found is None else found[name]
        values[name] = all_reduce(torch.from_numpy(mine.copy()).to(device), train_context.mesh.world).cpu().numpy()
    return values
