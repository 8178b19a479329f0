"""From a checkpoint to a folder that transformers and vLLM load, with a comparison of logits.

The folder has safetensors under standard names, configs, tokenizer and a card.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trimaran.models.config import TransformerConfig
from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.registry import FAMILIES, family_for
from trimaran.models.huggingface.weights import WeightMap, resolve
from trimaran.models.transformer import model_dtype
from trimaran.runtime.adapters.merged import Weights
from trimaran.runtime.checkpoint.files import write_safetensors, write_text
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.folder_lock import NO_JOB
from trimaran.runtime.huggingface.card import Card, model_card
from trimaran.runtime.huggingface.folder import check_disk_space, new_folder
from trimaran.runtime.huggingface.originals import put_back
from trimaran.runtime.huggingface.progress import Progress
from trimaran.runtime.huggingface.proof import Agreement, Proof, ReadWeight
from trimaran.runtime.huggingface.refusals import INDEX, WEIGHTS, ConversionError
from trimaran.runtime.huggingface.scores import architecture_of, classifier_keys, units_of, without_scores
from trimaran.runtime.huggingface.source import read_json
from trimaran.runtime.huggingface.transformers_adapter import require_transformers
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.init_from import IMPORT_RECORD, TOKEN_IDS, TOKENIZER, TOKENIZER_CONFIGS, open_weights
from trimaran.runtime.train.state import spec_of

ExportDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Args:
        dtype: of the exported weights; None for the dtype of the run's precision.
        family: of the architecture; None for the family of the import, or else the first that can express the model.
        shard_bytes: maximum size of a file; several files get an index.
        memory_bytes: bytes of weights that transformers may hold for the comparison; the rest stays on disk.
    """

    dtype: ExportDtype | None = None
    family: str | None = None
    shard_bytes: int = 2 << 30
    memory_bytes: int = 2 << 30


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    folder: Path
    architecture: str
    dtype: str
    num_bytes: int
    is_causal: bool
    agreements: list[Agreement]


