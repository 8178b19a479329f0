"""A model to evaluate, at any layout: a run, a checkpoint, or a Hugging Face folder, which is read without a copy."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from trimaran.models.parallel.shard import ShardSpec
from trimaran.models.transformer import Stage
from trimaran.runtime.adapters.merged import open_whole
from trimaran.runtime.checkpoint.folder import newest_checkpoint, step_folder, step_of
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.data.files import hash_file
from trimaran.runtime.evaluate.engine.score import check_causal
from trimaran.runtime.files import read_json
from trimaran.runtime.huggingface.importing import imported_spec
from trimaran.runtime.huggingface.plan import Plan, make_plan
from trimaran.runtime.huggingface.source import ModelFolder
from trimaran.runtime.infer.generate import check_weights
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec, fields_at_layout, parse_spec
from trimaran.runtime.train.state import spec_of, verify_together
from trimaran.runtime.train.train_context import build_stages_of_rank


@dataclass(frozen=True)
class EvaluatedModel:
    """A model whose weights are not read yet.

    Args:
        origin: the checkpoint, or the Hugging Face folder.
        spec: of the model at the layout of the evaluation; what concerns training means nothing.
        text: its tokenizer, stop tokens and chat template.
        step: of the checkpoint; None for a Hugging Face folder.
    """

    origin: Path
    spec: RunSpec
    text: RunText
    step: int | None


def open_model(
    path: Path, *, tp: int = 1, pp: int = 1, dp: int = 1, step: int | None = None, shared_memory: bool = True
) -> EvaluatedModel:
    """Return the model at `path` for an evaluation at tp x pp x dp. Reads no weights.

    Args:
        path: the folder of a run, of which the newest whole checkpoint is taken; a checkpoint folder; or a folder with
            config.json and safetensors.
        step: of the run's checkpoint to take.

    Raises:
        ValueError: there is no such model, the layout is impossible (SpecError), the tokenizer is another model's, or
            the model is not causal; a file of a Hugging Face folder is damaged (ConversionError).
        CheckpointError: a file of the checkpoint is missing or cut.
        OSError: a file can't be read.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give that of a run, of a checkpoint, or one with config.json")
    if is_huggingface(path):
        if step is not None:
            raise ValueError(
                f"{path} is a Hugging Face folder, which has no checkpoints to choose from; leave them out"
            )
        origin, spec = path, imported_spec(make_plan(ModelFolder.open(path)), Path("model"))
        check_causal(spec.transformer)
        text = _text_of_huggingface(path)
    else:
        origin = _checkpoint(path, step)
        checkpoint = Checkpoint.open(origin, verify=False)
        spec, step = spec_of(checkpoint), checkpoint.step
        check_causal(spec.transformer)
        text = RunText.open(origin.parent.parent)
        _check_tokenizer(text.folder)
    vocab_size = spec.transformer.vocab_size
    if text.tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{text.folder / 'tokenizer.json'} has {text.tokenizer.vocab_size} tokens, and the model's vocabulary has "
            f"{vocab_size}: it is another model's tokenizer; put the model's own there"
        )
    return EvaluatedModel(origin, at_layout(spec, tp=tp, pp=pp, dp=dp, shared_memory=shared_memory), text, step)


def is_huggingface(path: Path) -> bool:
    """Whether a folder holds a model in the format of Hugging Face, and is no run or checkpoint."""
    return (path / "config.json").is_file() and not (path / "checkpoints").is_dir() and step_of(path) is None


def at_layout(spec: RunSpec, *, tp: int, pp: int, dp: int, shared_memory: bool = True) -> RunSpec:
    """Return the spec for an evaluation at a layout. Raises SpecError where the model can't be cut like that."""
    fields = fields_at_layout(spec, tp=tp, pp=pp, dp=dp, shared_memory=shared_memory, uneven_heads=True)
    # A batch that every layout can divide: how the run was trained does not limit how it is evaluated.
    fields["train"] |= {"global_batch_size": 2 * pp * dp, "micro_batch_size": 1}
    return parse_spec(fields)


def load_stages(origin: Path, spec: RunSpec, mesh: Mesh, device: torch.device) -> dict[int, Stage]:
    """Return this rank's stages with the weights of a model that `open_model` has opened.

    A rank reads what its stages hold, each tensor once. Collective over the world.

    Raises:
        CheckpointError: a file of the checkpoint has changed since it was written.
        ConversionError: a tensor of the folder can't be read, or is not finite.
        NotFiniteError: the weights are not finite.
    """
    stages = build_stages_of_rank(spec, mesh, device, draws_weights=False)
    if is_huggingface(origin):
        _load_huggingface(stages.values(), make_plan(ModelFolder.open(origin)))
        return stages
    checkpoint = open_whole(origin)
    verify_together(checkpoint, mesh)
    for stage in stages.values():
        stage.load(checkpoint.read)
    checkpoint.close()
    check_weights(stages, mesh, str(origin))
    return stages


def _checkpoint(path: Path, step: int | None) -> Path:
    if step is not None and step_of(path) is None:
        found: Path | None = step_folder(path / "checkpoints", step)
        if found is not None and not found.is_dir():
            raise ValueError(f"{path} has no checkpoint of step {step}: {found} does not exist")
    else:
        found = newest_checkpoint(path)
    if found is None:
        raise ValueError(
            f"{path} has no whole checkpoint and no config.json; give the folder of a run that `trimaran train` has "
            "made, a checkpoint, or a Hugging Face folder"
        )
    return found


def _check_tokenizer(run: Path) -> None:
    """Raise ValueError where a run's tokenizer is not the one that it was trained with, as far as its files tell."""
    manifest, path = run / "data_manifest.json", run / "tokenizer.json"
    if not manifest.is_file():
        return
    try:
        wanted = read_json(manifest)["tokenizer"]["sha256"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{manifest} does not name the run's tokenizer ({error!r}); copy the run again") from error
    if hash_file(path) != wanted:
        raise ValueError(
            f"{path} is not the tokenizer that the run was trained with, whose sha256 {manifest.name} has; put it back"
        )


def _text_of_huggingface(path: Path) -> RunText:
    """Return how a model of Hugging Face reads and writes text."""
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path} has no tokenizer.json; `trimaran import` makes one where the folder's files allow it")
    text = RunText.open(path)
    ends = ModelFolder.open(path).config.get("eos_token_id")
    ids = [each for each in (ends if isinstance(ends, list) else [ends]) if type(each) is int and each >= 0]
    return replace(text, is_imported=True, stop_tokens=tuple(sorted({*text.stop_tokens, *ids})))


def _load_huggingface(stages: Iterable[Stage], plan: Plan) -> None:
    """Fill the stages from the tensors of the folder; those that become parameters together are read together."""
    unit_of = {name: unit for unit in plan.units for name in unit.ours}
    read: dict[str, Tensor] = {}  # with other tensors, before their turn

    def local(name: str, key: str, shard: ShardSpec, local_shape: tuple[int, ...]) -> Tensor:
        if name not in read:
            read.update(plan.read(unit_of[name]))
        whole, box = read.pop(name), shard.box(local_shape)
        part = torch.zeros(local_shape, dtype=whole.dtype)
        part[tuple(slice(0, high - low) for low, high in box)] = whole[tuple(slice(low, high) for low, high in box)]
        return part

    for stage in stages:
        stage.load(local)
