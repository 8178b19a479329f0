"""What each rank does: join the group that torchrun's environment describes, build the mesh, do the task.

The one place that calls `init_process_group`.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from trimaran.launchers.generate_task import GenerateTask, run_generate
from trimaran.launchers.local import STOPPED_EXIT_CODE, threads_per_rank
from trimaran.runtime.data.prepare import open_prepared
from trimaran.runtime.mesh import Mesh, build_mesh
from trimaran.runtime.spec import RunSpec, check_world_size, load_spec
from trimaran.runtime.train.loop import train


class TrainTask(BaseModel):
    """Train the run of a spec file on data that was prepared before."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["train"] = "train"
    spec: Path
    data: Path


Task = TrainTask | GenerateTask


def run_train(task: TrainTask, spec: RunSpec, mesh: Mesh, device: torch.device) -> int:
    """Train; return the exit code."""
    state = train(spec, mesh, device, open_prepared(task.data))
    return 0 if state.step >= spec.train.num_steps else STOPPED_EXIT_CODE


def read_task(path: Path) -> Task:
    """Read the task that the launcher wrote."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return TrainTask.model_validate(raw) if raw["kind"] == "train" else GenerateTask.model_validate(raw)


def join_world(spec: RunSpec, device: torch.device) -> Mesh:
    """Join the default process group that the environment describes (a world of one needs none) and build the mesh.

    Raises:
        SpecError: the number of ranks is not that of the spec's layout.
    """
    alone = "RANK" not in os.environ  # no launcher started this process, whatever else the shell exports
    check_world_size(spec, 1 if alone else int(os.environ["WORLD_SIZE"]))
    timeout_s = spec.launcher.timeout_s
    backend = "nccl" if device.type == "cuda" else "gloo"
    if alone:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    parallel = spec.parallel
    return build_mesh(
        pp=parallel.pp,
        dp=parallel.dp,
        cp=parallel.cp,
        tp=parallel.tp,
        ep=parallel.ep,
        timeout_s=timeout_s,
        shared_memory=parallel.shared_memory,
    )


def choose_device(wish: Literal["auto", "cpu", "cuda"], local_rank: int, local_world_size: int) -> torch.device:
    """Return this rank's device: a GPU of its own where "auto" finds enough for every rank of the host, else the CPU.

    Raises:
        ValueError: "cuda" is asked for and the host has fewer GPUs than ranks.
    """
    num_gpus = torch.cuda.device_count() if wish != "cpu" else 0
    if num_gpus < local_world_size:
        if wish == "cuda":
            raise ValueError(
                f"launcher.device is cuda, and this host has {num_gpus} GPUs for {local_world_size} ranks; lower parallel.tp, pp or dp, "
                "or set launcher.device to auto or cpu"
            )
        if num_gpus and local_rank == 0:
            print(f"{local_world_size} ranks on a host with {num_gpus} GPUs: training on the CPU", file=sys.stderr)
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def run_task(task: Task) -> int:
    """Do the task on this rank, leave the group together with the others, and return the exit code of the process."""
    spec = load_spec(task.spec)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads_per_rank(spec, local_world_size))
    device = choose_device(spec.launcher.device, int(os.environ.get("LOCAL_RANK", "0")), local_world_size)
    mesh = join_world(spec, device)
    exit_code = run_train(task, spec, mesh, device) if isinstance(task, TrainTask) else run_generate(task, spec, mesh, device)
    # A rank that exits with a code makes the agent end the others, which must not still be writing. After an error nobody comes here:
    # leaving the groups in order would wait for peers that wait for this rank.
    mesh.gather_text("")
    mesh.close()
    dist.destroy_process_group()
    return exit_code
