"""The task of a node where a Slurm task is a node: torchrun's agent, which starts the node's ranks.

srun --ntasks-per-node=1 python -m trimaran.launchers.slurm.agent SPEC
"""

import os
import sys
from pathlib import Path

from trimaran.launchers.cli.console import say
from trimaran.launchers.env.rank_env import resolve
from trimaran.launchers.local.node_agent import run_node
from trimaran.launchers.local.torch_elastic import Node, get_ready
from trimaran.launchers.worker.entry import follow_parent
from trimaran.runtime.spec import check_world_size, load_spec


def main() -> int:
    """Entry point; returns the exit code."""
    follow_parent()
    spec_path = Path(sys.argv[1])
    spec = load_spec(spec_path)
    rank_env = resolve(os.environ, "slurm")
    ranks = spec.world_size // rank_env.world_size
    check_world_size(spec, ranks * rank_env.world_size)
    get_ready(spec, ranks)
    from trimaran.launchers.rendezvous.store import meet, serve_store

    folder = Path(spec.train.output_dir)
    meeting = meet(rank_env, os.environ, spec.launcher, folder)
    store = meeting.served or serve_store(meeting.address, 0)
    node = Node(
        store, meeting.address, rank_env.world_size, ranks, folder / "logs" / f"agent-{rank_env.start}" / rank_env.node
    )
    meeting.call_roll(spec.launcher.start_timeout_s)
    meeting.close_door()
    return run_node(node, spec, spec_path, [])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        sys.exit(2)
