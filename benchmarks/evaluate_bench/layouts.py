"""The same likelihoods at several layouts, each with all cores: one process with as many threads, beside ranks of one.

A layout is measured in processes of its own, weights loaded before the clock starts; layouts take turns.
"""

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from evaluate_bench.questions import questions, requests_of, smoke_requests
from rank_processes import result_of_ranks

from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.evaluate.engine.replica import Engine
from trimaran.runtime.evaluate.engine.requests import Likelihood
from trimaran.runtime.evaluate.engine.scorer import Scorer, serve
from trimaran.runtime.evaluate.engine.weights import at_layout, load_stages
from trimaran.runtime.huggingface.importing import imported_spec
from trimaran.runtime.huggingface.plan import make_plan
from trimaran.runtime.huggingface.source import ModelFolder
from trimaran.runtime.infer.packing import pack_weights
from trimaran.runtime.mesh import build_mesh, lone_mesh

LAYOUTS = ("1", "dp2", "tp2", "pp2", "tp2-pp2")
_WARM_UP = 8  # requests before the clock starts


def axes_of(layout: str) -> dict[str, int]:
    """Return the axes of a layout such as tp2-pp2; "1" is one rank."""
    axes = {} if layout == "1" else {axis[:2]: int(axis[2:]) for axis in layout.split("-")}
    return {"tp": 1, "pp": 1, "dp": 1, **axes}


def run(script: str, layouts: Sequence[str], threads: int, repeats: int, arguments: Sequence[str]) -> None:
    """Print a row for each layout; a ratio above 1 says that it is faster than the first one.

    Args:
        script: what a rank runs, with `arguments` and --rank-of LAYOUT.
        threads: of the first layout's process, divided among the ranks of the others, at least one each.
    """
    times: dict[str, list[Mapping[str, Any]]] = {layout: [] for layout in layouts}
    for _ in range(repeats):
        for layout in layouts:
            axes = axes_of(layout)
            size = axes["tp"] * axes["pp"] * axes["dp"]
            found = result_of_ranks(script, [*arguments, "--rank-of", layout], size, max(1, threads // size))
            times[layout].append(found)
    print("| layout | ranks | threads of a rank | requests | s | requests/s | ratio | worst nats |")
    print("|---|---|---|---|---|---|---|---|")
    seconds = {layout: statistics.median(each["seconds"] for each in found) for layout, found in times.items()}
    sums = {layout: found[0]["log_likelihoods"] for layout, found in times.items()}
    for layout in layouts:
        axes, count = axes_of(layout), len(sums[layout])
        size = axes["tp"] * axes["pp"] * axes["dp"]
        worst = max(abs(a - b) for a, b in zip(sums[layout], sums[layouts[0]], strict=True))
        figures = f"{seconds[layout]:.2f} | {count / seconds[layout]:.1f} | {seconds[layouts[0]] / seconds[layout]:.2f}"
        print(f"| {layout} | {size} | {max(1, threads // size)} | {count} | {figures} | {worst:.1e} |", flush=True)


def run_rank(layout: str, folder: Path, data: Path | None, tasks: Sequence[str], documents: int) -> None:
    """Score on this rank; rank 0 prints the seconds and the log-likelihoods as JSON. Collective over the world.

    Args:
        data: None for the requests of the smoke test.
    """
    axes = axes_of(layout)
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if not is_alone:
        dist.init_process_group("gloo")
    spec = at_layout(imported_spec(make_plan(ModelFolder.open(folder)), folder), **axes)
    mesh = lone_mesh() if is_alone else build_mesh(**axes, cp=1, timeout_s=600)
    store = None if is_alone else dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    stages = load_stages(folder, spec, mesh, torch.device("cpu"))
    pack_weights(stages, mesh)
    engine = Engine(stages, mesh, spec, store=store)
    if mesh.rank:
        serve(engine)
    else:
        requests = _requests(folder, data, tasks, documents, spec.transformer.max_seq_len)
        with Scorer(engine) as scorer:
            scorer.likelihoods(requests[:_WARM_UP])
            start = time.perf_counter()
            scores = scorer.likelihoods(requests)
            seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "log_likelihoods": [each.log_likelihood for each in scores]}))
    mesh.close()
    if not is_alone:
        dist.destroy_process_group()


def _requests(folder: Path, data: Path | None, tasks: Sequence[str], documents: int, most: int) -> Sequence[Likelihood]:
    if data is None:
        return smoke_requests()
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return [each for task in tasks for each in requests_of(tokenizer, questions(data, task, documents), most)]
