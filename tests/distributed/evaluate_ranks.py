"""What a rank does in an evaluation: apart from its tests, so that ranks need not import transformers."""

import random
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from tests.distributed.test_generate import ROTARY, VOCAB, make
from trimaran.runtime.evaluate.engine.replica import Engine
from trimaran.runtime.evaluate.engine.requests import AskedToStop, Likelihood, LikelihoodScore
from trimaran.runtime.evaluate.engine.scorer import Scorer, serve
from trimaran.runtime.evaluate.engine.weights import at_layout, load_stages
from trimaran.runtime.huggingface.importing import imported_spec
from trimaran.runtime.huggingface.plan import make_plan
from trimaran.runtime.huggingface.source import ModelFolder
from trimaran.runtime.infer.sample_group import NotFiniteError
from trimaran.runtime.mesh import build_mesh

BatchSize = int | Literal["auto"]
CPU = torch.device("cpu")


def requests_of(vocab_size: int, longest: int, seed: int = 1) -> list[Likelihood]:
    """Questions with shots and choices in common, a request twice, and ends of one request inside another."""
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab_size) for _ in range(count))

    made = []
    for _ in range(3):
        shots = tokens(draw.choice((1, longest // 3)))
        for _ in range(3):
            context = shots + tokens(draw.randrange(1, longest // 3))
            made += [Likelihood(context, tokens(draw.choice((1, 1, longest // 3)))) for _ in range(4)]
    whole = tokens(longest + 1)
    made += [made[0], Likelihood((3,), (4, 5)), Likelihood(whole[:-4], whole[-4:]), Likelihood(whole[:3], whole[3:6])]
    draw.shuffle(made)
    return made


def engine_of_family(folder: Path, parallel: dict[str, int]) -> Engine:
    """This rank's part of the model of transformers in a folder."""
    spec = at_layout(
        imported_spec(make_plan(ModelFolder.open(folder)), folder), **{"tp": 1, "pp": 1, "dp": 1, **parallel}
    )
    axes = {axis: getattr(spec.parallel, axis) for axis in ("pp", "dp", "cp", "tp")}
    mesh = build_mesh(**axes, timeout_s=100)
    store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    return Engine(load_stages(folder, spec, mesh, CPU), mesh, spec, store=store)


def score_families(
    parallel: dict[str, int], folders: list[Path], requests: list[Likelihood], sizes: list[BatchSize]
) -> list[list[list[LikelihoodScore]]]:
    """On rank 0 the scores of every folder's model, by batch size; [] elsewhere."""
    found = []
    for folder in folders:
        engine = engine_of_family(folder, parallel)
        if engine.mesh.rank == 0:
            found.append(ask(engine, requests, sizes))
        else:
            for _ in sizes:
                serve(engine)
        engine.mesh.close()
    return found


def ask(engine: Engine, requests: list[Likelihood], sizes: list[BatchSize]) -> list[list[LikelihoodScore]]:
    """The scores by batch size; each request is answered through `done` once, with what is returned."""
    found = []
    for size in sizes:
        with Scorer(engine, size) as scorer:
            told: dict[int, LikelihoodScore] = {}
            answers = scorer.likelihoods(requests, lambda number, score: told.update({number: score}))  # noqa: B023
            assert [told[number] for number in range(len(requests))] == answers
            assert scorer.likelihoods([]) == []
            found.append(answers)
    return found


def score_small(parallel: dict[str, Any], spoil: bool = False) -> list[list[LikelihoodScore]] | str:
    """On rank 0 the scores of a small model, or what is said where its logits are not finite."""
    spec, mesh, stages = make(parallel, {**ROTARY, "max_seq_len": 24})
    if spoil:
        with torch.no_grad():
            for stage in stages.values():
                if stage.is_last:
                    stage.head.weight[-1] = torch.nan
    store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    engine = Engine(
        stages, mesh, spec, store=store, in_step=bool(parallel.get("dp")) and "sequence_parallel" in parallel
    )
    try:
        if mesh.rank:
            for _ in range(1 if spoil else 2):
                serve(engine)
            return ""
        return ask(engine, requests_of(VOCAB, 24), ["auto"] if spoil else [3, "auto"])
    except NotFiniteError as error:
        return str(error)
    finally:
        mesh.close()


def stop_on(parallel: dict[str, Any], rank: int, in_step: bool) -> bool:
    """Whether a request to stop of one rank, after its second look, reaches rank 0, and by the end of serving all."""
    spec, mesh, stages = make(parallel, {**ROTARY, "max_seq_len": 24})
    store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    looks = 0

    def stop() -> bool:
        nonlocal looks
        looks += mesh.rank == rank
        return looks > 2

    engine = Engine(stages, mesh, spec, store=store, in_step=in_step, stop=stop)
    try:
        if mesh.rank:
            return serve(engine)
        scorer = Scorer(engine, 1)
        try:
            scorer.likelihoods(requests_of(VOCAB, 24) * 20)
        except AskedToStop:
            scorer.close(stopped=True)
            return True
        scorer.close()
        return False
    finally:
        mesh.close()
