"""A rank's process group and the mesh over it. The only file that calls `init_process_group`."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from trimaran.launchers.env.network import interface_of
from trimaran.launchers.rendezvous.store import Rendezvous
from trimaran.launchers.worker.failure_relay import FailureRelay
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec, check_world_size
from trimaran.runtime.train.train_context import build_mesh_of, extensions_of


def join_world(spec: RunSpec, device: torch.device, rendezvous: Rendezvous, placement: Sequence[int] = ()) -> Mesh:
    """Join the process group of all ranks and return the mesh over it. Every rank must call it.

    Args:
        placement: stage -> pipeline rank; by default the stages go round the ranks.

    Raises:
        SpecError: the number of ranks is not that of the spec's layout.
    """
    check_world_size(spec, rendezvous.rank_env.world_size)
    join_group(spec, device, rendezvous)
    return build_mesh_of(spec, device=device, shared_memory=spec.parallel.shared_memory, placement=placement)


def join_group(spec: RunSpec, device: torch.device, rendezvous: Rendezvous, name: str = "") -> None:
    """Join the default process group of all ranks. Every rank must call it.

    Args:
        name: of the group, where a process joins several, one after the other.
    """
    rank_env = rendezvous.rank_env
    if rank_env.local_world_size < rank_env.world_size:
        _choose_interface(rendezvous.address)
    if spec.zero.backend == "deepspeed":
        _tell_deepspeed(spec, device)
    # torch warns that transfers of one group wait for each other; those of the mesh have a group for each link.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=spec.launcher.timeout_s),
        store=PrefixStore(name, rendezvous.store),
        rank=rank_env.rank,
        world_size=rank_env.world_size,
    )


def _tell_deepspeed(spec: RunSpec, device: torch.device) -> None:
    """Set what DeepSpeed reads from the environment: the kind and number of the device, and where it may compile."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_of(spec).resolve())


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Be rank `rank` of torch's fake default group inside the block: collectives return at once and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave_world(mesh: Mesh, relay: FailureRelay | None = None) -> None:
    """Leave all process groups together with the other ranks, and close the failure relay. Every rank must call it.

    Only after success: after an error it would wait for peers that wait for this rank.
    """
    # A barrier: a launcher ends all ranks when one has exited with a code, and none may still be writing then.
    mesh.gather_text("")
    if relay is not None:
        relay.close()
    mesh.close()
    dist.destroy_process_group()


def _choose_interface(address: str) -> None:
    """Make gloo and NCCL use the interface that leads to the other nodes.

    Their own choice is the interface of this host's name, which may be loopback.
    """
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
