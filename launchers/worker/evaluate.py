"""`trimaran evaluate` on the ranks: rank 0 runs the evaluation and writes its results, all ranks answer it."""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch._C._distributed_c10d import Store

from trimaran.launchers.worker.tasks import EvaluateTask
from trimaran.runtime.checkpoint.manifest import MANIFEST_NAME
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.data.files import hash_file
from trimaran.runtime.evaluate.answers import Answers
from trimaran.runtime.evaluate.engine.exchange import Board
from trimaran.runtime.evaluate.engine.replica import Engine
from trimaran.runtime.evaluate.engine.requests import Continuation, Likelihood, LikelihoodScore, ignore
from trimaran.runtime.evaluate.engine.scorer import Scorer, serve
from trimaran.runtime.evaluate.engine.weights import EvaluatedModel, is_huggingface, load_stages, open_model
from trimaran.runtime.evaluate.evaluation import evaluate, prepare
from trimaran.runtime.evaluate.results import JOURNAL, Origin, write_evaluation
from trimaran.runtime.infer.packing import pack_weights
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec

_START: Final = "start"
_LOAD, _NOTHING = b"load", b"nothing"


def run_evaluate(task: EvaluateTask, spec: RunSpec, mesh: Mesh, device: torch.device, store: Store) -> int:
    """Evaluate, and write the results on rank 0; return the exit code. Collective over the world."""
    board = Board(store, _START)
    model = open_model(task.model)

    def engine() -> Engine:
        stages = load_stages(task.model, spec, mesh, device)
        pack_weights(stages, mesh)
        return Engine(stages, mesh, spec, model.text.tokenizer, store)

    if mesh.rank:
        if board.wait(_START) == _LOAD:
            serve(engine())
        return 0
    prepared = prepare(task.options, model.text, model.spec.transformer)
    origin = origin_of(model, task.name, spec, device)

    def start() -> Scorer:
        board.put(_START, _LOAD)
        return Scorer(engine(), task.options.batch_size or "auto")

    scorer = LateScorer(start)
    task.folder.mkdir(parents=True, exist_ok=True)
    with Answers(task.folder / JOURNAL, f"{origin.hashes['weights']} {origin.dtype}") as answers, _bar() as progress:
        found = evaluate(prepared, scorer, answers, origin, progress)
    if not scorer.close():
        board.put(_START, _NOTHING)
    write_evaluation(task.folder, found, with_prompts=task.options.keep_prompts)
    return 0


def origin_of(model: EvaluatedModel, name: Path, spec: RunSpec, device: torch.device) -> Origin:
    """Return which weights are evaluated, and how; `name` is the model's folder as the user has named it."""
    layout = {axis: getattr(spec.parallel, axis) for axis in ("tp", "pp", "dp")}
    hashes = {"weights": digest_of(model.origin), "tokenizer": hash_file(model.text.folder / "tokenizer.json")}
    seen = None if model.step is None else Checkpoint.open(model.origin, verify=False).state.get("tokens_seen")
    return Origin(str(name), model.step, seen, layout, hashes, spec.precision.dtype, device.type)


def digest_of(origin: Path) -> str:
    """Return a digest of the weights of a checkpoint, whose manifest has those of its files, or of a folder."""
    if not is_huggingface(origin):
        return hash_file(origin / MANIFEST_NAME)
    files = [file for pattern in ("*.safetensors", "config.json") for file in sorted(origin.glob(pattern))]
    return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()


class LateScorer:
    """A scorer whose weights are read when it is first asked: what is wrong with a request is told before that.

    Args:
        start: loads the weights.
    """

    def __init__(self, start: Callable[[], Scorer]) -> None:
        self._start = start
        self._scorer: Scorer | None = None

    def likelihoods(
        self, requests: Sequence[Likelihood], done: Callable[[int, LikelihoodScore], None] = ignore
    ) -> list[LikelihoodScore]:
        """Return the log-likelihoods."""
        return self._started().likelihoods(requests, done) if requests else []

    def continuations(self, requests: Sequence[Continuation], done: Callable[[int, str], None] = ignore) -> list[str]:
        """Return the texts of the continuations."""
        return self._started().continuations(requests, done) if requests else []

    def _started(self) -> Scorer:
        if self._scorer is None:
            self._scorer = self._start()
        return self._scorer

    def close(self) -> bool:
        """End the other ranks' service; return whether it has begun."""
        if self._scorer is not None:
            self._scorer.close()
        return self._scorer is not None


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """Show on a terminal how many requests are answered."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr, highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        line = bars.add_task("requests", total=None)
        yield lambda done, of: bars.update(line, completed=done, total=of)
