"""The study: what is known of every trial, from study.jsonl and the trials' run folders. Imports no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Scalar = bool | int | float | str | None
Value = Scalar | tuple[Scalar, ...]
"""A value of a field of the spec; a list of YAML is a tuple."""
State = Literal["running", "complete", "pruned", "diverged", "failed", "invalid"]


class CurvePoint(BaseModel):
    """A held-out loss that a trial measured while it trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    tokens: Annotated[int, Field(description="Tokens seen by then.")]
    held_out_loss: float


class Trial(BaseModel):
    """One trial: the values that it was given, and what came of it.

    Args:
        number: from 0, in the order of the proposals.
        values: by key of the space, a list for fields that move together.
        state: "invalid" is a combination that breaks a rule of the spec, which is never started; a trial that diverged
            is the worst of all, and one that failed has told nothing about its values.
        objectives: in the order of the objectives; None until the trial is complete. That of a pruned trial is what it
            had reached.
        folder: the run folder, relative to the study's.
        attempts: how often it was started again after a crash, plus one.
        tokens: seen by its last step.
        parameters: of its model.
        parameters_without_embeddings: those but the embeddings of tokens and positions and an untied head.
        flops: of its training until its last step.
        curve: its held-out losses in the order of the steps.
        rung: of the ladder.
        error: why it is not complete.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: Annotated[int, Field(ge=0)]
    values: dict[str, Value]
    state: State
    objectives: tuple[float, ...] | None = None
    folder: str
    attempts: int = 1
    tokens: int = 0
    parameters: int = 0
    parameters_without_embeddings: int = 0
    flops: float = 0.0
    curve: tuple[CurvePoint, ...] = ()
    rung: str | None = None
    error: str | None = None
