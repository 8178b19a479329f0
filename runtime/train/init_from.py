"""checkpoint.init_from: a new run starts from the weights of another, at any layout, with a fresh optimizer."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from trimaran.models.adapter import load_frozen
from trimaran.models.config import TransformerConfig
from trimaran.models.fields import counted
from trimaran.models.huggingface.family import canonical_config
from trimaran.models.layers.score import SCORE_WEIGHT, drawn_score_weight
from trimaran.models.parallel.shard import ShardSpec
from trimaran.models.transformer import parameter_shapes
from trimaran.runtime.adapters.merged import Weights, open_whole
from trimaran.runtime.checkpoint.base import base_of, find_base, new_base
from trimaran.runtime.checkpoint.folder import newest_checkpoint
from trimaran.runtime.checkpoint.manifest import CheckpointError
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.samples import TrainingData
from trimaran.runtime.train.state import spec_of, verify_together
from trimaran.runtime.train.train_context import TrainContext, adapter_plan
from trimaran.runtime.train.vocabulary import grown_reader
from trimaran.runtime.zero.protocol import ReadRange

IMPORT_RECORD = "import.json"
"""The record of a run's imported weights, written by `trimaran import`."""
IMPORT_WEIGHTS = "import.safetensors"
"""Numbers of the imported model that its parameters can't hold, for an export; training does not read them."""
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files beside tokenizer.json in a run folder that concern text; of them training reads which token ends a text."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json and generation_config.json that name special tokens."""

# Fields in which a run may differ from its initial weights, beside dropout and initialization: they change the network
# little, or on purpose (a longer context).
_MAY_DIFFER = frozenset(
    {
        "max_seq_len",
        "rotary_base",
        "rotary_scaling",
        "attention_window",
        "router_aux_loss",
        "mup_base_width",
        "mup_base_head_dim",
    }
)

logger = logging.getLogger(__name__)


def open_weights(source: Path) -> tuple[Weights, Path]:
    """Return the newest complete checkpoint of a run folder, or a checkpoint folder itself, and the folder of its run.

    Of adapters it reads the weights that they make with their base. Reads no weights here.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = newest_checkpoint(source)
    if path is None:
        what = "has no whole checkpoint" if source.is_dir() else "does not exist"
        raise CheckpointError(
            f"{source} {what}; give the folder of a run that `trimaran train` or `trimaran import` "
            "has made, or a checkpoint in it"
        )
    return open_whole(path), source.resolve().parent.parent if path == source else source


def check_initial_weights(spec: RunSpec) -> None:
    """Raise where the weights that a run starts from don't fit the model of `spec`; log other differences as warnings.

    Those of checkpoint.init_from, finetune.preference.reference and finetune.rl.value_from; does nothing where there
    are none.

    Raises:
        CheckpointError: there are no such weights.
        ValueError: they are of another model; names the fields that differ.
    """
    if spec.checkpoint.init_from is not None:
        _check_weights("checkpoint.init_from", spec.checkpoint.init_from, spec)
    preference = None if spec.finetune is None else spec.finetune.preference
    if preference is not None and preference.reference is not None:
        _check_weights("finetune.preference.reference", preference.reference, spec)
    source = _value_source(spec)
    if source is not None:
        _check_value_head(open_weights(Path(source))[0], source, spec)


def _value_source(spec: RunSpec) -> str | None:
    return None if spec.finetune is None or spec.finetune.rl is None else spec.finetune.rl.value_from


def _check_value_head(checkpoint: Weights, source: str, spec: RunSpec) -> None:
    theirs, ours = spec_of(checkpoint).transformer, spec.transformer
    if theirs.has_head or SCORE_WEIGHT not in checkpoint.names():
        raise ValueError(
            f"finetune.rl.value_from {source} is no reward run, so it has no head to begin with; name a run of "
            "finetune.method reward, or set it to null"
        )
    if theirs.hidden_size != ours.hidden_size:
        raise ValueError(
            f"finetune.rl.value_from {source} has model.hidden_size {theirs.hidden_size}, and the model "
            f"{ours.hidden_size}; name a reward run that was trained from the same model, or set it to null"
        )


def _check_weights(field: str, source: str, spec: RunSpec) -> None:
    """Raise where the weights that `field` of the spec names don't fit its model; as `check_initial_weights`."""
    checkpoint, _ = open_weights(Path(source))
    theirs, ours = spec_of(checkpoint).transformer, spec.transformer
    if theirs.has_head or not ours.has_head:  # a new score head is drawn, and one that is not needed left out
        theirs = theirs.model_copy(update={"score_head": ours.score_head})
    if _may_grow(spec) and ours.vocab_size > theirs.vocab_size:  # the tokens of a chat template
        theirs = theirs.model_copy(update={"vocab_size": ours.vocab_size})
    different = _differences(theirs, ours)
    refused = [line for name, line in different.items() if name not in _MAY_DIFFER]
    if not refused and parameter_shapes(theirs) != parameter_shapes(
        ours
    ):  # max_seq_len with a learned table of positions
        refused = list(different.values())
    if refused:
        shown = "\n  ".join(refused)
        raise ValueError(
            f"{field} {source} holds weights of another model:\n  {shown}\n"
            f"set these fields as they are there (its spec.yaml has them all), or {field} to null"
        )
    for line in different.values():
        logger.warning("the weights of %s were trained otherwise: %s", field, line)


