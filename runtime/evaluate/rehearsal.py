"""A rehearsal of tasks before any weights are read: lm-eval judges right answers to a document of each.

What is wrong with a filter, a metric or the code of a task would otherwise be told after all questions were answered.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from trimaran.runtime.data.files import DataError
from trimaran.runtime.evaluate.quiet import quiet
from trimaran.runtime.evaluate.tasks.offline import offline, reason_of


def rehearse(tasks: Mapping[str, Any], seed: int) -> None:
    """Raise DataError where an answer to a task can't be judged; names the task. Runs no code that a model wrote.

    Args:
        seed: of the draw of few-shot examples.
    """
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            continue
        task.set_fewshot_seed(seed=seed)
        try:
            with offline(), quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on figures of a single document
                evaluate(
                    lm=_RightAnswers(task),
                    task_dict={"tasks": {name: task}, "groups": {}},
                    limit=1,
                    bootstrap_iters=0,
                    log_samples=False,
                )
        except DataError:
            raise
        except Exception as error:  # code of a task, which may raise anything
            raise DataError(f"task {name}: a document can't be asked and judged: {reason_of(error)}") from error


class _RightAnswers(LM):  # type: ignore[misc]
    """A model whose continuations are what the task wants, and whose likelihoods are all equal."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        self._task = task

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [-1.0] * len(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        targets = [self._task.doc_to_target(request.doc) for request in requests]
        return [str(target[0] if isinstance(target, list) and target else target) for target in targets]
