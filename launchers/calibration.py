"""The ranks of `trimaran calibrate`: on this machine, or this process as one of those that another launcher started.

Imports no torch.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trimaran.launchers.env.rank_env import read_env
from trimaran.launchers.stoppable import stoppable
from trimaran.launchers.worker.tasks import CalibrateTask, TaskFile
from trimaran.runtime.files import read_json, write_text
from trimaran.runtime.scratch import scratch_folder
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.spec.loading import dump_spec

if TYPE_CHECKING:
    from trimaran.runtime.plan.calibrate.record import Machine

_TIMEOUT_S = 900.0


def calibrate_here(ranks: int, dtypes: Sequence[str], *, smoke: bool) -> "Machine":
    """Measure on as many ranks of this machine, and fit."""
    begun = time.monotonic()
    with scratch_folder("calibrate") as folder:
        task = _write_task(folder, ranks, dtypes, smoke=smoke)
        if ranks > 1:
            from trimaran.launchers.local.launch import launch_folder

            launch_folder(folder)
        else:
            from trimaran.launchers.worker.run import run_alone

            with stoppable(lambda: ""):
                run_alone(task)
        return _machine_in(folder, dtypes, begun)


def calibrate_as_rank(
    output: Path, dtypes: Sequence[str], conclude: Callable[["Machine"], None], *, smoke: bool
) -> NoReturn:
    """Measure as one rank of the start that the environment describes, then exit.

    The ranks meet in a folder beside `output`, which all of them can write. Where one has failed, it stays, with what
    they have printed.

    Args:
        conclude: what rank 0 does with what has been measured.
    """
    from trimaran.launchers.worker.entry import serve_as_rank

    begun, env = time.monotonic(), read_env(os.environ)
    folder = output.absolute().parent / f".{output.name}-{env.start}"
    folder.mkdir(exist_ok=True)
    _write_task(folder, env.world_size, dtypes, smoke=smoke)  # every rank the same, each file whole

    def of_all() -> None:
        found = _machine_in(folder, dtypes, begun)
        shutil.rmtree(folder, ignore_errors=True)
        conclude(found)

    serve_as_rank(TaskFile(folder / "task.json", folder / "logs"), conclude=of_all)


def _write_task(folder: Path, ranks: int, dtypes: Sequence[str], *, smoke: bool) -> CalibrateTask:
    """Write the task and its spec, which has as many ranks; nothing of it is trained."""
    spec: RunSpec = parse_spec(
        {
            "model": {"num_layers": 1, "hidden_size": 64, "num_heads": 1, "vocab_size": 512},
            "parallel": {"dp": ranks},
            "data": {"tokenizer_vocab_size": 512},
            "optimizer": {"lr": 1e-3},
            "train": {"num_steps": 1, "global_batch_size": ranks, "micro_batch_size": 1, "seq_len": 16},
            "launcher": {"timeout_s": _TIMEOUT_S},
        }
    )
    write_text(folder / "spec.yaml", dump_spec(spec))
    task = CalibrateTask(spec=folder / "spec.yaml", output=folder / "points.json", dtypes=tuple(dtypes), is_smoke=smoke)
    write_text(folder / "task.json", task.model_dump_json())
    return task


def _machine_in(folder: Path, dtypes: Sequence[str], begun: float) -> "Machine":
    return machine_of(read_json(folder / "points.json"), dtypes, time.monotonic() - begun)


def machine_of(raw: Mapping[str, Any], dtypes: Sequence[str], seconds: float) -> "Machine":
    """Return the calibration that the ranks' file of points makes."""
    import platform
    from importlib.metadata import version

    import numpy as np

    from trimaran.runtime.plan.calibrate.fitted import fit_exchanges, fit_rates
    from trimaran.runtime.plan.calibrate.fitted_gpu import fit_constants
    from trimaran.runtime.plan.calibrate.record import VERSION, Machine, Point

    points = [Point.model_validate(each) for each in raw["points"]]
    settings = sorted({(each.ranks, each.threads) for each in points if each.what == "product"})
    exchanges = fit_exchanges(points)
    on_gpu = raw["kind"] == "gpu"
    return Machine(
        version=VERSION,
        **{name: raw[name] for name in ("kind", "name", "cores", "memory_bytes", "processors", "context_bytes")},
        versions={"trimaran": version("trimaran"), "python": platform.python_version(), "torch": version("torch")},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        spread=round(float(np.median([each.spread for each in points])), 4),
        seconds=round(seconds, 1),
        rates=[] if on_gpu else [fit_rates(points, *each, dtype) for each in settings for dtype in dtypes],
        constants=[fit_constants(points, exchanges, raw["name"], raw["processors"], each) for each in dtypes]
        if on_gpu
        else [],
        exchanges=exchanges,
        points=points,
    )