def _may_grow(spec: RunSpec) -> bool:
    """Return whether the vocabulary may be larger than that of the weights, because the spec says so in so many words.

    A size that comes from elsewhere (data.tokenizer_vocab_size, a preset) says nothing of the weights: thousands of
    tokens that no text has would share the probability. A frozen embedding takes no new rows at all.
    """
    return spec.finetune is not None and spec.finetune.adapter is None and spec.model.vocab_size is not None


def tokenizer_of_weights(spec: RunSpec, *, resumed: bool) -> Path | None:
    """Return the tokenizer.json that the text must be tokenized with, because the weights have learned its tokens.

    That of checkpoint.init_from, or of the run itself once it has begun; None for a run that starts from no weights.

    Raises:
        ValueError: there is none and data.tokenizer names none, so that a new one would be trained; or data.tokenizer
            gives other ids to tokens of the weights.
    """
    if spec.checkpoint.init_from is None:
        return None
    if resumed:
        return Path(spec.train.output_dir) / TOKENIZER
    file = open_weights(Path(spec.checkpoint.init_from))[1] / TOKENIZER
    given = spec.data.tokenizer
    if not file.is_file():
        if given is None:
            raise ValueError(
                f"checkpoint.init_from {spec.checkpoint.init_from} has no tokenizer.json, so a new tokenizer would be "
                "trained, whose tokens the weights don't know; set data.tokenizer to the one they were trained with"
            )
        logger.warning("checkpoint.init_from has no tokenizer.json to compare data.tokenizer %s with", given)
        return None
    if given is None:
        logger.info("the text is tokenized with %s, the tokenizer of checkpoint.init_from", file)
        return file
    other = Tokenizer.load(Path(given), spec.data.end_of_text).first_difference(Tokenizer.load(file))
    if other is not None:
        raise ValueError(
            f"data.tokenizer {given} is not the tokenizer of checkpoint.init_from: {other}; "
            f"set data.tokenizer to {file}, or to null for the same"
        )
    return file


def has_same_tokenizer(spec: RunSpec, data: TrainingData) -> bool:
    """Return whether the data was tokenized with exactly the tokenizer of the initial weights.

    Needs checkpoint.init_from.
    """
    assert spec.checkpoint.init_from is not None, "only a run with checkpoint.init_from has initial weights"
    file = open_weights(Path(spec.checkpoint.init_from))[1] / TOKENIZER
    return file.is_file() and Tokenizer.load(file).definition == data.tokenizer.definition


