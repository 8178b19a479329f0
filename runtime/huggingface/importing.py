"""From a Hugging Face model to a run: weights stream into a checkpoint for any layout, then the logits are compared."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from trimaran.models.huggingface.registry import family_of
from trimaran.models.parallel.shard import ShardPiece, whole
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.checkpoint.store import save_in_parts
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import open_regular
from trimaran.runtime.folder_lock import NO_JOB
from trimaran.runtime.huggingface.folder import check_disk_space, new_folder
from trimaran.runtime.huggingface.originals import keep_originals
from trimaran.runtime.huggingface.plan import Plan, make_plan
from trimaran.runtime.huggingface.progress import Progress
from trimaran.runtime.huggingface.proof import Agreement, Proof
from trimaran.runtime.huggingface.refusals import PICKLES, ConversionError, pickle_refused, refuse_stand_in
from trimaran.runtime.huggingface.source import ModelFolder
from trimaran.runtime.huggingface.transformers_adapter import (
    folder_of_gguf,
    gguf_config,
    require_transformers,
    save_fast_tokenizer,
    their_config,
)
from trimaran.runtime.spec import RunSpec, dump_spec, parse_spec
from trimaran.runtime.train.init_from import IMPORT_RECORD, IMPORT_WEIGHTS, TOKEN_IDS, TOKENIZER, TOKENIZER_CONFIGS
from trimaran.runtime.train.state import TrainState

_OLD_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")
_GGUF = b"GGUF"
# Defaults of a run that continues training: small enough to start anywhere, and the fields a person changes first.
_SEQ_LEN, _STEPS, _BATCH, _LR = 1024, 100, 8, 1e-5
_PRECISIONS = {"F64": "float64", "F32": "float32", "F16": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Limits:
    """Memory limits of a conversion.

    Args:
        shard_bytes: bytes of weights collected before they are written to a file; a larger unit is divided over several
            files.
        memory_bytes: bytes of weights that transformers may hold for the comparison; the rest stays on disk.
    """

    shard_bytes: int = 256 << 20
    memory_bytes: int = 2 << 30


@dataclass(frozen=True)
class Imported:
    """The result of an import."""

    run: Path
    spec: RunSpec
    family: str
    agreements: list[Agreement]
    has_tokenizer: bool


def import_model(
    source: Path,
    run: Path,
    limits: Limits = Limits(),
    progress: Progress = Progress(),  # noqa: B008 - it is frozen
    environment: Mapping[str, str] = NO_JOB,
) -> Imported:
    """Make the run folder `run` from the model in `source`, a folder with config.json and safetensors or a .gguf file.

    All names and shapes are checked before the first byte is written. The run appears only after its logits were
    compared with those of transformers.

    Args:
        environment: see `Holder.here`.

    Raises:
        ConversionError: the model can't be imported, or (ProofError) its logits differ.
        CheckpointError, OSError: the checkpoint could not be written.
    """
    if source.is_file():
        config = _check_gguf(source)
        with new_folder(run, environment) as temporary:
            progress.say(f"{source} is dequantized to float32 by transformers, which holds all of it in memory")
            folder_of_gguf(source, temporary / "huggingface", config)
            imported = _fill(
                temporary, make_plan(ModelFolder.open(temporary / "huggingface")), source, run, limits, progress
            )
            shutil.rmtree(temporary / "huggingface")
        return imported
    plan = make_plan(ModelFolder.open(source))
    require_transformers()
    their_config(plan.folder.config, plan.architecture)
    imported_spec(plan, run)
    with new_folder(run, environment) as temporary:
        return _fill(temporary, plan, source, run, limits, progress)


def _check_gguf(source: Path) -> Any:
    """Return transformers' config of a GGUF file, before the weights are read.

    Raises ConversionError for a file that is not GGUF, or an unsupported network.
    """
    with open_regular(source) as file:
        is_gguf = file.read(len(_GGUF)) == _GGUF
    if not is_gguf:
        if any(fnmatch(source.name, pattern) for pattern in PICKLES):
            raise pickle_refused(source.parent, source.name)
        raise ConversionError(
            f"{source} is not a GGUF file; give a .gguf file, or the folder with config.json and model.safetensors"
        )
    require_transformers("gguf")
    try:
        config = gguf_config(source)
        family_of(config.to_dict())
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"{source}: {error}") from error
    return config


def _fill(temporary: Path, plan: Plan, source: Path, run: Path, limits: Limits, progress: Progress) -> Imported:
    """Write the run into `temporary` and compare the logits."""
    spec = imported_spec(plan, run)
    check_disk_space(temporary, plan.checkpoint_bytes, "the checkpoint")
    for name in (TOKENIZER, *TOKENIZER_CONFIGS):
        if (plan.folder.path / name).is_file():
            _refuse_foreign(plan.folder.path / name)
            refuse_stand_in(plan.folder.path / name)
    stored = ", ".join(f"{dtype} ({count:,} numbers)" for dtype, count in plan.dtypes.items())
    kept = "; float16 is kept as float32, which holds all its values" if "F16" in plan.dtypes else ""
    progress.say(f"{plan.family.name} model of {plan.config.num_parameters():,} parameters, stored as {stored}{kept}")
    for note in plan.notes:
        progress.say(note)
    checkpoint = write_checkpoint(plan, spec, temporary / "checkpoints", limits.shard_bytes, progress)
    for what in keep_originals(plan, temporary):
        progress.say(f"{what} are kept in {IMPORT_WEIGHTS}, because the parameters can't hold them; export writes them")
    has_tokenizer = _copy_tokenizer(plan, temporary, run, progress)
    opened = Checkpoint.open(checkpoint)
    proof = Proof(
        plan.config,
        lambda name: _read_and_unmap(opened, name),
        plan.folder.path,
        plan.architecture,
        temporary if has_tokenizer else None,
        limits.memory_bytes,
        temporary / "offload",
        plan.folder.config,
    )
    agreements = proof.run(progress)
    shutil.rmtree(temporary / "offload", ignore_errors=True)
    (temporary / "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
    record = {
        "source": str(source.resolve()),
        "family": plan.family.name,
        "config": plan.folder.config,
        "dtypes": plan.dtypes,
        "proof": [agreement.record() for agreement in agreements],
    }
    (temporary / IMPORT_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return Imported(run, spec, plan.family.name, agreements, has_tokenizer)


def _read_and_unmap(checkpoint: Checkpoint, name: str) -> Tensor:
    """A parameter. Its file is unmapped again: read pages would count as this process's memory."""
    tensor = checkpoint.read_global(name, "weight")
    checkpoint.close()
    return tensor


