"""The sections of a run spec: names, types, ranges, defaults and one line about every field.

A section knows only its own fields; whatever relates two fields is a rule in `rules.py`, so that every rule can be
checked at once. The description of a field is its documentation.
"""

import os
import re
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from trimaran.kernels.limits import Backend
from trimaran.models.config import TransformerConfig
from trimaran.models.fields import INTEGRAL, Count, Derived, NonNegative, NonNegativeWhole, Positive
from trimaran.models.presets import check_preset_name
from trimaran.runtime.data.vocabulary import SMALLEST_VOCABULARY
from trimaran.runtime.pipeline.schedules import ScheduleName
from trimaran.runtime.spec.errors import show
from trimaran.runtime.spec.yaml_text import MOST_BYTES
from trimaran.runtime.train.lr_schedule import LrScheduleName

# Only a text with a bound is looked at by pydantic, which then refuses half surrogate pairs too.
SECTION_CONFIG: Final = ConfigDict(frozen=True, extra="forbid", strict=True, str_max_length=MOST_BYTES)

Dtype = Literal["float32", "bfloat16", "float64"]


_MOST_NAME = 255
"""Bytes of a name in a path, on every usual file system."""
_MOST_OWN_NAME = 200
"""Of a folder that a run makes: the names of its lock and of temporary files are longer."""


def _check_path(path: str, most: int = _MOST_NAME) -> str:
    if not path.strip():
        raise ValueError("must name a file or folder, got an empty text; write a path such as runs/first")
    if path != path.strip():
        raise ValueError(f"must not begin or end with a space, got {path!r}; write {path.strip()!r}")
    if "\0" in path:
        raise ValueError(f"must not contain a NUL character, got {path!r}; write a path such as runs/first")
    if path.startswith("~"):
        raise ValueError(
            f"must be a path as it is, because ~ is not expanded, got {path!r}; write the home folder out in full"
        )
    if max(len(name.encode(errors="replace")) for name in path.split("/")) > most:
        raise ValueError(f"must have names of at most {most} bytes, got {show(path)}; write a shorter one")
    return path


def _check_folder(path: str) -> str:
    if os.path.normpath(_check_path(path, _MOST_OWN_NAME)) in (".", "..", "/", "//"):
        raise ValueError(f"must be a folder of its own, got {path!r}; write a path such as runs/first")
    if ".." in path.split("/"):
        raise ValueError(f"must not climb by .., got {path!r}; write the folder out in full")
    return path


def _check_rendezvous(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[\w.-]+", host) or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"must be HOST:PORT, got {text!r}; write one such as n1:29400")
    return text


def _recompute_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) else value


def _check_recompute(text: str) -> str:
    if text in ("none", "full") or (re.fullmatch(r"[0-9]{1,6}", text) and int(text) > 0):
        return text
    raise ValueError(f"must be none, full, or a number k for every k-th block, got {show(text)}; write one of these")


