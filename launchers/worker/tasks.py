"""The tasks of ranks as records, reading a task file, and the two sources from which a rank gets its task. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from trimaran.runtime.evaluate.options import EvaluationOptions
from trimaran.runtime.files import read_json
from trimaran.runtime.infer.sampling_params import SamplingParams


class TrainTask(BaseModel):
    """Train the run of a spec file on prepared data."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["train"] = "train"
    spec: Path
    data: Path


class TaskPrompt(BaseModel):
    """One prompt as token ids.

    Args:
        text: as the user gave it, None where the user gave messages.
        name: its name in the file of prompts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    tokens: tuple[int, ...]
    text: str | None
    is_chat: bool
    name: str | int | None


class GenerateTask(BaseModel):
    """Continue prompts from a checkpoint of any layout; `spec` has the layout of the ranks.

    Args:
        as_json: print each result as a line of JSON; otherwise there is one prompt, and its text is streamed.
        output: a file for what else goes to standard output.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["generate"] = "generate"
    spec: Path
    checkpoint: Path
    tokenizer: Path
    prompts: tuple[TaskPrompt, ...]
    sampling: SamplingParams
    stop_strings: tuple[str, ...]
    batch_size: int
    as_json: bool
    output: Path | None = None


class EvaluateTask(BaseModel):
    """Evaluate a model; `spec` has the layout of the ranks.

    Args:
        model: a checkpoint folder, or the folder of a Hugging Face model.
        name: the run or the model's folder, as the user has named it.
        folder: where the results and the journal are written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["evaluate"] = "evaluate"
    spec: Path
    model: Path
    name: Path
    folder: Path
    options: EvaluationOptions


class ScoreTask(BaseModel):
    """Score examples by a reward model; `spec` has the layout of the ranks.

    Args:
        examples: folder of the tokens to score.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["score"] = "score"
    spec: Path
    checkpoint: Path
    examples: Path


class CalibrateTask(BaseModel):
    """Measure the machine; `spec` has the number of ranks.

    Args:
        output: the file of the points.
        is_smoke: whether as little as possible is measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["calibrate"] = "calibrate"
    spec: Path
    output: Path
    dtypes: tuple[str, ...]
    is_smoke: bool


class ServeTask(BaseModel):
    """Continue texts for who listens at a socket; `spec` has the layout of the ranks.

    Args:
        model: a checkpoint folder, or the folder of a Hugging Face model.
        socket: to which the leader of each dp replica connects.
        slots: texts that a replica continues at the same time.
        context: most tokens of a prompt and its continuation; None for the model's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["serve"] = "serve"
    spec: Path
    model: Path
    socket: Path
    slots: int
    context: int | None


Task = TrainTask | GenerateTask | EvaluateTask | ScoreTask | CalibrateTask | ServeTask
_KINDS: Final[dict[str, type[Task]]] = {
    "train": TrainTask,
    "generate": GenerateTask,
    "evaluate": EvaluateTask,
    "score": ScoreTask,
    "calibrate": CalibrateTask,
    "serve": ServeTask,
}


def read_task(path: Path) -> Task:
    """Read the task file that the launcher, or rank 0, wrote."""
    try:
        raw = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no whole task file ({error}); start the run anew") from error
    return _KINDS[raw["kind"]].model_validate(raw)


@dataclass(frozen=True)
class TaskFile:
    """A task that is known before the ranks meet.

    Args:
        path: its file; all ranks can read and write the folder.
        logs: the folder of this start, in which each rank keeps its records.
        spare: where it keeps them if that disk is full; None: nowhere.
    """

    path: Path
    logs: Path
    spare: Path | None = None


@dataclass(frozen=True)
class SpecFile:
    """The spec of a run whose ranks another launcher starts: rank 0 prepares the run and writes the task.

    Args:
        allow_code: whether rewards may run the files that they name.
    """

    path: Path
    overrides: Sequence[str]
    allow_code: bool = True
