"""Tasks that are evaluated while a run trains: on the live weights, by all its ranks, at its layout."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch._C._distributed_c10d import Store

from trimaran.models.fields import counted
from trimaran.runtime.evaluate.answers import Answers
from trimaran.runtime.evaluate.engine.replica import Engine
from trimaran.runtime.evaluate.engine.requests import AskedToStop
from trimaran.runtime.evaluate.engine.scorer import Scorer, serve
from trimaran.runtime.evaluate.evaluation import Prepared, evaluate, prepare
from trimaran.runtime.evaluate.options import EvaluationOptions
from trimaran.runtime.evaluate.results import Origin, score_row
from trimaran.runtime.infer.packing import packed_weights
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.sections import EvaluationSection
from trimaran.runtime.train.samples import TrainingData
from trimaran.runtime.train.train_context import TrainContext


def prepare_tasks(section: EvaluationSection, text: RunText, spec: RunSpec) -> Prepared:
    """Return the evaluation of the section `evaluation`, ready to run. Raises ValueError where a task is wrong."""
    options = EvaluationOptions(
        tasks=tuple(section.tasks),
        data=None if section.data is None else Path(section.data),
        limit=section.limit,
        num_fewshot=section.num_fewshot,
        batch_size=None if section.batch_size == "auto" else section.batch_size,
    )
    return prepare(options, text, spec.transformer)


class TaskEvaluation:
    """The evaluation of a run's tasks between its steps. It changes nothing that training reads.

    Args:
        store: of this start; None for a single rank.
        stop: whether this rank was asked to stop: an evaluation under way is left then.
    """

    def __init__(
        self,
        section: EvaluationSection,
        train_context: TrainContext,
        data: TrainingData,
        store: Store | None,
        stop: Callable[[], bool],
    ) -> None:
        self._section, self._context = section, train_context
        spec, mesh = train_context.spec, train_context.mesh
        # Blocks are gathered over dp one by one, and tokens exchanged between experts, so dp ranks must keep step.
        in_step = (spec.zero.stage == 3 and mesh.sharding.shard.size > 1) or mesh.ep.size > 1
        stages, placement = train_context.stages, train_context.schedule.placement
        self._engine = Engine(stages, mesh, spec, data.tokenizer, store, placement, in_step, stop)
        self._prepared: Prepared | None = None
        if mesh.rank == 0:
            self._prepared = prepare_tasks(section, RunText.open(Path(spec.train.output_dir)), spec)

    def is_due(self, step: int) -> bool:
        """Whether the tasks are evaluated after `step` finished steps."""
        interval = self._section.interval
        return step == self._context.spec.train.num_steps or (interval > 0 and step % interval == 0)

    def scores(self, step: int, tokens_seen: int) -> dict[str, float | None] | None:
        """Return on rank 0 every figure by its name in metrics.jsonl; {} on the others.

        None on all ranks where one was asked to stop before the evaluation had ended. Collective over the world.
        """
        with self._packed():
            return self._scores(step, tokens_seen)

    def _packed(self) -> AbstractContextManager[None]:
        """Pack the weights while tasks are evaluated, except where blocks are gathered one by one."""
        is_gathered = self._context.spec.zero.stage == 3
        return nullcontext() if is_gathered else packed_weights(self._engine.stages, self._engine.mesh)

    def _scores(self, step: int, tokens_seen: int) -> dict[str, float | None] | None:
        if self._prepared is None:
            return None if serve(self._engine) else {}
        spec = self._context.spec
        layout = {axis: getattr(spec.parallel, axis) for axis in ("tp", "pp", "dp")}
        device = self._context.executor.transport.device.type
        origin = Origin(spec.train.output_dir, step, tokens_seen, layout, {}, spec.precision.dtype, device)
        scorer, stopped = Scorer(self._engine, self._section.batch_size), False
        try:
            return score_row(evaluate(self._prepared, scorer, Answers(None, ""), origin).results)
        except AskedToStop:
            stopped = True
            return None
        finally:
            scorer.close(stopped=stopped)

    @property
    def told(self) -> str:
        """What belongs beside the scores, "" for nothing."""
        limit = self._section.limit
        return "" if limit is None else f" ({counted(limit, 'document')} of each task)"