@dataclass(frozen=True)
class _Model:
    """A checkpoint and how it will be written."""

    checkpoint: Weights
    run: Path
    spec: RunSpec
    config: TransformerConfig
    family: Family
    architecture: str
    units: Sequence[WeightMap]
    dtype: torch.dtype
    record: dict[str, Any]

    def read(self, name: str) -> Tensor:
        """A parameter as stored, [*global shape].

        Its file is unmapped again: read pages would count as this process's memory.
        """
        tensor = self.checkpoint.read_global(name, "weight")
        self.checkpoint.close()
        return tensor

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every tensor to write, in order."""
        pairs = [pair for unit in self.units for pair in zip(unit.theirs, unit.their_shapes(self.config), strict=True)]
        return {name: prod(shape) * self.dtype.itemsize for name, shape in pairs}


def export_model(
    run: Path,
    target: Path,
    options: ExportOptions,
    progress: Progress = Progress(),  # noqa: B008 - it is frozen
    environment: Mapping[str, str] = NO_JOB,
) -> Exported:
    """Write the folder `target` from the newest checkpoint of `run`, or from a checkpoint folder.

    The folder appears only after its logits were compared with those of our network.

    Args:
        environment: see `Holder.here`.

    Raises:
        ConversionError: no architecture expresses the model, or (ProofError) the logits differ.
        CheckpointError, OSError: the checkpoint can't be read, or the folder can't be written.
    """
    model = _open(run, options)
    require_transformers()
    sizes = model.sizes()
    with new_folder(target, environment) as temporary:
        check_disk_space(temporary, sum(sizes.values()), "the exported model")
        model.checkpoint.verify_files(model.checkpoint.files)
        _write_weights(temporary, model, sizes, options.shard_bytes, progress)
        tokenizer = _tokenizer_of(model.run, progress)
        _write_configs(temporary, model, tokenizer)
        proof = Proof(
            model.config,
            rounded(model.units, model.config, model.read, model.dtype),
            temporary,
            model.architecture,
            temporary if tokenizer else None,
            options.memory_bytes,
            temporary / "offload",
        )
        agreements = proof.run(progress)
        shutil.rmtree(temporary / "offload", ignore_errors=True)
        card = Card(
            target.name if target.parent != model.run else model.run.absolute().name,
            model.run,
            model.spec,
            model.checkpoint.step,
            int(model.checkpoint.state.get("tokens_seen", 0)),
            model.architecture,
            _name(model.dtype),
            agreements,
            model.record,
        )
        write_text(temporary / "README.md", model_card(card))
    return Exported(
        target, model.architecture, _name(model.dtype), sum(sizes.values()), model.config.is_causal, agreements
    )


def _open(run: Path, options: ExportOptions) -> _Model:
    """Open the checkpoint and choose architecture and dtype."""
    checkpoint, folder = open_weights(run)
    spec = spec_of(checkpoint)
    # A value head beside the other is of training alone; the classes of transformers have no place for it.
    config = without_scores(spec.transformer) if spec.transformer.has_head else spec.transformer
    plain = without_scores(config)
    record = read_json(folder / IMPORT_RECORD) if (folder / IMPORT_RECORD).is_file() else {}
    family = choose_family(plain, options.family, record.get("family"))
    try:
        units = units_of(resolve(family, plain), config)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    # float64 is for comparisons; the programs that read the folder compute in float32 at most.
    dtype = options.dtype or ("float32" if spec.precision.dtype == "float64" else spec.precision.dtype)
    architecture = architecture_of(family, config)
    return _Model(checkpoint, folder, spec, config, family, architecture, units, model_dtype(dtype), record)


def choose_family(config: TransformerConfig, wanted: str | None, imported_as: str | None) -> Family:
    """Return the family to export as: the requested one, that of the import if it still fits, or the first that fits.

    Raises:
        ConversionError: the requested family is unknown or can't express the model, or no family can; says why.
    """
    families = {family.name: family for family in FAMILIES}
    if wanted is not None and wanted not in families:
        raise ConversionError(f"family {wanted!r} is not known; the families are {', '.join(families)}")
    try:
        if wanted is not None:
            families[wanted].from_config(config)
            return families[wanted]
        if imported_as in families and _expresses(families[imported_as], config):
            return families[imported_as]
        return family_for(config)
    except ValueError as error:
        raise ConversionError(f"the model can't be exported: {error}") from error


def _expresses(family: Family, config: TransformerConfig) -> bool:
    try:
        family.from_config(config)
    except ValueError:
        return False
    return True


def rounded(units: Sequence[WeightMap], config: TransformerConfig, read: ReadWeight, dtype: torch.dtype) -> ReadWeight:
    """Return a reader of the weights rounded to `dtype`, as they are in the exported files.

    Our network then computes from the exported weights, so the comparison keeps the tolerance of float32 at any dtype.
    Where `dtype` loses nothing, the weights are read unchanged.
    """
    unit_of = {name: unit for unit in units for name in unit.ours}

    def read_rounded(name: str) -> Tensor:
        tensor = read(name)
        if torch.promote_types(tensor.dtype, dtype) == dtype:
            return tensor
        unit = unit_of[name]
        theirs = unit.to_theirs([tensor if each == name else read(each) for each in unit.ours], config)
        return unit.to_ours([each.to(dtype) for each in theirs], config)[unit.ours.index(name)]

    return read_rounded


def _write_weights(folder: Path, model: _Model, sizes: dict[str, int], shard_bytes: int, progress: Progress) -> None:
    """Write one file, or several with an index, in the order of the network; holds one file's tensors in memory."""
    shards = shards_of(sizes, shard_bytes)
    file_of = {name: shard for shard, names in shards.items() for name in names}
    held: dict[str, Tensor] = {}
    done, zeros = 0, dict[str, None]()
    for unit in model.units:
        theirs = unit.to_theirs([model.read(name) for name in unit.ours], model.config)
        if not unit.form.is_exact:
            with_originals = put_back(model.run, unit, theirs, model.config)
            theirs = theirs if with_originals is None else with_originals
            zeros |= {unit.form.lost: None} if with_originals is None and unit.form.lost else {}
        for name, tensor in zip(unit.theirs, theirs, strict=True):
            held[name] = _cast(name, tensor, model.dtype)
            done += 1
            progress.advance(f"writing weights, tensor {done} of", done, len(sizes))
            if name == shards[file_of[name]][-1]:
                write_safetensors(folder / file_of[name], held, {"format": "pt"})
                held = {}
    for what in zeros:
        progress.say(f"the run does not have {what}: zeros are written")
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def shards_of(sizes: dict[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Return the tensor names of each file, in order, at most `shard_bytes` a file unless one tensor is larger."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, num_bytes in sizes.items():
        if groups[-1] and size + num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, 1)}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype).contiguous()
    if bool(torch.isfinite(cast).all()):
        return cast
    if bool(torch.isfinite(tensor).all()):
        raise ConversionError(
            f"{name} has values beyond {_name(dtype)}'s largest, {torch.finfo(dtype).max:g}; "
            "export with --dtype bfloat16 or float32"
        )
    raise ConversionError(
        f"{name} holds infinite values or NaN, so the model would compute nothing; export an earlier checkpoint, from "
        "before the run diverged"
    )


