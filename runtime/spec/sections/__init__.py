"""The sections of a run spec: names, types, ranges, defaults and one line about every field.

A section knows only its own fields; whatever relates two fields is a rule (`rules/`), so that every rule can be
checked at once. The description of a field is its documentation.
"""

from trimaran.runtime.spec.sections.common import SECTION_CONFIG
from trimaran.runtime.spec.sections.compute import KernelsSection, PrecisionSection
from trimaran.runtime.spec.sections.data import DataSection
from trimaran.runtime.spec.sections.evaluation import EvaluationSection
from trimaran.runtime.spec.sections.finetune import FinetuneSection
from trimaran.runtime.spec.sections.launcher import LauncherSection
from trimaran.runtime.spec.sections.model import FALLBACKS, ModelSection
from trimaran.runtime.spec.sections.optimizer import LrScheduleSection, OptimizerSection
from trimaran.runtime.spec.sections.parallel import ParallelSection, ZeroSection
from trimaran.runtime.spec.sections.recipe.corpora import CorpusSection, StageSection
from trimaran.runtime.spec.sections.slurm import SlurmSection
from trimaran.runtime.spec.sections.train import CheckpointSection, LoggingSection, TrainSection

__all__ = [
    "FALLBACKS",
    "SECTION_CONFIG",
    "CheckpointSection",
    "CorpusSection",
    "DataSection",
    "EvaluationSection",
    "FinetuneSection",
    "KernelsSection",
    "LauncherSection",
    "LoggingSection",
    "LrScheduleSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "PrecisionSection",
    "SlurmSection",
    "StageSection",
    "TrainSection",
    "ZeroSection",
]
