"""An evaluation of tasks while a run trains beside the same one on its own, in one process, and how soon it starts."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trimaran.runtime.data.prepare import prepare_data
from trimaran.runtime.evaluate.answers import Answers
from trimaran.runtime.evaluate.engine.replica import Engine
from trimaran.runtime.evaluate.engine.requests import Likelihood, LikelihoodScore
from trimaran.runtime.evaluate.engine.scorer import Scorer
from trimaran.runtime.evaluate.engine.weights import load_stages, open_model
from trimaran.runtime.evaluate.evaluation import evaluate
from trimaran.runtime.evaluate.results import Origin
from trimaran.runtime.infer.packing import pack_weights
from trimaran.runtime.mesh import lone_mesh
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.loop import train
from trimaran.runtime.train.signals import StopRequest
from trimaran.runtime.train.task_evaluation import TaskEvaluation, prepare_tasks

CPU = torch.device("cpu")


def run(preset: str, context: int, data: Path, tasks: Sequence[str], documents: int, repeats: int) -> None:
    """Print the seconds of both, their ratio, and the seconds from the end of a step to the first question."""
    with tempfile.TemporaryDirectory() as scratch:
        spec = spec_of(Path(scratch), preset, context, data, tasks, documents, repeats)
        prepared = prepare_data(spec)
        run_folder = Path(spec.train.output_dir)
        run_folder.mkdir()
        prepared.tokenizer.save(run_folder / "tokenizer.json")
        with timed() as (evaluations, starts), StopRequest() as stop:
            train(spec, lone_mesh(), CPU, prepared, stop)
        alone = [standalone(spec) for _ in range(repeats)]
    # The first one also warms the caches of templates and prompts up, on both sides.
    inside, outside = (statistics.median(times[1:] or times) for times in (evaluations, alone))
    print("| model | tasks | documents of each | in loop s | alone s | ratio | first start s | worst start s |")
    print("|---|---|---|---|---|---|---|---|")
    figures = f"{inside:.2f} | {outside:.2f} | {inside / outside:.2f} | {starts[0]:.2f} | {max(starts):.2f}"
    print(f"| {preset} | {', '.join(tasks)} | {documents} | {figures} |", flush=True)


def spec_of(
    folder: Path, preset: str, context: int, data: Path, tasks: Sequence[str], documents: int, steps: int
) -> RunSpec:
    """Return a run of few short steps with an evaluation after each, over a text of its own."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "it", "rains"]
    text = "\n".join(" ".join(words[(line + at * at) % len(words)] for at in range(12)) for line in range(2000))
    (folder / "text.txt").write_text(text)
    return parse_spec(
        {
            "model": {"preset": preset, "max_seq_len": context, "vocab_size": 512},
            "data": {
                "source": [str(folder / "text.txt")],
                "cache_dir": str(folder / "cache"),
                "tokenizer_vocab_size": 512,
            },
            "optimizer": {"lr": 1e-3},
            "train": {
                "num_steps": steps,
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "seq_len": 64,
                "output_dir": str(folder / "run"),
            },
            "logging": {"timeline": False, "tensorboard": False},
            "launcher": {"device": "cpu"},
            "evaluation": {"tasks": list(tasks), "data": str(data), "interval": 1, "limit": documents},
        }
    )


@contextmanager
def timed() -> Iterator[tuple[list[float], list[float]]]:
    """Yield lists that fill with the seconds of each evaluation in the loop, and of each until its first question."""
    evaluations, starts, begun = list[float](), list[float](), [0.0]
    scores, likelihoods = TaskEvaluation.scores, Scorer.likelihoods

    def timed_scores(self: TaskEvaluation, *arguments: Any) -> Any:
        begun[0] = time.perf_counter()
        found = scores(self, *arguments)
        evaluations.append(time.perf_counter() - begun[0])
        return found

    def timed_likelihoods(
        self: Scorer, requests: Sequence[Likelihood], done: Callable[[int, LikelihoodScore], None]
    ) -> list[LikelihoodScore]:
        starts.append(time.perf_counter() - begun[0])
        return likelihoods(self, requests, done)

    TaskEvaluation.scores, Scorer.likelihoods = timed_scores, timed_likelihoods  # type: ignore[method-assign]
    try:
        yield evaluations, starts
    finally:
        TaskEvaluation.scores, Scorer.likelihoods = scores, likelihoods  # type: ignore[method-assign]


def standalone(spec: RunSpec) -> float:
    """Return the seconds of the same evaluation of the run's last checkpoint, its weights and prompts loaded before."""
    assert spec.evaluation is not None
    model, mesh = open_model(Path(spec.train.output_dir)), lone_mesh()
    prepared = prepare_tasks(spec.evaluation, model.text, model.spec)
    stages = load_stages(model.origin, model.spec, mesh, CPU)
    pack_weights(stages, mesh)
    engine = Engine(stages, mesh, model.spec, model.text.tokenizer)
    origin = Origin("run", model.step, None, {}, {}, "float32", "cpu")
    start = time.perf_counter()
    with Scorer(engine) as scorer:
        evaluate(prepared, scorer, Answers(None, ""), origin)
    return time.perf_counter() - start
