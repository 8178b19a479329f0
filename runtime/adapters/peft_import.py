"""From PEFT's folder of a LoRA adapter to a run: a checkpoint of adapters that names its base."""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from trimaran.models.huggingface.weights import WeightMap, resolve
from trimaran.models.parallel.shard import ShardPiece, whole
from trimaran.models.targets import linear_shapes
from trimaran.runtime.adapters.identity import check_base, named_base
from trimaran.runtime.adapters.merged import Weights
from trimaran.runtime.adapters.peft import (
    A_NAME,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    B_NAME,
    PREFIX,
    Pair,
    linear_units,
    their_shapes,
    to_ours,
)
from trimaran.runtime.checkpoint.base import new_base
from trimaran.runtime.checkpoint.store import save_in_parts
from trimaran.runtime.folder_lock import NO_JOB
from trimaran.runtime.huggingface.exporting import choose_family
from trimaran.runtime.huggingface.folder import new_folder
from trimaran.runtime.huggingface.refusals import ConversionError, pickle_refused
from trimaran.runtime.huggingface.source import ModelFolder, read_header, read_json
from trimaran.runtime.spec import RunSpec, dump_spec, parse_spec
from trimaran.runtime.train.init_from import (
    IMPORT_RECORD,
    IMPORT_WEIGHTS,
    TOKENIZER,
    TOKENIZER_CONFIGS,
    open_weights,
)
from trimaran.runtime.train.state import TrainState, spec_of

# Options that change what the two matrices mean -> the values that don't.
_PLAIN: Final[Mapping[str, tuple[object, ...]]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "megatron_config": (None,),
}
_EXAMPLES: Final = "my-examples.jsonl"
"""What stands for the examples in the spec of an imported run, to be set by whoever trains on."""


@dataclass(frozen=True)
class ImportedAdapter:
    """The result of an import."""

    run: Path
    base: Path
    targets: Sequence[str]
    rank: int
    notes: Sequence[str]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()


def import_adapter(source: Path, run: Path, base: Path, environment: Mapping[str, str] = NO_JOB) -> ImportedAdapter:
    """Make the run folder `run` of the adapter in `source` and the weights of the run, or checkpoint, `base`.

    Args:
        environment: see `Holder.here`.

    Raises:
        ConversionError: the folder is damaged, its adapter is of another kind, or of another model.
        CheckpointError, OSError: the base can't be read, or the run can't be written.
    """
    settings = _read_config(source)
    weights, base_folder = open_weights(base)
    spec = spec_of(weights)
    config = spec.transformer
    record = read_json(base_folder / IMPORT_RECORD) if (base_folder / IMPORT_RECORD).is_file() else {}
    family = choose_family(config, None, record.get("family"))
    units = linear_units(resolve(family, config), config)
    shapes = {module: shape for unit in units for module, shape in their_shapes(unit, config).items()}
    theirs = _read_pairs(source, shapes, str(base))
    rank = max(len(a) for a, _ in theirs.values())
    scale = settings.alpha / (math.sqrt(rank) if settings.is_rslora else rank)
    scaled = {module: (a, b * (settings.scale_of(module, len(a)) / scale)) for module, (a, b) in theirs.items()}
    pairs = {layer: pair for unit in units for layer, pair in to_ours(unit, config, scaled, rank).items()}
    targets = [name for name in linear_shapes(config) if any(layer.endswith(f".{name}") for layer in pairs)]
    layers = {f"layers.{number}.{name}" for number in range(config.num_layers) for name in targets}
    named = named_base(read_json(source / ADAPTER_CONFIG), source / ADAPTER_WEIGHTS)
    notes = [*filter(None, [check_base(named, weights, record, base)])]
    notes += _notes(units, theirs, sorted(layers - pairs.keys()))
    made = _spec_of_run(spec, run, base, settings, rank, targets)
    with new_folder(run, environment) as temporary:
        _write_checkpoint(temporary / "checkpoints", made, _all_pairs(made, layers, pairs), weights, str(base))
        for name in (TOKENIZER, *TOKENIZER_CONFIGS, IMPORT_RECORD, IMPORT_WEIGHTS):
            if (base_folder / name).is_file():
                shutil.copyfile(base_folder / name, temporary / name)
        (temporary / "spec.yaml").write_text(dump_spec(_continued(made, run)), encoding="utf-8")
    return ImportedAdapter(run, base_folder, targets, rank, notes)


