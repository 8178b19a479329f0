"""The task of a node in a job with one Slurm task a node: torchrun's agent, which starts the node's ranks.

srun --ntasks-per-node=1 python -m trimaran.launchers.slurm.agent SPEC
"""

import os
import sys
from pathlib import Path

from trimaran.launchers.env.rank_env import read_env
from trimaran.launchers.local.node_agent import run_node
from trimaran.launchers.local.torch_elastic import Node, get_ready
from trimaran.launchers.terminal import run_main
from trimaran.launchers.worker.entry import announce
from trimaran.launchers.worker.tasks import SpecFile
from trimaran.runtime.processes import exit_with_parent
from trimaran.runtime.spec import check_world_size, load_spec


def main() -> int:
    """Entry point; returns the exit code."""
    exit_with_parent()
    spec_path = Path(sys.argv[1])
    spec = load_spec(spec_path)
    rank_env = read_env(os.environ, "slurm")
    ranks = spec.world_size // rank_env.world_size
    check_world_size(spec, ranks * rank_env.world_size)
    address_file = announce(rank_env, SpecFile(spec_path, []))
    get_ready(spec, ranks)
    from trimaran.launchers.rendezvous.store import join_rendezvous, serve_store

    folder = Path(spec.train.output_dir)
    rendezvous = join_rendezvous(rank_env, os.environ, spec.launcher, folder, announced=address_file)
    store = rendezvous.served or serve_store(rendezvous.address, 0)
    logs = folder / "logs" / f"agent-{rank_env.start}" / rank_env.node
    node = Node(rank_env.start, store, rendezvous.address, rank_env.world_size, ranks, logs)
    rendezvous.barrier(spec.launcher.start_timeout_s)
    rendezvous.remove_address_file()
    return run_node(node, spec, spec_path, [])


if __name__ == "__main__":
    sys.exit(run_main(main))
