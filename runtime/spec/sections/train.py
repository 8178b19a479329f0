"""The train, checkpoint and logging sections: how long a run takes, what it saves, and what it writes down."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from trimaran.models.fields import Count, NonNegativeWhole
from trimaran.runtime.spec.errors import show
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, FilePath, Folder
from trimaran.runtime.spec.sections.sinks import Sinks


def _recompute_text(value: object) -> object:
    if type(value) not in (int, str):
        raise ValueError(_wrong_recompute(value))
    return str(value)


def _wrong_recompute(value: object) -> str:
    rule = "must be none, selective, full, or a whole number k from 1 on, for every k-th block"
    return f"{rule}, got {show(value)}; write one of these"


def _check_recompute(text: str) -> str:
    if text in ("none", "selective", "full") or (re.fullmatch(r"[0-9]{1,6}", text) and int(text) > 0):
        return text
    raise ValueError(_wrong_recompute(text))


Recompute = Annotated[str, BeforeValidator(_recompute_text), AfterValidator(_check_recompute)]


class TrainSection(BaseModel):
    """How long, how much at once, and where the results go."""

    model_config = SECTION_CONFIG

    num_steps: NonNegativeWhole = Field(
        default=0,
        description="Optimizer steps of the whole run; 0, or left out, where finetune.epochs says how long it is.",
    )
    global_batch_size: Count = Field(description="Sequences of one optimizer step, over all dp ranks and microbatches.")
    micro_batch_size: Count = Field(description="Sequences one rank computes at once.")
    seq_len: Count = Field(description="Tokens of one sequence.")
    output_dir: Folder = Field(
        default="runs/run", description="Folder of the run; a spec file without it writes to runs/NAME-OF-THE-FILE."
    )
    eval_interval: NonNegativeWhole = Field(
        default=0, description="Steps between evaluations on the held-out text; 0 never evaluates."
    )
    eval_batches: Count = Field(default=4, description="Global batches of one evaluation.")
    recompute: Recompute = Field(
        default="none",
        json_schema_extra={"type": ["string", "integer"]},
        description="What the backward pass computes again to save memory: none, selective (norms, activations, "
        "attention scores), full (all of a block), or k (all of every k-th block).",
    )

    @property
    def recompute_every(self) -> int:
        """Every block whose number is a multiple of this is recomputed as a whole; 0: none is."""
        return {"none": 0, "full": 1}.get(self.recompute) or int(self.recompute if self.recompute.isdigit() else 0)


class CheckpointSection(BaseModel):
    """When training state is saved, and whether a run continues from it."""

    model_config = SECTION_CONFIG

    interval: NonNegativeWhole = Field(default=0, description="Steps between checkpoints; 0 saves only at the end.")
    keep_last: Count = Field(default=2, description="Checkpoints kept; older ones are deleted.")
    resume: bool = Field(default=True, description="Whether to continue when output_dir already has a checkpoint.")
    init_from: FilePath | None = Field(
        default=None,
        description="Run or checkpoint folder whose weights a fresh run starts from (null: random weights).",
    )


class LoggingSection(BaseModel):
    """What is written down while training."""

    model_config = SECTION_CONFIG

    interval: Count = Field(default=1, description="Steps between printed lines; metrics.jsonl has every step.")
    tensorboard: bool = Field(default=True, description="Whether to write TensorBoard events too.")
    sinks: Sinks = Field(
        default=None, description="Trackers that get the numbers too, a list of names or a record of them (null: none)."
    )
    timeline: bool = Field(
        default=True, description="Whether to record the pipeline timeline of the last step (on CPU ranks)."
    )
