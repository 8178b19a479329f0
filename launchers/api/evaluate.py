"""`evaluate_loss`: what texts cost a model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from trimaran.launchers.api.calls import list_of, ranks_of_a_call
from trimaran.launchers.api.run import Run, place_of
from trimaran.launchers.local.launch import launch_folder
from trimaran.launchers.terminal import say
from trimaran.runtime.folder_lock import FolderLock
from trimaran.runtime.scratch import scratch_folder


@dataclass(frozen=True)
class TextLoss:
    """What a text costs a model.

    Attributes:
        name: the file; a line of a .jsonl file has its number too.
        tokens, num_bytes: of the text.
        loss: nats a token.
        perplexity: of a token.
        bits_per_byte: independent of the tokenizer.
    """

    name: str
    tokens: int
    num_bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float


def evaluate_loss(
    run: Run | str | PathLike[str],
    files: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    stride: int | None = None,
    batch_size: int | None = None,
    output: str | PathLike[str] | None = None,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
) -> list[TextLoss]:
    """Return the loss of each text under a model, as `trimaran evaluate RUN --text FILE` measures it.

    Args:
        run: a run, its folder, the folder of one of its checkpoints, or one of Hugging Face (which needs `output`).
        files: UTF-8 files, each a text; in a .jsonl file the field `text` of each line is one.
        stride: tokens between windows; None for a full context.
        batch_size: windows that are computed at once; None to fill the memory.
        output: folder of the results that the command writes; None for RUN/evaluations/NAME.
        tp, pp, dp: the layout to run at.

    Raises:
        ValueError: there is no such model, the layout is impossible, or a file has no text.
        OSError: a file can't be read.
        LaunchError: a rank failed.
        KeyboardInterrupt: Ctrl-C, or a notebook's interrupt, once the ranks have ended.
    """
    from trimaran.launchers.local.evaluate import results_folder, write_evaluate_task
    from trimaran.launchers.report.evaluation_page import write_evaluation_page
    from trimaran.runtime.evaluate.engine.weights import open_model
    from trimaran.runtime.evaluate.evaluation import prepare
    from trimaran.runtime.evaluate.options import EvaluationOptions
    from trimaran.runtime.evaluate.results import JOURNAL, REPORT, TEXT, read_evaluation

    one_or_more = (files,) if isinstance(files, str | PathLike) else files
    paths = list_of("files", one_or_more, (str, PathLike), "the path of a text")
    options = EvaluationOptions(texts=tuple(map(Path, paths)), stride=stride, batch_size=batch_size)
    if not options.texts:
        return []
    name = place_of(run)
    with ranks_of_a_call("evaluate_loss"), scratch_folder("evaluate") as folder:
        model = open_model(name, tp=tp, pp=pp, dp=dp)
        for note in prepare(options, model.text, model.spec.transformer).notes:
            say(note, style="yellow")
        results = results_folder(name, model, options, None if output is None else Path(output), is_alone=True)
        with FolderLock.of_run(results, "trimaran evaluate", os.environ):
            write_evaluate_task(folder, model, name, results, options)
            launch_folder(folder)
            found = read_evaluation(results)
            (results / JOURNAL).unlink(missing_ok=True)
            write_evaluation_page(results / REPORT, found, [], [])
    return [_loss_of(sample["doc"]) for sample in found.samples[TEXT]]


def _loss_of(document: Mapping[str, Any]) -> TextLoss:
    """Return the loss of a text from its counts in samples.jsonl."""
    from trimaran.runtime.evaluate.text import TextCounts

    counts = TextCounts(**{each.name: document[each.name] for each in fields(TextCounts)})
    metrics = counts.metrics()
    return TextLoss(
        document["name"],
        counts.tokens,
        counts.num_bytes,
        metrics["nats_per_token"],
        metrics["token_perplexity"],
        metrics["bits_per_byte"],
    )