def copy_tokenizer_configs(spec: RunSpec, folder: Path) -> None:
    """Copy the files that come with the initial weights' tokenizer (chat template, ...) to `folder`, where missing.

    Only for a run with the same tokenizer: these files name tokens. Needs checkpoint.init_from.
    """
    assert spec.checkpoint.init_from is not None, "only a run with checkpoint.init_from has initial weights"
    source = open_weights(Path(spec.checkpoint.init_from))[1]
    for name in (*TOKENIZER_CONFIGS, IMPORT_RECORD):
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def copy_import_weights(spec: RunSpec, folder: Path) -> None:
    """Copy what an export of the initial weights' model needs besides its parameters. Needs checkpoint.init_from."""
    assert spec.checkpoint.init_from is not None, "only a run with checkpoint.init_from has initial weights"
    file = open_weights(Path(spec.checkpoint.init_from))[1] / IMPORT_WEIGHTS
    if file.is_file():
        shutil.copyfile(file, folder / IMPORT_WEIGHTS)


def load_initial_weights(
    train_context: TrainContext, tokenizer: Tokenizer | None = None, *, source: str | None = None
) -> str:
    """Load the weights of checkpoint.init_from into a new run, whatever layout wrote them; return a sentence about it.

    A score head that they lack keeps the weights that it starts from, and so do adapters. Collective over the world.
    Every rank verifies the checksums of a share of the files; if one is damaged all ranks raise CheckpointError.

    Args:
        tokenizer: of the run's data: tokens that the weights don't know begin as the mean of the others.
        source: the run or checkpoint folder to load from in its place.
    """
    source = source or train_context.spec.checkpoint.init_from
    assert source is not None, "only a run with checkpoint.init_from loads initial weights"
    # One rank chooses the checkpoint for all: a run that is still training may save a newer one between two ranks'
    # looks.
    newest = open_weights(Path(source))[0].path if train_context.mesh.rank == 0 else ""
    checkpoint = open_whole(Path(train_context.mesh.gather_text(str(newest))[0]))
    verify_together(checkpoint, train_context.mesh)
    if adapter_plan(train_context.spec) is not None:
        load_frozen(train_context.stages.values(), checkpoint.read)
        checkpoint.close()
        return f"frozen weights of {checkpoint.path}"
    read, told = reader_of_weights(checkpoint, train_context.spec, tokenizer)
    value_source = _value_source(train_context.spec)
    if value_source is not None:
        read, more = _with_value_head(read, value_source, train_context)
        told += more
    train_context.optimizer.load(read, 0, weights_only=True)
    checkpoint.close()
    return f"starting from the weights of {checkpoint.path} (step {checkpoint.step}), with a fresh optimizer{told}"


def reader_of_weights(checkpoint: Weights, spec: RunSpec, tokenizer: Tokenizer | None) -> tuple[ReadRange, str]:
    """Return what reads the weights of checkpoint.init_from for a run, and what is told of that, "" for nothing.

    Args:
        tokenizer: as in `load_initial_weights`.
    """
    read: ReadRange = checkpoint.read_range
    told = ""
    former = open_weights(checkpoint.path)[1] / TOKENIZER
    known = Tokenizer.load(former).vocab_size if tokenizer is not None and former.is_file() else 0
    if tokenizer is not None and spec.finetune is not None and 0 < known < tokenizer.vocab_size:
        read = grown_reader(checkpoint, spec.transformer, known)
        told = (
            f"; {counted(tokenizer.vocab_size - known, 'token')} that these don't know begin as the mean of the others"
        )
    return (read if SCORE_WEIGHT in checkpoint.names() else _with_score_head(read, spec.seed)), told


