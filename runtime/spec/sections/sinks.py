"""The record logging.sinks: trackers that get the numbers of a run too, and how each is set up."""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, Field

from trimaran.runtime.spec.errors import show
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, switch

SinkName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
_NAMES: Final = ("tensorboard", "wandb", "mlflow", "trackio")
_Name = Annotated[str, Field(min_length=1, max_length=200)]


class WandbSink(BaseModel):
    """Weights & Biases."""

    model_config = SECTION_CONFIG

    project: _Name = Field(default="trimaran", description="Project that the run is in.")
    entity: _Name | None = Field(default=None, description="User or team of the project (null: wandb's default).")
    name: _Name | None = Field(default=None, description="Name of the run (null: that of its folder).")
    mode: Literal["online", "offline"] | None = Field(
        default=None,
        description="offline: all in RUN/wandb, for `wandb sync` (null: what WANDB_MODE says, or online).",
    )


class MlflowSink(BaseModel):
    """MLflow."""

    model_config = SECTION_CONFIG

    experiment: _Name = Field(default="trimaran", description="Experiment that the run is in.")
    tracking_uri: _Name | None = Field(
        default=None, description="Server or database (null: what MLFLOW_TRACKING_URI says, or mlflow.db right here)."
    )
    name: _Name | None = Field(default=None, description="Name of the run (null: that of its folder).")


class TrackioSink(BaseModel):
    """Trackio."""

    model_config = SECTION_CONFIG

    project: _Name = Field(default="trimaran", description="Project that the run is in.")
    name: _Name | None = Field(
        default=None, description="Name of the run, which four digits make its own (null: that of its folder)."
    )
    space: _Name | None = Field(
        default=None, description="Space of Hugging Face that shows it, as USER/NAME (null: a local database)."
    )


class SinksSection(BaseModel):
    """Trackers by name; each is off unless it is named."""

    model_config = SECTION_CONFIG

    tensorboard: bool = Field(default=False, description="TensorBoard events, which logging.tensorboard writes too.")
    wandb: Annotated[WandbSink | None, switch(WandbSink)] = Field(
        default=None, description="Weights & Biases (null: off; true: on, by its defaults)."
    )
    mlflow: Annotated[MlflowSink | None, switch(MlflowSink)] = Field(
        default=None, description="MLflow (null: off; true: on, by its defaults)."
    )
    trackio: Annotated[TrackioSink | None, switch(TrackioSink)] = Field(
        default=None, description="Trackio (null: off; true: on, by its defaults)."
    )


def _by_name(value: object) -> object:
    """Take a name, or a list of names, for a record in which these are on."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        return value
    wrong = [name for name in names if name not in _NAMES]
    if wrong:
        raise ValueError(f"must be names among {', '.join(_NAMES)}, got {show(wrong[0])}; write one of these")
    return dict.fromkeys(names, True) or None


_Written = SinksSection | SinkName | list[SinkName] | None
Sinks = Annotated[SinksSection | None, BeforeValidator(_by_name, json_schema_input_type=_Written)]