@dataclass(frozen=True)
class _Settings:
    """What of adapter_config.json the matrices depend on."""

    alpha: float
    rank: int
    dropout: float
    is_rslora: bool
    alphas: Mapping[str, float]

    def scale_of(self, module: str, rank: int) -> float:
        """Return the factor of a module's product."""
        found = [value for key, value in self.alphas.items() if re.match(rf"(.*\.)?({key})$", module)]
        alpha = found[0] if found else self.alpha
        return alpha / (math.sqrt(rank) if self.is_rslora else rank)


def _read_config(source: Path) -> _Settings:
    """Read adapter_config.json. Raises ConversionError for what is no plain LoRA."""
    if not source.is_dir():
        raise ConversionError(f"{source} is no folder; give the one with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    raw = read_json(source / ADAPTER_CONFIG)
    for key, plain in _PLAIN.items():
        if raw.get(key, plain[0]) not in plain:
            raise ConversionError(
                f"{source / ADAPTER_CONFIG} has {key} {json.dumps(raw[key])}, which plain LoRA does not have; merge "
                "the adapter with peft (merge_and_unload) and import the model"
            )
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal"):
        raise ConversionError(
            f"{source / ADAPTER_CONFIG} has init_lora_weights {start!r}, which changes the base's weights too; merge "
            "the adapter with peft (merge_and_unload) and import the model"
        )
    alphas = raw.get("alpha_pattern") or {}
    numbers = {"r": raw.get("r"), "lora_alpha": raw.get("lora_alpha"), "lora_dropout": raw.get("lora_dropout", 0.0)}
    for key, value in [*numbers.items(), *((f"alpha_pattern.{name}", each) for name, each in alphas.items())]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ConversionError(f"{source / ADAPTER_CONFIG} has {key} {json.dumps(value)} where a number is wanted")
    return _Settings(
        float(numbers["lora_alpha"]),
        int(numbers["r"]),
        float(numbers["lora_dropout"]),
        bool(raw.get("use_rslora", False)),
        alphas,
    )


def _read_pairs(source: Path, shapes: Mapping[str, tuple[int, int]], base: str) -> dict[str, Pair]:
    """Return module -> its pair, float32 at least. Raises ConversionError for the adapter of another model."""
    file = source / ADAPTER_WEIGHTS
    if not file.is_file():
        pickled = source / "adapter_model.bin"
        if pickled.exists():
            raise pickle_refused(source, pickled.name)
        raise ConversionError(f"{source} has no {ADAPTER_WEIGHTS}; copy it there")
    folder = ModelFolder(source, {}, read_header(file))
    found: dict[str, dict[str, Tensor]] = {}
    for name in folder.tensors:
        ending = next((each for each in (A_NAME, B_NAME) if name.endswith(each)), "")
        module = name.removeprefix(PREFIX).removesuffix(ending)
        if not ending or module not in shapes:
            raise ConversionError(
                f"{file} has {name}, and the model of {base} has no linear layer in its blocks that this belongs to: "
                "it is another model's adapter, or one of other layers"
            )
        tensor = folder.read(name)
        found.setdefault(module, {})[ending] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if not found:
        raise ConversionError(f"{file} holds no tensor")
    return {module: _checked(module, each, shapes[module], file, base) for module, each in found.items()}


def _checked(module: str, found: Mapping[str, Tensor], shape: tuple[int, int], file: Path, base: str) -> Pair:
    """Return a module's A and B, of the shapes that its matrix [out, in] has."""
    if len(found) < 2:
        raise ConversionError(f"{file} has only one of the two matrices of {module}; copy it again")
    a, b = found[A_NAME], found[B_NAME]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ConversionError(f"{file}: {tuple(a.shape)} and {tuple(b.shape)} of {module} can't be multiplied")
    if (b.shape[0], a.shape[1]) != shape:
        raise ConversionError(
            f"{file} changes a matrix {module} of {b.shape[0]} x {a.shape[1]}, and that of {base} is {shape[0]} x "
            f"{shape[1]}: it is another model's adapter"
        )
    if not bool(a.isfinite().all()) or not bool(b.isfinite().all()):
        raise ConversionError(f"{file} holds infinite values or NaN in {module}")
    return a, b


def _notes(units: Sequence[WeightMap], theirs: Mapping[str, Pair], without: Sequence[str]) -> list[str]:
    """Return what a user should know of matrices that get zeros."""
    notes = []
    shared = [
        name
        for unit in units
        if any(each.removesuffix(".weight") in theirs for each in unit.theirs)
        for name in unit.theirs
        if name.removesuffix(".weight") not in theirs
    ]
    if shared:
        notes.append(f"{shared[0]} and {len(shared) - 1} more have none, and get one of zeros, for ours are stacked")
    if without:
        notes.append(f"{without[0]} and {len(without) - 1} more have none, and get one of zeros")
    return notes


def _spec_of_run(
    spec: RunSpec, run: Path, base: Path, settings: _Settings, rank: int, targets: Sequence[str]
) -> RunSpec:
    """Return the spec of the adapters, which their checkpoint holds. Raises SpecError where it breaks a rule."""
    fields = spec.model_dump(mode="json")
    adapter = {
        "rank": rank,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
        "targets": list(targets),
        "scaling": "rslora" if settings.is_rslora else "lora",
    }
    # What the base was trained on is none of the adapters' examples, and the folder does not name those.
    kept = ("tokenizer", "tokenizer_vocab_size", "end_of_text", "cache_dir")
    fields["data"] = {"source": [_EXAMPLES]} | {name: fields["data"][name] for name in kept}
    fields["finetune"] = {"method": "sft", "adapter": adapter}
    fields["checkpoint"] |= {"init_from": str(base)}
    fields["train"] |= {"output_dir": str(run)}
    fields["zero"] |= {"backend": "native", "offload": "none"}
    return parse_spec(fields)


def _continued(spec: RunSpec, run: Path) -> RunSpec:
    """Return the spec of a run that trains on, with adapters beside the weights that the imported ones make."""
    fields = spec.model_dump(mode="json")
    fields["checkpoint"] |= {"init_from": str(run)}
    fields["train"] |= {"output_dir": f"{run}-tuned"}
    return parse_spec(fields)


def _all_pairs(spec: RunSpec, layers: set[str], pairs: Mapping[str, Pair]) -> Iterator[tuple[str, Pair]]:
    """Yield every layer's pair; zeros where the folder has none."""
    first = next(iter(pairs.values()))[0]
    for layer in sorted(layers):
        if layer in pairs:
            yield layer, pairs[layer]
            continue
        alike = next(pair for name, pair in pairs.items() if name.split(".", 2)[2] == layer.split(".", 2)[2])
        yield layer, (torch.zeros_like(alike[0], dtype=first.dtype), torch.zeros_like(alike[1]))


def _write_checkpoint(
    folder: Path, spec: RunSpec, pairs: Iterator[tuple[str, Pair]], weights: Weights, source: str
) -> None:
    """Write the checkpoint of step 0."""
    pieces = [
        ShardPiece(f"{layer}.adapter.{name}", "weight", tensor.flatten(), whole(tensor.shape), tuple(tensor.shape), 0)
        for layer, pair in pairs
        for name, tensor in zip(("a", "b"), pair, strict=True)
    ]
    state = {
        **asdict(TrainState()),
        "seed": spec.seed,
        "layout": dict(spec.parallel.model_dump()),
        "spec": spec.model_dump(mode="json"),
        **new_base(source, weights.path, weights.digest).as_state(),
    }
    save_in_parts(folder, 0, [pieces], state)
