"""lm-eval without its bars on standard error, and its bootstrap without processes of its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lm_eval.api.metrics as lm_eval_metrics
import lm_eval.api.task as lm_eval_task


@contextmanager
def quiet() -> Iterator[None]:
    """Run lm-eval in the block without bars and processes."""
    bars, bootstrap = lm_eval_task.tqdm, lm_eval_metrics.bootstrap_stderr
    lm_eval_task.tqdm = lambda items, **options: items
    lm_eval_metrics.bootstrap_stderr = _bootstrap_stderr
    try:
        yield
    finally:
        lm_eval_task.tqdm, lm_eval_metrics.bootstrap_stderr = bars, bootstrap


def _bootstrap_stderr(metric: Callable[[Sequence[Any]], float], items: Sequence[Any], iters: int) -> float:
    """Return lm-eval's bootstrapped standard error, from the same draws."""
    size = min(1000, iters)
    draw = lm_eval_metrics._bootstrap_internal(metric, size)
    values = [value for number in range(iters // size) for value in draw((number, items))]
    error: float = lm_eval_metrics.sample_stddev(values)
    return error
