"""The run spec: one validated record of a whole run. Imports no torch."""

from trimaran.runtime.spec.describe import describe
from trimaran.runtime.spec.errors import FieldError, SpecError
from trimaran.runtime.spec.loading import dump_spec, load_spec
from trimaran.runtime.spec.parsing import parse_spec
from trimaran.runtime.spec.rules import check_world_size
from trimaran.runtime.spec.run import RunSpec, diff_specs, fields_at_layout, json_schema
from trimaran.runtime.spec.sections import (
    CheckpointSection,
    DataSection,
    KernelsSection,
    LauncherSection,
    LoggingSection,
    LrScheduleSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    PrecisionSection,
    TrainSection,
    ZeroSection,
)

__all__ = [
    "CheckpointSection",
    "DataSection",
    "FieldError",
    "KernelsSection",
    "LauncherSection",
    "LoggingSection",
    "LrScheduleSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "PrecisionSection",
    "RunSpec",
    "SpecError",
    "TrainSection",
    "ZeroSection",
    "check_world_size",
    "describe",
    "diff_specs",
    "dump_spec",
    "fields_at_layout",
    "json_schema",
    "load_spec",
    "parse_spec",
]
