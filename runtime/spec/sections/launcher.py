"""The launcher section: how the processes are started and meet."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field

from trimaran.models.fields import Count, NonNegativeWhole, Positive
from trimaran.runtime.spec.sections.common import SECTION_CONFIG


def _check_rendezvous(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[\w.-]+", host) or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"must be HOST:PORT, got {text!r}; write one such as n1:29400")
    return text


Rendezvous = Annotated[str, AfterValidator(_check_rendezvous)]


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
        description="Nodes of the run; each gets the same number of ranks (local: the same command is run by hand on "
        "each).",
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
