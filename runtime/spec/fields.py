"""RunFields: all sections of a run side by side and what follows from them, before the rules that tie them together."""

from typing import Annotated, Any, Final

from pydantic import BaseModel, Field

from trimaran.models.config import TransformerConfig
from trimaran.models.fields import INTEGRAL, Derived
from trimaran.models.presets import PRESETS
from trimaran.runtime.grid import AXES, num_microbatches
from trimaran.runtime.spec.sections import (
    FALLBACKS,
    SECTION_CONFIG,
    CheckpointSection,
    DataSection,
    EvaluationSection,
    FinetuneSection,
    KernelsSection,
    LauncherSection,
    LoggingSection,
    LrScheduleSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    PrecisionSection,
    SlurmSection,
    TrainSection,
    ZeroSection,
)

# Devlin et al. (BERT) 2019, section 3.1; Yang et al. (XLNet) 2019, section 3.1, K = 6.
MASK_FRACTIONS: Final = {"masked_lm": 0.15, "permutation_lm": 1 / 6}
# torch.Generator takes 64 bits; the sign bit is left out so that the number is the same in every language.
Seed = Annotated[int, Field(ge=0, lt=2**63), INTEGRAL]


def num_predicted(objective: str, mask_fraction: float | None, seq_len: int) -> int:
    """Return how many tokens of a sequence are predicted: all, or a fixed share where the objective hides some."""
    if objective not in MASK_FRACTIONS:
        return seq_len
    return max(1, round((MASK_FRACTIONS[objective] if mask_fraction is None else mask_fraction) * seq_len))


class RunFields(BaseModel):
    """A whole run as written down, each field valid by itself."""

    model_config = SECTION_CONFIG

    model: ModelSection = Field(default_factory=ModelSection, description="The network.")
    parallel: ParallelSection = Field(default_factory=ParallelSection, description="How it is cut over the ranks.")
    zero: ZeroSection = Field(default_factory=ZeroSection, description="What the dp ranks share out between them.")
    data: DataSection = Field(default_factory=DataSection, description="The text.")
    optimizer: OptimizerSection = Field(description="The update rule.")
    lr_schedule: LrScheduleSection = Field(
        default_factory=LrScheduleSection, description="The learning rate over the steps."
    )
    precision: PrecisionSection = Field(default_factory=PrecisionSection, description="Number formats.")
    kernels: KernelsSection = Field(default_factory=KernelsSection, description="What computes.")
    train: TrainSection = Field(description="Length, batch and output folder.")
    evaluation: EvaluationSection | None = Field(
        default=None, description="Tasks that are evaluated while it trains (null: none)."
    )
    finetune: FinetuneSection | None = Field(
        default=None, description="Learning from examples, preferences or rewards (null: from text)."
    )
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, description="Saving and resuming.")
    launcher: LauncherSection = Field(default_factory=LauncherSection, description="How processes are started.")
    slurm: SlurmSection = Field(default_factory=SlurmSection, description="What a batch job asks of its cluster.")
    logging: LoggingSection = Field(default_factory=LoggingSection, description="What is written down.")
    seed: Seed = Field(default=1234, description="Seed of weights, dropout and data order.")

    @property
    def world_size(self) -> int:
        """Ranks of the run: tp * pp * dp * cp."""
        return self.parallel.tp * self.parallel.pp * self.parallel.dp * self.parallel.cp

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of every axis of the rank grid, by its name."""
        return {axis: getattr(self.parallel, axis) for axis in AXES}

    @property
    def num_stages(self) -> int:
        """Pipeline stages of the model: pp * virtual_stages."""
        return self.parallel.pp * self.parallel.virtual_stages

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one optimizer step on every dp rank."""
        return num_microbatches(self.train.global_batch_size, self.train.micro_batch_size, self.parallel.dp) or 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.train.global_batch_size * self.train.seq_len

    @property
    def labels_per_sample(self) -> int:
        """Tokens of one sequence that are predicted."""
        return num_predicted(self.transformer.objective, self.data.mask_fraction, self.train.seq_len)

    @property
    def target_tokens_per_step(self) -> int:
        """Tokens that one optimizer step predicts, over all ranks; its loss is their mean."""
        return self.train.global_batch_size * self.labels_per_sample

    @property
    def transformer(self) -> TransformerConfig:
        """The model's shape with preset, overrides and fallbacks resolved."""
        return TransformerConfig.model_validate(_resolve_shape(self)[0])


def draft_transformer(fields: RunFields) -> TransformerConfig:
    """Return the resolved shape without checking it, lacking every attribute that a draft of a spec cannot know.

    A draft is a RunFields without the attributes that were invalid (see parsing.py).
    """
    values, unknown = _resolve_shape(fields)
    # Unknown fields get a value for a moment, so that no default is derived for them.
    placeholders: dict[str, Any] = dict.fromkeys(unknown)
    shape = TransformerConfig.model_construct(set(values), **values, **placeholders)
    for name in unknown:
        del vars(shape)[name]
    return shape


def _resolve_shape(fields: RunFields) -> tuple[dict[str, Any], set[str]]:
    """Return the known values of TransformerConfig, and the fields that an invalid or missing one leaves unknown."""
    section: dict[str, Any] = dict(vars(fields.model)) if "model" in vars(fields) else {}
    if "preset" not in section:
        return {}, set(TransformerConfig.model_fields)
    unknown = {name for name in TransformerConfig.model_fields if name not in section}
    values: dict[str, Any] = dict(PRESETS[section["preset"]]) if section["preset"] else {}
    values |= {name: value for name, value in section.items() if name != "preset" and value is not None}
    for name, path in FALLBACKS.items():
        source_section, _, source = path.partition(".")
        held = vars(vars(fields)[source_section]) if source_section in vars(fields) else {}
        if name not in values and source in held:
            values[name] = held[source]
    for name, field in TransformerConfig.model_fields.items():
        derived = isinstance(field.default_factory, Derived) and unknown.intersection(field.default_factory.sources)
        if name not in values and (field.is_required() or derived):
            unknown.add(name)
    return {name: value for name, value in values.items() if name not in unknown}, unknown
