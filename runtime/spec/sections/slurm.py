"""The slurm section of a run spec: what a batch job asks of its cluster."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field

from trimaran.models.fields import Count, NonNegative, NonNegativeWhole
from trimaran.runtime.spec.sections.common import SECTION_CONFIG

# A value of an #SBATCH line: no space, quote or control character, which would end the value or begin another option.
_WORD = re.compile(r"[A-Za-z0-9_.,:;@%+/\[\]()&|*!=~^-]+")
_TIME = re.compile(r"\d+|\d+:\d{1,2}(:\d{1,2})?|\d+-\d{1,2}(:\d{1,2}){0,2}|infinite", re.IGNORECASE)
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)


def _check_word(word: str) -> str:
    if not _WORD.fullmatch(word):
        raise ValueError(f"must be one word as sbatch takes it, without spaces, quotes and dollar signs, got {word!r}")
    return word


def _check_time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise ValueError(f"must be a time limit such as 90 (minutes), 12:00:00 or 2-00:00:00, got {text!r}")
    return text


def _check_memory(text: str) -> str:
    if not _MEMORY.fullmatch(text):
        raise ValueError(f"must be an amount of memory such as 64G, got {text!r}")
    return text


def _check_line(line: str) -> str:
    if re.search(r"[\n\r\0]", line):
        raise ValueError(f"must be one line, got {line!r}; write several entries")
    return line


def _check_option(option: str) -> str:
    if not re.fullmatch(r"--?[A-Za-z][A-Za-z0-9-]*(=.+)?", _check_line(option)):
        raise ValueError(f"must be an option of sbatch such as --comment=nightly, got {option!r}")
    return option


Word = Annotated[str, AfterValidator(_check_word)]
Line = Annotated[str, AfterValidator(_check_line)]
Option = Annotated[str, AfterValidator(_check_option)]
TimeLimit = Annotated[str, AfterValidator(_check_time)]
Memory = Annotated[str, AfterValidator(_check_memory)]


class SlurmSection(BaseModel):
    """The batch job of `trimaran train --launcher slurm`."""

    model_config = SECTION_CONFIG

    partition: Word | None = Field(
        default=None, description="Partition (null: the cluster's default, as for every field here)."
    )
    account: Word | None = Field(default=None, description="Account that pays.")
    qos: Word | None = Field(default=None, description="Quality of service.")
    tasks: Literal["rank", "node"] = Field(
        default="rank",
        description="What a Slurm task is: one rank, or a node with torchrun's agent, which starts its ranks.",
    )
    gpus_per_node: NonNegativeWhole = Field(default=0, description="GPUs of a node (gres gpu).")
    cpus_per_task: Count | None = Field(default=None, description="CPUs of a task.")
    memory: Memory | None = Field(default=None, description="Memory of a node, such as 64G.")
    time: TimeLimit | None = Field(default=None, description="Time limit, such as 12:00:00.")
    constraint: Word | None = Field(default=None, description="Features that nodes must have.")
    exclude: Word | None = Field(default=None, description="Nodes not to use, such as n[3-5].")
    reservation: Word | None = Field(default=None, description="Reservation to run in.")
    modules: Annotated[list[Line], Field(max_length=100)] = Field(
        default=[], description="Environment modules to load, in order."
    )
    container: Line | None = Field(
        default=None, description="Image to run the ranks in: a .sif file by apptainer, else by srun's pyxis."
    )
    prolog: Annotated[list[Line], Field(max_length=100)] = Field(
        default=[], description="Shell lines of the script before the ranks start, such as exports."
    )
    options: Annotated[list[Option], Field(max_length=100)] = Field(
        default=[], description="Further options of sbatch, such as --comment=nightly."
    )
    requeue: bool = Field(
        default=True, description="Whether the job goes on in the queue after its time limit or a lost node."
    )
    signal_lead_s: NonNegativeWhole = Field(
        default=120, description="Seconds before the time limit at which the ranks save and leave."
    )
    preflight_min_free_gib: NonNegative | None = Field(
        default=1.0,
        description="Free disk of the run folder, in GiB, that the preflight of every node asks for before the ranks "
        "start (null: no preflight).",
    )

    @property
    def place(self) -> dict[str, str]:
        """Options of sbatch and srun that say where and for how long a job runs, of those that are given."""
        names = ("partition", "account", "qos", "constraint", "exclude", "reservation", "time")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