Recompute = Annotated[str, BeforeValidator(_recompute_text), AfterValidator(_check_recompute)]
Folder = Annotated[str, AfterValidator(_check_folder)]
Rendezvous = Annotated[str, AfterValidator(_check_rendezvous)]
FilePath = Annotated[str, AfterValidator(_check_path)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PositiveFraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
TokenizerSize = Annotated[int, Field(ge=SMALLEST_VOCABULARY, le=2**31 - 1), INTEGRAL]


# Where the rest of a run knows a number of the model that it does not give.
FALLBACKS: Final = {"vocab_size": "data.tokenizer_vocab_size", "max_seq_len": "train.seq_len"}


def _overrides() -> dict[str, Any]:
    """Every field of TransformerConfig as one that may be left out: documented as there, null by default."""
    overrides: dict[str, Any] = {}
    for name, field in TransformerConfig.model_fields.items():
        instead = ["the preset's"]
        if name in FALLBACKS:
            instead.append(FALLBACKS[name])
        elif isinstance(field.default_factory, Derived):
            instead.append(field.default_factory.words)
        elif not field.is_required() and field.default is not None:
            instead.append(f"{field.default:g}" if type(field.default) is float else str(field.default).lower())
        description = re.sub(r" \(null: [^()]*\)", "", (field.description or "").rstrip("."))
        annotation: Any = field.rebuild_annotation()
        overrides[name] = (
            annotation | None,
            Field(default=None, description=f"{description} (null: {', or '.join(instead)})."),
        )
    return overrides


_PRESET: Any = (
    Annotated[str, AfterValidator(check_preset_name)] | None,
    Field(default=None, description="Published shape to start from, such as gpt2-124m; the fields below override it."),
)


class ModelSection(create_model("ModelFields", __config__=SECTION_CONFIG, preset=_PRESET, **_overrides())):  # type: ignore[misc]
    """The network: a published shape by name, a shape in numbers, or a preset with some numbers changed."""


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

    stage: NonNegativeWhole = Field(
        default=1,
        json_schema_extra={"maximum": 1},
        description="0: every dp rank holds all of the optimizer state; 1: each holds a share of it.",
    )
    backend: Literal["native"] = Field(default="native", description="Whose implementation does it.")
    bucket_size_mib: Positive = Field(default=25.0, description="Size of one flat gradient buffer, in MiB.")


class DataSection(BaseModel):
    """The text, and how it becomes tokens."""

    model_config = SECTION_CONFIG

    source: Annotated[list[FilePath], Field(min_length=1, max_length=1000)] = Field(
        default_factory=lambda: ["quickstart"],
        description="Files, folders or globs of .txt, .jsonl, .ndjson and .json, also .gz, .bz2 or .xz of them; "
        "quickstart is a small built-in corpus.",
    )
    text_field: Annotated[str, Field(min_length=1)] = Field(
        default="text", description="Key of the text in a JSON record."
    )
    max_lost_fraction: Fraction = Field(
        default=0.05,
        description="Largest share of the files, documents or characters that may be passed over, left out or replaced "
        "for one reason.",
    )
    cache_dir: Folder = Field(
        default=".cache/trimaran", description="Folder for downloaded text, tokenizers and token shards."
    )
    tokenizer: FilePath | None = Field(
        default=None,
        description="Existing tokenizer.json to use (null: that of checkpoint.init_from, or train one on the source).",
    )
    end_of_text: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Token of data.tokenizer that ends a document (null: the one that the files beside it name, or one "
        "with a usual name).",
    )
    tokenizer_vocab_size: TokenizerSize = Field(
        default=4096, description="Tokens of the tokenizer that is trained on the source."
    )
    held_out_fraction: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        default=0.02, description="Share of the text kept out of training, for evaluation."
    )
    mask_fraction: PositiveFraction | None = Field(
        default=None,
        description="masked_lm, permutation_lm: share of a sample's tokens that is predicted (null: 0.15, Devlin et "
        "al. 2019; 1/6, Yang et al. 2019).",
    )
    shuffle: bool = Field(
        default=True, description="Whether the samples of an epoch are drawn in a seeded random order."
    )


class OptimizerSection(BaseModel):
    """AdamW (Loshchilov and Hutter 2019) and gradient clipping."""

    model_config = SECTION_CONFIG

    name: Literal["adamw"] = Field(default="adamw", description="Update rule.")
    lr: Positive = Field(description="Peak learning rate.")
    beta1: Beta = Field(default=0.9, description="Decay of the running mean of the gradient.")
    beta2: Beta = Field(default=0.95, description="Decay of the running mean of the squared gradient.")
    eps: Positive = Field(default=1e-8, description="Added to the root of the second moment.")
    weight_decay: NonNegative = Field(
        default=0.1, description="Decoupled weight decay of matrices; biases and norms have none."
    )
    max_grad_norm: NonNegative = Field(default=1.0, description="Global gradient norm to clip to; 0 does not clip.")


