"""The section `evaluation`: tasks that are evaluated while a run trains."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from trimaran.models.fields import Count, NonNegativeWhole
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, FilePath

TaskName = Annotated[str, Field(min_length=1, max_length=1000)]


class EvaluationSection(BaseModel):
    """Tasks that are evaluated while a run trains, as `trimaran evaluate` does after it."""

    model_config = SECTION_CONFIG

    tasks: Annotated[list[TaskName], Field(min_length=1, max_length=1000)] = Field(
        description="Names of tasks, or files of own ones in YAML."
    )
    data: FilePath | None = Field(
        default=None, description="Folder of the tasks' data (null: where lm-eval has cached it)."
    )
    interval: NonNegativeWhole = Field(default=0, description="Steps between evaluations; 0 evaluates only at the end.")
    limit: Count | None = Field(default=None, description="Documents of each task (null: all).")
    num_fewshot: NonNegativeWhole | None = Field(
        default=None, description="Examples before each question (null: as many as the task says)."
    )
    batch_size: Count | Literal["auto"] = Field(
        default="auto", description="Requests that are computed at once; auto fills the memory."
    )