def _with_value_head(read: ReadRange, source: str, train_context: TrainContext) -> tuple[ReadRange, str]:
    """Return `read`, which takes the score head of a reward run, and what is told of that. Collective over the world.

    Ouyang et al. 2022 (appendix C.4) begin the whole value model with the reward model; here its layers are the
    policy's.
    """
    mesh = train_context.mesh
    newest = str(open_weights(Path(source))[0].path) if mesh.rank == 0 else ""
    rewards = open_whole(Path(mesh.gather_text(newest)[0]))
    _check_value_head(rewards, source, train_context.spec)
    verify_together(rewards, mesh)
    weight = rewards.read_global(SCORE_WEIGHT, "weight")
    rewards.close()

    def read_either(name: str, key: str, shard: ShardSpec, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        if name == SCORE_WEIGHT:
            return weight.flatten()[start:stop]
        return read(name, key, shard, shape, start, stop)

    return read_either, f"; the value head begins with that of {rewards.path}"


def _with_score_head(read: ReadRange, seed: int) -> ReadRange:
    """Return `read`, which draws the score head, where the checkpoint has none."""

    def read_or_draw(name: str, key: str, shard: ShardSpec, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        if name == SCORE_WEIGHT:
            return drawn_score_weight(shape[1], seed).flatten()[start:stop]
        return read(name, key, shard, shape, start, stop)

    return read_or_draw


def draws_weights(spec: RunSpec, resumed: Path | None, *, needs_reference: bool = False) -> bool:
    """Return whether a run begins with drawn weights: not where it reads all of them, which then need no numbers.

    Adapters, and a score head beside them, are drawn in any case: they are few, and a reference is taken with them.

    Args:
        resumed: the checkpoint that the run continues; None for a fresh one.
        needs_reference: whether a reference may be computed (again), which is of the drawn weights where the run starts
            from no others.
    """
    if spec.checkpoint.init_from is not None:
        return False
    return resumed is None or needs_reference


def start_from(
    train_context: TrainContext, tokenizer: Tokenizer | None, resumed: Path | None
) -> tuple[TrainContext, str]:
    """Load what a run needs besides the checkpoint that it continues; return its context and a sentence, "" for none.

    Collective over the world.

    Args:
        tokenizer: see `load_initial_weights`.
        resumed: the checkpoint that the run continues; None for a fresh one, which takes the weights of
            checkpoint.init_from.
    """
    if adapter_plan(train_context.spec) is not None:
        return load_base(train_context, resumed)
    if resumed is None and train_context.spec.checkpoint.init_from:
        return train_context, load_initial_weights(train_context, tokenizer)
    return train_context, ""


def load_base(train_context: TrainContext, resumed: Path | None) -> tuple[TrainContext, str]:
    """Load the frozen weights of a run that trains adapters; return the context that names them, and a sentence.

    Collective over the world. Every rank verifies the checksums of a share of the files; if one is damaged all ranks
    raise CheckpointError.

    Args:
        resumed: the checkpoint of the adapters that the run continues, which names its base; None for a fresh run,
            which takes the newest checkpoint of checkpoint.init_from.
    """
    source, mesh = train_context.spec.checkpoint.init_from, train_context.mesh
    assert source is not None, "a rule asks for it"
    record = None if resumed is None else base_of(Checkpoint.open(resumed, verify=False))
    # One rank chooses the checkpoint for all: a run that is still training may save a newer one between two looks.
    chosen = ""
    if mesh.rank == 0:
        chosen = str(open_weights(Path(source))[0].path if record is None else find_base(record, source))
    checkpoint = open_whole(Path(mesh.gather_text(chosen)[0]))
    if record is None and SCORE_WEIGHT in checkpoint.names():
        raise CheckpointError(
            f"{source} has a score head, and beside adapters a score head is learned anew; set checkpoint.init_from to "
            "the model that it was trained from, or leave finetune.adapter out"
        )
    verify_together(checkpoint, mesh)
    load_frozen(train_context.stages.values(), checkpoint.read)
    checkpoint.close()
    base = record or new_base(source, checkpoint.path, checkpoint.digest)
    return replace(train_context, base=base), f"adapters of the frozen weights of {checkpoint.path}"


def _differences(theirs: TransformerConfig, ours: TransformerConfig) -> dict[str, str]:
    """Name -> `model.field: there -> here` of every field in which the two networks differ."""
    there, here = canonical_config(theirs), canonical_config(ours)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return {name: f"model.{name}: {_shown(getattr(theirs, name))} -> {_shown(getattr(ours, name))}" for name in names}


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