class LrScheduleSection(BaseModel):
    """The learning rate over the steps: a linear warmup, then one of six shapes."""

    model_config = SECTION_CONFIG

    name: LrScheduleName = Field(default="cosine", description="Shape after the warmup; wsd is warmup, stable, decay.")
    warmup_steps: NonNegativeWhole = Field(default=0, description="Steps of linear warmup.")
    min_lr_ratio: Fraction = Field(default=0.1, description="Lowest learning rate, as a share of optimizer.lr.")
    decay_steps: Count | None = Field(
        default=None,
        description="Step at which cosine, linear or wsd reach the lowest rate, warmup included (null: "
        "train.num_steps).",
    )
    step_interval: Count | None = Field(default=None, description="step: steps between two drops.")
    step_gamma: PositiveFraction = Field(default=0.1, description="step: factor of every drop.")
    decay_rate: PositiveFraction | None = Field(default=None, description="exponential: factor of every step.")
    wsd_decay_fraction: PositiveFraction = Field(
        default=0.2, description="wsd: share of decay_steps that the final decay takes."
    )


class PrecisionSection(BaseModel):
    """Number formats."""

    model_config = SECTION_CONFIG

    dtype: Dtype = Field(
        default="float32",
        description="Format of parameters and compute; bfloat16 keeps float32 main parameters and gradients.",
    )


class KernelsSection(BaseModel):
    """Which implementation of the fused operations computes."""

    model_config = SECTION_CONFIG

    backend: Backend = Field(
        default="auto",
        description="auto takes Triton's kernels on a GPU and torch's elsewhere; triton is an error where they can't "
        "run.",
    )
    deterministic: bool = Field(
        default=True,
        description="Whether Triton's kernels give the same bits every time; false lets attention's backward pass use "
        "atomics.",
    )


class TrainSection(BaseModel):
    """How long, how much at once, and where the results go."""

    model_config = SECTION_CONFIG

    num_steps: Count = Field(description="Optimizer steps of the whole run.")
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
        description="Blocks whose activations are computed again in the backward pass, to save memory: none, full "
        "(all), or k (every k-th).",
    )

    @property
    def recompute_every(self) -> int:
        """Every block whose number is a multiple of this is recomputed; 0: none is."""
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


class LauncherSection(BaseModel):
    """How the processes are started."""

    model_config = SECTION_CONFIG

    kind: Literal["local", "slurm", "mpi"] = Field(
        default="local",
        description="local starts all ranks on this machine, mpi does so by mpirun, slurm submits a batch job.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="auto takes a GPU for every rank where the hosts have GPUs, else the CPU; too few GPUs are an "
        "error.",
    )
    threads_per_rank: Count | None = Field(
        default=None, description="CPU threads of every rank (null: the cores shared out evenly)."
    )
    timeout_s: Positive = Field(default=300.0, description="Longest wait of any collective or receive, in seconds.")
    max_restarts: NonNegativeWhole = Field(
        default=0, description="How often the ranks start anew after one has failed, from the last checkpoint."
    )
    nodes: Count = Field(
        default=1,
        description="local: the nodes on each of which the same command is run by hand (under slurm it is "
        "slurm.nodes).",
    )
    rendezvous: Rendezvous | None = Field(
        default=None, description="local with several nodes: HOST:PORT of one of them, free there, at which they meet."
    )
    start_timeout_s: Positive = Field(
        default=120.0,
        description="When the ranks meet: longest wait for rank 0 or another node since its last sign of life, in "
        "seconds.",
    )
    interface: str | None = Field(
        default=None, description="Network interface by which nodes reach each other, such as ib0 (null: found)."
    )


class LoggingSection(BaseModel):
    """What is written down while training."""

    model_config = SECTION_CONFIG

    interval: Count = Field(default=1, description="Steps between printed lines; metrics.jsonl has every step.")
    tensorboard: bool = Field(default=True, description="Whether to write TensorBoard events too.")
    timeline: bool = Field(
        default=True, description="Whether to record the pipeline timeline of the last step (on CPU ranks)."
    )
