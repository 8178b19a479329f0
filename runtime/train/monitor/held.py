"""What ranks held while they trained, beside what was planned; and an out-of-memory error that ends with both."""

import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trimaran.runtime.mesh import Mesh
from trimaran.runtime.plan.brief import read_brief, table_of, text_of
from trimaran.runtime.zero.protocol import Optimizer

_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def resident_bytes() -> int:
    """Return the most bytes of memory that this process has had, libraries included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_by_rank(optimizer: Optimizer | None, device: torch.device, before: int) -> dict[str, float]:
    """Return what this rank holds from step to step, by part, and "peak": the most that its tensors took.

    Args:
        optimizer: None where the error came before it was built.
        before: on a CPU, `resident_bytes` before anything was built.
    """
    state = {} if optimizer is None else optimizer.state_bytes()
    found: dict[str, float] = {
        name: float(state[name]) for name in ("parameters", "gradients", "optimizer") if name in state
    }
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else max(0, resident_bytes() - before)
    return {**found, "peak": float(peak)}


def record_memory(optimizer: Optimizer, mesh: Mesh, device: torch.device, before: int) -> str:
    """Return the content of memory.json: by pipeline rank the most that one of its ranks held, and each rank's peak.

    Collective over the world.
    """
    mine = held_by_rank(optimizer, device, before)
    texts = mesh.gather_text(json.dumps([mesh.coordinates["pp"], mine]))
    by_pipeline_rank: list[dict[str, float]] = [{} for _ in range(mesh.pp.size)]
    peaks = []
    for rank, held in map(json.loads, texts):
        peaks.append(held["peak"])
        for name, value in held.items():
            by_pipeline_rank[rank][name] = max(by_pipeline_rank[rank].get(name, 0.0), value)
    kind = "allocated" if device.type == "cuda" else "resident, above that before the model was built"
    return json.dumps({"peak_is": kind, "by_pipeline_rank": by_pipeline_rank, "peak_by_rank": peaks})


@contextmanager
def telling_memory(
    folder: Path, mesh: Mesh, device: torch.device, optimizer: Callable[[], Optimizer | None], before: int
) -> Iterator[None]:
    """End an out-of-memory error of the block with what was planned and what this rank held.

    Args:
        folder: of the run, with its plan.
        optimizer: returns it, None where there is none yet.

    Raises:
        RuntimeError: memory has run out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        brief = read_brief(folder)
        held: list[dict[str, float]] = [{} for _ in range(mesh.pp.size)]
        held[mesh.pp.rank] = held_by_rank(optimizer(), device, before)
        reason = (str(error).strip() or "memory has run out").splitlines()[0]
        told = "" if brief is None else text_of(table_of(brief, held))
        raise RuntimeError(f"out of memory: {reason}" + (f"\n{told}" if told else "")) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