def _tokenizer_of(run: Path, progress: Progress) -> Tokenizer | None:
    """The run's tokenizer; None, with a message, where it has none."""
    if not (run / TOKENIZER).is_file():
        progress.say(
            f"{run} has no tokenizer.json, so the exported folder has none either, and only random tokens are compared"
        )
        return None
    try:
        return Tokenizer.load(run / TOKENIZER)
    except DataError as error:
        raise ConversionError(f"the run's tokenizer can't be exported: {error}") from error


def _write_configs(folder: Path, model: _Model, tokenizer: Tokenizer | None) -> None:
    """Write config.json, tokenizer, chat template and generation config: the run's own files, or else plain ones."""
    ids = _token_ids(model, tokenizer)
    config = {**model.family.from_config(without_scores(model.config)), **ids, "torch_dtype": _name(model.dtype)}
    config |= classifier_keys(model.config, model.architecture, ids)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for name in (TOKENIZER, *TOKENIZER_CONFIGS) if tokenizer else ():
        if (model.run / name).is_file():
            shutil.copyfile(model.run / name, folder / name)
    if not (folder / "generation_config.json").exists():
        write_text(
            folder / "generation_config.json",
            json.dumps({name: value for name, value in ids.items() if value is not None}, indent=2) + "\n",
        )
    config_file = folder / "tokenizer_config.json"
    known = read_json(config_file) if config_file.exists() else {}
    if tokenizer and known.keys() <= {"eos_token", "end_of_text"}:  # no file, or the one of Tokenizer.save
        # Training texts are separated by one token, so it can both end and begin a text.
        end = dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.eot_token)
        described = {"tokenizer_class": "PreTrainedTokenizerFast", **end, "model_max_length": model.config.max_seq_len}
        described |= {
            "model_input_names": ["input_ids", "attention_mask"]
        }  # generate() rejects the token types that are added by default
        described |= {"clean_up_tokenization_spaces": False, **known}
        write_text(config_file, json.dumps(described, indent=2) + "\n")


def _token_ids(model: _Model, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids of special tokens: those of the imported config.json, or the end-of-text token for all of them."""
    imported = model.record.get("config", {})
    if any(imported.get(name) is not None for name in TOKEN_IDS):
        return {name: imported.get(name) for name in TOKEN_IDS}
    return dict.fromkeys(TOKEN_IDS, tokenizer.eot_id if tokenizer else None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
