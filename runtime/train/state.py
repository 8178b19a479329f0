"""TrainState: the progress of a run. One object is saved, one is loaded, at any layout.

Random numbers are drawn by counter, so (seed, consumed samples) is the whole state of the generator and of the data
order.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from trimaran.runtime.checkpoint.base import base_of, find_base
from trimaran.runtime.checkpoint.folder import find_checkpoints, latest, what_to_do
from trimaran.runtime.checkpoint.manifest import CheckpointError
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.checkpoint.store import save
from trimaran.runtime.data.tokens.build import CHANGED
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec, SpecError, diff_specs, parse_spec
from trimaran.runtime.spec.errors import show
from trimaran.runtime.train.samples import TrainingData
from trimaran.runtime.train.train_context import TrainContext

# Fields that decide what the numbers in a checkpoint mean. All others may change between two starts of a run; of
# data.source and data.tokenizer the content is compared, which may have moved.
_FIXED = (
    "model.",
    "seed",
    "train.seq_len",
    "optimizer.name",
    "data.text_field",
    "data.end_of_text",
    "data.tokenizer_vocab_size",
    "data.held_out_fraction",
    "data.shuffle",
    "data.format",
    "finetune.method",
    "finetune.chat_template",
    "finetune.loss_on",
    "finetune.packing",
    "finetune.truncation",
    "finetune.preference.loss",
    "finetune.preference.reference",
    *(f"finetune.adapter{name}" for name in (":", ".rank", ".alpha", ".targets", ".scaling", ".base")),
    "finetune.rl.algorithm",
    "finetune.rl.group_size",
    "finetune.rl.prompts_per_step",
    "finetune.rl.epochs",
    "finetune.rl.minibatches",
)


_OPTIMIZER_STEPS = "optimizer_steps"
"""Key of the steps that the optimizer has taken, from which it corrects the bias of its moments."""


@dataclass(frozen=True)
class TrainState:
    """Steps finished, tokens and samples consumed, and the digest of the data.

    Weights and moments are in the optimizer.
    """

    step: int = 0
    tokens_seen: int = 0
    consumed_samples: int = 0
    data: str = ""

    def after_step(self, spec: RunSpec) -> "TrainState":
        """Return the state one optimizer step later."""
        samples = spec.train.global_batch_size
        tokens = self.tokens_seen + samples * spec.train.seq_len
        return replace(self, step=self.step + 1, tokens_seen=tokens, consumed_samples=self.consumed_samples + samples)


def fingerprint(data: TrainingData) -> str:
    """Return a digest that identifies prepared data: of the training tokens and of the tokenizer."""
    manifest = data.manifest
    parts = [manifest["tokenizer"]["sha256"], *(shard["sha256"] for shard in manifest["splits"]["train"]["shards"])]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def check_same_data(state: TrainState, data: TrainingData) -> None:
    """Raise where a run would continue from `state` with other data.

    Raises:
        ValueError: the training text or the tokenizer is not the one of the checkpoint.
    """
    if state.data != fingerprint(data):
        raise ValueError(
            "the files of data.source (or data.tokenizer) "
            + CHANGED.format(since=f"the checkpoint of step {state.step}")
        )


def checkpoints_of(spec: RunSpec) -> Path:
    """Return the folder of the run's checkpoints."""
    return Path(spec.train.output_dir) / "checkpoints"


def save_state(train_context: TrainContext, state: TrainState) -> Path:
    """Write the checkpoint of `state` and return its folder. Collective over the world."""
    spec, mesh = train_context.spec, train_context.mesh
    record = {
        **asdict(state),
        _OPTIMIZER_STEPS: train_context.optimizer.num_steps,
        "seed": spec.seed,
        "layout": dict(spec.parallel.model_dump()),
        "spec": spec.model_dump(mode="json"),
        **(train_context.base.as_state() if train_context.base is not None else {}),
    }
    keep_last = spec.checkpoint.keep_last
    return save(
        checkpoints_of(spec),
        state.step,
        train_context.optimizer.pieces(),
        record,
        rank=mesh.rank,
        world_size=mesh.world_size,
        gather=mesh.gather_text,
        keep_last=keep_last,
    )


