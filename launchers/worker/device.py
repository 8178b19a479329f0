"""A rank's device and CPU threads, and the check that all ranks agree on them before they join a process group."""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from trimaran.launchers.rendezvous.fingerprint import check_same_everywhere
from trimaran.runtime.processes import quota_of_cores, this_machine
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.train_context import kernels_of

_HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES by which a person, or Slurm, hides all GPUs


class DeviceError(ValueError):
    """The ranks can't have the devices that the run needs; the message says which rank, and what to change."""


@dataclass(frozen=True)
class Resources:
    """What one rank has; compared with the others' through the store.

    Args:
        where: host and coordinates of the rank.
        machine: equal for ranks of one host.
        device: "cuda" or "cpu"; backend: of its process groups; kernels: those that compute.
        gpu: what no other GPU is called, "" for a CPU rank; gpu_name: its product name.
        num_gpus: that torch sees.
        cores: bit mask of the cores that the rank may use, in hexadecimal.
        quota: cores' time of its control group, None for no bound.
    """

    where: str
    machine: str
    device: str
    backend: str
    dtype: str
    kernels: str
    gpu: str
    gpu_name: str
    num_gpus: int
    cores: str
    quota: int | None


def choose_device(
    wish: Literal["auto", "cpu", "cuda"],
    local_rank: int,
    local_world_size: int,
    environment: Mapping[str, str] = os.environ,
) -> torch.device:
    """Return this rank's device, a GPU where there is one.

    Where torch sees fewer GPUs than there are ranks on the host, each rank may have one of its own (Slurm's
    --gpus-per-task=1): `check_resources` finds ranks that share one.

    Raises:
        DeviceError: the rank has no GPU, though `wish` is "cuda" or the host has some.
    """
    if wish == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        there = [] if environment.get("CUDA_VISIBLE_DEVICES", "all") in _HIDDEN else _gpus_of_host()
        if wish == "auto" and not there:
            return torch.device("cpu")
        had = f"this host has {len(there)} GPUs, and" if there else "launcher.device is cuda, and"
        raise DeviceError(
            f"{had} torch {torch.__version__} sees none of them here: {_why_unseen()}; give the ranks GPUs "
            "(slurm.gpus_per_node, CUDA_VISIBLE_DEVICES), or set launcher.device to cpu"
        )
    device = torch.device("cuda", local_rank if local_world_size <= num_gpus else local_rank % num_gpus)
    torch.cuda.set_device(device)
    return device


def _gpus_of_host() -> list[str]:
    return sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))


def _why_unseen() -> str:
    if torch.version.cuda is None:
        return "it is built for CPUs only (install the one of PyTorch's CUDA index)"
    return f"they are not given to this process, or the driver is too old for CUDA {torch.version.cuda} (nvidia-smi)"


def resources_of(spec: RunSpec, device: torch.device, where: str) -> Resources:
    """Return what this rank has.

    Raises:
        ValueError: the spec's kernels can't run on the device.
    """
    gpu = gpu_name = ""
    on_gpu = device.type == "cuda"
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        gpu, gpu_name = str(getattr(properties, "uuid", device)), properties.name
    return Resources(
        where=where,
        machine=this_machine().partition(" ")[0] or socket.gethostname(),
        device=device.type,
        backend="nccl" if on_gpu else "gloo",
        dtype=spec.precision.dtype,
        kernels=kernels_of(spec, device)[0].name,
        gpu=gpu,
        gpu_name=gpu_name,
        num_gpus=torch.cuda.device_count() if on_gpu else 0,
        cores=f"{sum(1 << core for core in os.sched_getaffinity(0)):x}",
        quota=quota_of_cores(),
    )


def check_resources(found: Sequence[Resources]) -> None:
    """Check what all ranks have, given in rank order.

    Raises:
        InconsistentRanksError: they differ in device, backend, dtype or kernels.
        DeviceError: two ranks would compute on one GPU.
    """
    names = ("where", "device", "backend", "dtype", "kernels")
    check_same_everywhere([json.dumps({name: getattr(each, name) for name in names}) for each in found])
    holders: dict[tuple[str, str], int] = {}
    for rank, each in enumerate(found):
        first = holders.setdefault((each.machine, each.gpu), rank)
        if each.gpu and first != rank:
            local = sum(other.machine == each.machine for other in found)
            raise DeviceError(
                f"ranks {first} and {rank} ({each.where}) would share one GPU, {each.gpu_name} {each.gpu}: torch sees "
                f"{each.num_gpus} there for {local} ranks; start fewer ranks on that host (parallel.tp, pp, dp, "
                "launcher.nodes), give it more GPUs (slurm.gpus_per_node), or set launcher.device to cpu"
            )


def threads_of_rank(spec: RunSpec, found: Sequence[Resources], rank: int) -> int:
    """Return the CPU threads of a rank: launcher.threads_per_rank, or its share of the cores that it may use.

    A core counts in equal parts for the ranks whose masks have it. So ranks that a launcher has bound to cores of their
    own take all of them, and ranks with the same mask share it.
    """
    if spec.launcher.threads_per_rank is not None:
        return spec.launcher.threads_per_rank
    mine = found[rank]
    neighbours = [int(each.cores, 16) for each in found if each.machine == mine.machine]
    mask = int(mine.cores, 16)
    cores = [core for core in range(mask.bit_length()) if mask >> core & 1]
    share = sum(1 / sum(other >> core & 1 for other in neighbours) for core in cores)
    if mine.quota is not None:
        share = min(share, mine.quota / len(neighbours))
    return max(1, int(share + 1e-6))
