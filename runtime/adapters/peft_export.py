"""From a run of adapters to the folder that PEFT loads beside the base model."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.weights import WeightMap, resolve
from trimaran.models.targets import is_target, linear_shapes
from trimaran.models.transformer import model_dtype
from trimaran.runtime.adapters.identity import BASE_HASH, hash_of_weights
from trimaran.runtime.adapters.merged import Merged
from trimaran.runtime.adapters.peft import (
    A_NAME,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    B_NAME,
    PREFIX,
    Pair,
    delta,
    is_transposed,
    linear_units,
    suffix_of,
    to_theirs,
)
from trimaran.runtime.checkpoint.files import write_safetensors, write_text
from trimaran.runtime.folder_lock import NO_JOB
from trimaran.runtime.huggingface.exporting import ExportOptions, choose_family
from trimaran.runtime.huggingface.folder import new_folder
from trimaran.runtime.huggingface.proof import ProofError
from trimaran.runtime.huggingface.refusals import ConversionError
from trimaran.runtime.huggingface.source import read_json
from trimaran.runtime.spec.sections.finetune import AdapterSettings
from trimaran.runtime.train.init_from import IMPORT_RECORD, open_weights
from trimaran.runtime.train.state import spec_of

_TOLERANCE = 1e-5  # of the largest element, in float32; products are summed in another order


@dataclass(frozen=True)
class ExportedAdapter:
    """The result of an export.

    Args:
        base: what the adapter belongs to, as its config names it.
        num_modules: linear modules that have one.
    """

    folder: Path
    base: str
    architecture: str
    num_modules: int
    rank: int


def export_adapter(
    run: Path,
    target: Path,
    options: ExportOptions,
    environment: Mapping[str, str] = NO_JOB,
) -> ExportedAdapter:
    """Write the folder `target` with adapter_config.json and adapter_model.safetensors from a run of adapters.

    The folder appears only after each product of its matrices was compared with ours.

    Args:
        options: its dtype and family; None for float32, and for the family of the import or the first that fits.
        environment: see `Holder.here`.

    Raises:
        ConversionError: the run has no adapters, no architecture expresses its model, or (ProofError) a product
            differs.
        CheckpointError, OSError: the checkpoint can't be read, or the folder can't be written.
    """
    weights, folder = open_weights(run)
    if not isinstance(weights, Merged):
        raise ConversionError(f"{run} has no adapters, for it trained all weights; export it without --adapter")
    spec = spec_of(weights)
    config = spec.transformer
    if config.score_head != "none":
        raise ConversionError(
            f"{run} has learned a score head beside its adapters, which is no part of them; export it with --merge"
        )
    record = read_json(folder / IMPORT_RECORD) if (folder / IMPORT_RECORD).is_file() else {}
    family = choose_family(config, options.family, record.get("family"))
    try:
        units = linear_units(resolve(family, config), config)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    weights.adapters.verify_files(weights.adapters.files)
    pairs = _pairs_of(weights, config)
    theirs = {module: pair for unit in units for module, pair in to_theirs(unit, config, pairs).items()}
    dtype = model_dtype(options.dtype or "float32")
    tensors = _tensors(theirs, dtype)
    _compare(units, config, pairs, theirs)
    base, base_hash = _name_of_base(weights), hash_of_weights(weights.base)
    transposed = any(is_transposed(unit, config) for unit in units)
    with new_folder(target, environment) as temporary:
        metadata = {"format": "pt"} | ({BASE_HASH: base_hash} if base_hash else {})
        write_safetensors(temporary / ADAPTER_WEIGHTS, tensors, metadata)
        written = _config_of(weights.settings, theirs, base, transposed=transposed)
        write_text(temporary / ADAPTER_CONFIG, json.dumps(written, indent=2, sort_keys=True) + "\n")
    return ExportedAdapter(target, base, family.architecture, len(theirs), weights.settings.rank)


def _pairs_of(weights: Merged, config: TransformerConfig) -> dict[str, Pair]:
    """Return layer -> its A and B, float32 at least."""
    names = [name for name in linear_shapes(config) if is_target(name, weights.settings.targets)]
    pairs = {}
    for layer in (f"layers.{number}.{name}" for number in range(config.num_layers) for name in names):
        a, b = (weights.adapters.read_global(f"{layer}.adapter.{each}", "weight") for each in ("a", "b"))
        pairs[layer] = a.to(torch.promote_types(a.dtype, torch.float32)), b.to(a.dtype)
    weights.close()
    return pairs


def _tensors(theirs: Mapping[str, Pair], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of the file by name."""
    tensors = {}
    for module, pair in theirs.items():
        for name, tensor in zip((A_NAME, B_NAME), pair, strict=True):
            tensors[f"{PREFIX}{module}{name}"] = tensor.to(dtype).contiguous()
            if not bool(tensor.isfinite().all()):
                raise ConversionError(
                    f"the adapter of {module} holds infinite values or NaN; export an earlier checkpoint, from before "
                    "the run diverged"
                )
    return tensors


def _compare(
    units: Sequence[WeightMap], config: TransformerConfig, ours: Mapping[str, Pair], theirs: Mapping[str, Pair]
) -> None:
    """Raise ProofError unless each product of theirs is ours under the weight map that the export of weights proves."""
    for unit in units:
        deltas = []
        for name, shape in zip(unit.ours, unit.our_shapes, strict=True):
            pair = ours.get(name.removesuffix(".weight"))
            deltas.append(torch.zeros(shape, dtype=next(iter(ours.values()))[0].dtype) if pair is None else delta(pair))
        for name, wanted in zip(unit.theirs, unit.to_theirs(deltas, config), strict=True):
            pair = theirs.get(name.removesuffix(".weight"))
            found = torch.zeros_like(wanted) if pair is None else delta(pair)
            found = found.t() if pair is not None and is_transposed(unit, config) else found
            error, size = float((found - wanted).abs().max()), float(wanted.abs().max())
            if error > _TOLERANCE * size:
                raise ProofError(f"the adapter of {name} differs from ours by {error:.2g} of {size:.2g}")


def _config_of(settings: AdapterSettings, theirs: Mapping[str, Pair], base: str, *, transposed: bool) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    A module with more ranks than the others has patterns that keep its scale.
    """
    ranks = {suffix_of(module): len(a) for module, (a, _) in theirs.items()}
    other = {suffix: rank for suffix, rank in ranks.items() if rank != settings.rank}
    # alpha / rank or alpha / sqrt(rank) stays what it was.
    growth = {suffix: rank / settings.rank for suffix, rank in other.items()}
    alphas = {
        suffix: settings.alpha * (each if settings.scaling == "lora" else math.sqrt(each))
        for suffix, each in growth.items()
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.scaling == "rslora",
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _name_of_base(weights: Merged) -> str:
    """Return the folder of the base model for transformers: that of the import, or where an export of it would be."""
    run = weights.base.path.resolve().parent.parent
    record = read_json(run / IMPORT_RECORD) if (run / IMPORT_RECORD).is_file() else {}
    if weights.base.step == 0 and isinstance(record.get("source"), str):
        return str(record["source"])
    return str(run / "huggingface")
