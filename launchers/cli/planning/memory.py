"""`--memory` of `trimaran check` and `schedules`: what ranks hold during a step, counted by the dry step."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trimaran.launchers.terminal import print_table, say
from trimaran.runtime.spec import RunSpec

if TYPE_CHECKING:
    from trimaran.runtime.train.checks.dry_step import Peak, StepBytes

_PARTS = ("parameters", "gradients", "optimizer", "transit", "activations", "in all")


def print_memory(spec: RunSpec, rank: int | None) -> None:
    """Print what a rank holds at its peak, and at that of every action; without a rank, what some of them hold.

    Raises:
        ValueError: the spec has no such rank.
    """
    if rank is not None and not 0 <= rank < spec.world_size:
        raise ValueError(
            f"--rank {rank}: the run has {spec.world_size} ranks; give one from 0 to {spec.world_size - 1}"
        )
    from rich.table import Table

    from trimaran.runtime.train.checks.dry_step import kernels_without_device

    device = device_of(spec)
    ranks = ends_of_tensor_groups(spec) if rank is None else [rank]
    found = [step_of(spec, each, device) for each in ranks]
    kind, other = ("GPUs", "cpu") if device == "cuda" else ("CPUs", "cuda")
    where = f"{kind} with {kernels_without_device(spec, device)}"
    say(
        f"memory of tensors in a training step on {where} (of the other kind: --set launcher.device={other}); "
        "what an allocator rounds up, and libraries take, is not counted"
    )
    if spec.transformer.num_experts:
        say("every expert is taken to get the same number of tokens; a busier one takes more activations")
    table = Table("rank", *_PARTS, "peak in", box=None)
    for each in found:
        table.add_row(each.where, *cells(each, each.peak), each.peak.name)
    print_table(table)
    if rank is not None:
        actions = Table("peak of", *_PARTS, box=None)
        for peak in found[0].peaks:
            if peak.is_compute:
                actions.add_row(peak.name, *cells(found[0], peak))
        print_table(actions)


def bytes_at_most(spec: RunSpec) -> str:
    """Return what the pipeline ranks hold at their peaks, the least and the most."""
    each = spec.world_size // spec.parallel.pp
    totals = [step_of(spec, rank, device_of(spec)).total for rank in range(0, spec.world_size, each)]
    return " to ".join(dict.fromkeys(map(_size, (min(totals), max(totals)))))


def step_of(spec: RunSpec, rank: int, device: Literal["cpu", "cuda"]) -> "StepBytes":
    """Return what a rank of the run holds in a step on this kind of device.

    Raises:
        ValueError: the memory of the spec's ZeRO is another library's.
    """
    if spec.zero.backend != "native":
        counted = "only the memory of native can be counted; add --set zero.backend=native"
        raise ValueError(f"zero.backend is {spec.zero.backend}, and {counted}")
    from trimaran.launchers.worker.process_group import fake_world
    from trimaran.runtime.train.checks.dry_step import dry_step

    with fake_world(rank, spec.world_size):
        return dry_step(spec, device)


def device_of(spec: RunSpec) -> Literal["cpu", "cuda"]:
    """Return the kind of device that the run would take: where the spec leaves it open, a GPU if this host has one."""
    wish = "cuda" if spec.kernels.backend == "triton" else spec.launcher.device
    if wish != "auto":
        return wish
    on_gpus = spec.slurm.gpus_per_node > 0 if spec.launcher.kind == "slurm" else any(Path("/dev").glob("nvidia[0-9]*"))
    return "cuda" if on_gpus else "cpu"


def ends_of_tensor_groups(spec: RunSpec) -> list[int]:
    """Return the first and the last tp rank of every pipeline rank: others hold what one of these two holds."""
    parallel = spec.parallel
    each = spec.world_size // parallel.pp
    return [stage * each + tp for stage in range(parallel.pp) for tp in sorted({0, parallel.tp - 1})]


def cells(step: "StepBytes", peak: "Peak") -> tuple[str, ...]:
    """Return what a rank holds at one of its peaks, in the order of the table's columns."""
    state = tuple(step.state[part] for part in _PARTS[:3])
    whole = (*state, peak.transit, peak.activations)
    return tuple(_size(count) for count in (*whole, sum(whole)))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
