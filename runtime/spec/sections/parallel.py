"""The parallel and zero sections: how model, batch and training state are shared out between the ranks."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from trimaran.models.fields import INTEGRAL, Count, Positive
from trimaran.runtime.pipeline.schedules import ScheduleName
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, FilePath


class ParallelSection(BaseModel):
    """How the model and the batch are cut over the ranks; tp * pp * dp * cp ranks in all."""

    model_config = SECTION_CONFIG

    tp: Count = Field(default=1, description="Tensor-parallel degree: ranks that share every matrix of a layer.")
    pp: Count = Field(default=1, description="Pipeline-parallel degree: ranks that share the layers.")
    dp: Count = Field(default=1, description="Data-parallel degree: replicas that share the batch.")
    cp: Count = Field(
        default=1,
        json_schema_extra={"maximum": 1},
        description="Context-parallel degree: ranks that share a sequence (only 1 is built yet).",
    )
    ep: Count = Field(
        default=1,
        description="Expert-parallel degree: data-parallel ranks that share the experts between them; divides dp.",
    )
    virtual_stages: Count = Field(
        default=1,
        description="Stages each pipeline rank holds: any number with schedule interleaved_1f1b, 2 with zbv and "
        "dualpipev, else 1.",
    )
    schedule: ScheduleName = Field(
        default="1f1b",
        description="Order of forward and backward microbatches on the pipeline ranks (docs/parallelism.md).",
    )
    schedule_file: FilePath | None = Field(
        default=None,
        description="CSV file of a pipeline schedule, a line for each pipeline rank (docs/parallelism.md), in place of "
        "schedule.",
    )
    uneven_heads: bool = Field(
        default=False,
        description="Whether the last tp rank may hold fewer heads than the others (heads of zeros fill up).",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Whether norms and dropout between tensor-parallel blocks keep only seq_len / tp positions a rank.",
    )
    shared_memory: bool = Field(
        default=True,
        description="Whether CPU ranks of one host exchange tensors through shared memory (false: always through "
        "gloo).",
    )
    layers_per_stage: Annotated[list[Count], Field(min_length=1, max_length=1000)] | None = Field(
        default=None, description="Layers of every stage, pp * virtual_stages numbers (null: balanced by cost)."
    )


class ZeroSection(BaseModel):
    """How much of the training state the dp ranks share out between them."""

    model_config = SECTION_CONFIG

    stage: Annotated[int, Field(ge=0, le=3), INTEGRAL] = Field(
        default=1,
        description="What the dp ranks share out: 0 nothing; 1 the optimizer's state; 2 also gradients; 3 also "
        "parameters.",
    )
    shard_size: Count | None = Field(
        default=None,
        description="Consecutive dp ranks that share out the state; replicas of that share repeat it (null: all dp "
        "ranks).",
    )
    backend: Literal["native", "deepspeed"] = Field(default="native", description="Whose implementation does it.")
    offload: Literal["none", "cpu"] = Field(
        default="none",
        description="cpu: the host keeps and updates float32 weights and optimizer state (backend deepspeed).",
    )
    bucket_size_mib: Positive = Field(default=25.0, description="Size of one flat gradient buffer, in MiB.")