def resume_path(spec: RunSpec) -> Path | None:
    """Return the checkpoint to continue from, None for a fresh start.

    Raises:
        CheckpointError: every checkpoint of the run is damaged, or one exists and checkpoint.resume is off.
        ValueError: this spec may not continue the checkpoint; shows the differences.
    """
    folder = checkpoints_of(spec)
    path = latest(folder)
    if path is None:
        broken = [f"{found.path.name}: {found.broken}" for found in find_checkpoints(folder)]
        if broken and spec.checkpoint.resume:
            raise CheckpointError(
                f"no checkpoint in {folder} is whole, so the run can't be resumed: "
                f"{'; '.join(broken)}; remove them to start anew"
            )
        return None
    if not spec.checkpoint.resume:
        raise CheckpointError(
            f"{path} is there already and checkpoint.resume is false; "
            "choose another train.output_dir, remove the folder, or resume"
        )
    checkpoint = Checkpoint.open(path, verify=False)
    if not any("exp_avg" in checkpoint.keys(name) for name in checkpoint.names()[:1]):
        raise CheckpointError(
            f"{path} holds weights alone, as `trimaran import` makes them, and no training state to resume; "
            f"set checkpoint.init_from to {spec.train.output_dir} and train.output_dir to another folder"
        )
    changed_fields(checkpoint, spec)
    base = base_of(checkpoint)
    if base is not None:
        find_base(base, spec.checkpoint.init_from)
    return path


def changed_fields(checkpoint: Checkpoint, spec: RunSpec) -> list[str]:
    """Return the differences `field: old -> new` between the checkpoint's spec and this one, all of which are allowed.

    Raises:
        ValueError: one of them changes what the checkpoint's numbers mean.
    """
    former = spec_of(checkpoint)
    if spec.finetune is not None and former.transformer.vocab_size > spec.transformer.vocab_size:
        # The tokens of a chat template were added when the run began, and are again before it goes on.
        model = {"model": former.model.model_copy(update={"vocab_size": spec.model.vocab_size})}
        former = former.model_copy(update=model)
    differences = diff_specs(former, spec)
    refused = [line for line in differences if line.startswith(_FIXED)]
    if refused:
        shown = "\n  ".join(refused)
        raise ValueError(
            f"train.output_dir {spec.train.output_dir} holds another run, with a checkpoint of step {checkpoint.step}; "
            "choose another train.output_dir for a new run, or undo these changes of fields that can't change within "
            f"a run:\n  {shown}"
        )
    return differences


class Saved(Protocol):
    """What `spec_of` reads of an open checkpoint."""

    @property
    def step(self) -> int:
        """Training step."""

    @property
    def state(self) -> dict[str, Any]:
        """The JSON state."""


def spec_of(checkpoint: Saved) -> RunSpec:
    """Return the run spec stored in a checkpoint.

    Raises:
        CheckpointError: it has none, or one that this version can't read.
    """
    raw = checkpoint.state.get("spec", {})
    try:
        return parse_spec(raw if isinstance(raw, dict) else {})
    except SpecError as error:
        raise CheckpointError(
            f"the spec stored in the checkpoint of step {checkpoint.step} can't be read: {error}"
        ) from error


def read_state(path: Path) -> TrainState:
    """Return the TrainState of the checkpoint at `path`, without its weights.

    Raises:
        CheckpointError: the checkpoint is not complete, or not one of a training run.
    """
    checkpoint = Checkpoint.open(path, verify=False)
    stored = checkpoint.state
    missing = [each.name for each in fields(TrainState) if each.name not in stored]
    if missing:
        raise CheckpointError(f"{path} was not saved by `trimaran train`: its state has no {', '.join(missing)}")
    for name in ("tokens_seen", "consumed_samples", _OPTIMIZER_STEPS):
        if name in stored and (type(stored[name]) is not int or not 0 <= stored[name] < 2**62):
            raise CheckpointError(
                f"{path}: {name} must be a whole number from 0 to 2**62, got {show(stored[name])}; {what_to_do(path)}"
            )
    return TrainState(checkpoint.step, stored["tokens_seen"], stored["consumed_samples"], str(stored["data"]))


def load_state(train_context: TrainContext, path: Path) -> TrainState:
    """Load weights and moments of the checkpoint at `path`, whatever layout wrote it. Collective over the world.

    Every rank verifies the checksums of a share of the files; if one is damaged all ranks raise CheckpointError.
    """
    checkpoint = Checkpoint.open(path, verify=False)
    verify_together(checkpoint, train_context.mesh)
    state = read_state(path)
    # Before the optimizer counted its own steps, they were the run's.
    train_context.optimizer.load(checkpoint.read_range, checkpoint.state.get(_OPTIMIZER_STEPS, checkpoint.step))
    checkpoint.close()
    return state


class Verified(Protocol):
    """What `verify_together` reads of an open checkpoint."""

    @property
    def files(self) -> list[str]:
        """Names of the files."""

    def verify_files(self, files: Iterable[str]) -> None:
        """Compare files with their digests."""


def verify_together(checkpoint: Verified, mesh: Mesh) -> None:
    """Check every file's checksum, each file on one rank; all ranks raise any rank's error.

    Collective over the world.
    """
    problem = ""
    try:
        checkpoint.verify_files(checkpoint.files[mesh.rank :: mesh.world_size])
    except CheckpointError as error:
        problem = str(error)
    found = [text for text in mesh.gather_text(problem) if text]
    if found:
        raise CheckpointError(found[0])