def imported_spec(plan: Plan, run: Path) -> RunSpec:
    """Return the spec of a run that continues training from the imported weights.

    Generation reads the network from it too.

    Raises:
        SpecError: the network breaks a rule of the spec.
    """
    scores = not plan.config.has_head
    return parse_spec(
        {
            "model": plan.config.model_dump(mode="json"),
            "data": {"source": ["pairs.jsonl" if scores else "quickstart"], "tokenizer": str(run / TOKENIZER)},
            **({"finetune": {"method": "reward"}} if scores else {}),
            "optimizer": {"lr": _LR},
            "lr_schedule": {"warmup_steps": _STEPS // 10},
            "precision": {"dtype": _PRECISIONS[next(iter(plan.dtypes))]},
            "train": {
                "num_steps": _STEPS,
                "global_batch_size": _BATCH,
                "micro_batch_size": 1,
                "seq_len": min(plan.config.max_seq_len, _SEQ_LEN),
                "output_dir": f"{run}-tuned",
            },
            "checkpoint": {"init_from": str(run)},
        }
    )


def write_checkpoint(
    plan: Plan,
    spec: RunSpec,
    folder: Path,
    shard_bytes: int,
    progress: Progress = Progress(),  # noqa: B008 - frozen
) -> Path:
    """Write the parameters of a plan, unit by unit, as the checkpoint of step 0 in `folder`, and return its path.

    Errors as for `save_in_parts`.
    """
    state = {
        **asdict(TrainState()),
        "seed": spec.seed,
        "layout": dict(spec.parallel.model_dump()),
        "spec": spec.model_dump(mode="json"),
    }
    return save_in_parts(folder, 0, _parts(_pieces(plan, shard_bytes, progress), shard_bytes), state)


def _pieces(plan: Plan, shard_bytes: int, progress: Progress) -> Iterator[ShardPiece]:
    """Every parameter in pieces of at most `shard_bytes`, in the order of the network."""
    tensors, done, total = 0, 0, plan.num_bytes
    for unit in plan.units:
        for name, tensor in plan.read(unit).items():
            data = tensor.reshape(-1).contiguous()
            most = max(1, shard_bytes // data.element_size())
            for start in range(0, data.numel(), most):
                yield ShardPiece(
                    name, "weight", data[start : start + most], whole(tensor.shape), tuple(tensor.shape), start
                )
        tensors += len(unit.theirs)
        done += plan.bytes_of(unit)
        progress.advance(f"writing weights, tensor {tensors} of {len(plan.stored)}", done, total)


def _parts(pieces: Iterator[ShardPiece], shard_bytes: int) -> Iterator[list[ShardPiece]]:
    """The pieces in lists of at most `shard_bytes`, one list for each file."""
    part: list[ShardPiece] = []
    size = 0
    for piece in pieces:
        if part and size + piece.data.nbytes > shard_bytes:
            yield part
            part.clear()  # clear the list itself: the consumer still holds a reference to it
            size = 0
        part.append(piece)
        size += piece.data.nbytes
    if part:
        yield part


def _refuse_foreign(file: Path) -> None:
    """Raise ConversionError for a link out of the folder.

    Such a link in a stranger's archive could copy any file of the user into the run, and the next export would publish
    it. Links of a hub's cache lead to the `blobs` beside its `snapshots` and are allowed.
    """
    folder, target = file.parent.resolve(), file.resolve()
    if target.is_relative_to(folder) or target.parent == folder.parent.parent / "blobs":
        return
    raise ConversionError(f"{file} is a link to {target}, outside of the model's folder; put the file itself there")


def _copy_tokenizer(plan: Plan, temporary: Path, run: Path, progress: Progress) -> bool:
    """Copy tokenizer, chat template and generation config; return whether there is a tokenizer.

    Problems are reported through `progress`, in which `temporary` is called `run`, as it will be.
    """
    source = plan.folder.path
    for name in (TOKENIZER, *TOKENIZER_CONFIGS):
        if (source / name).is_file():
            shutil.copyfile(source / name, temporary / name)
    if not (temporary / TOKENIZER).exists() and any((source / name).is_file() for name in _OLD_TOKENIZERS):
        with_tokenizer = temporary / "tokenizer"
        if save_fast_tokenizer(source, with_tokenizer):
            for name in (TOKENIZER, *TOKENIZER_CONFIGS):
                if (with_tokenizer / name).is_file() and not (temporary / name).exists():
                    (with_tokenizer / name).rename(temporary / name)
        shutil.rmtree(with_tokenizer, ignore_errors=True)
    if not (temporary / TOKENIZER).exists():
        progress.say(f"{source} has no tokenizer.json; to train or generate text, put one into the run folder")
        return False
    ids = {name: plan.folder.config.get(name) for name in TOKEN_IDS}
    if ids["eos_token_id"] is not None and not (temporary / "generation_config.json").exists():
        (temporary / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    try:
        tokenizer = Tokenizer.load(temporary / TOKENIZER)
    except DataError as error:
        told = str(error).replace(str(temporary), str(run))
        progress.say(f"the tokenizer can't be used to train or to generate text: {told}")
        return True
    if tokenizer.vocab_size > plan.config.vocab_size:
        progress.say(
            f"tokenizer.json has {tokenizer.vocab_size} tokens, more than the model's {plan.config.vocab_size}: "
            "text with the others can't be trained on"
        )
    return True
