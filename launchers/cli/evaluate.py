"""`trimaran evaluate`: turn the options into tasks for the ranks, and show what they found. Errors precede weights."""

import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimaran.launchers.cli.common.console import Pp, ToLanguage, Tp, errors_as_sentences, path
from trimaran.launchers.env.exit_codes import Stopped
from trimaran.launchers.local.evaluate import results_folder, write_evaluate_task
from trimaran.launchers.local.launch import launch_folder
from trimaran.launchers.stoppable import stoppable
from trimaran.launchers.terminal import new_table, print_table, say
from trimaran.models.fields import counted
from trimaran.runtime.folder_lock import FolderLock
from trimaran.runtime.scratch import scratch_folder

if TYPE_CHECKING:
    from trimaran.runtime.evaluate.compare import Comparison
    from trimaran.runtime.evaluate.engine.weights import EvaluatedModel
    from trimaran.runtime.evaluate.options import EvaluationOptions
    from trimaran.runtime.evaluate.results import Evaluation

_SEED = 1234  # lm-eval's
Pairs = Annotated[
    Path | None,
    typer.Option(
        parser=path, help="Measure --mode by chrF and ROUGE: a .jsonl file of records with the texts source and target."
    ),
]
PairsMode = Annotated[
    str | None, typer.Option(metavar="MODE", help="With --pairs: translate, summarize, answer or continue.")
]
Generation = Annotated[
    list[str],
    typer.Option(
        "--gen", metavar="NAME=VALUE", help="Setting of generation, such as max_gen_toks=64; may be repeated."
    ),
]
Checkpoints = Annotated[
    str | None,
    typer.Option(metavar="all|N,M", help="Of these checkpoints: a picture of score over tokens."),
]


@dataclass(frozen=True)
class Job:
    """One model to evaluate.

    Args:
        name: as the user has named it.
        folder: of its results.
    """

    name: Path
    model: "EvaluatedModel"
    folder: Path


def evaluate(
    models: Annotated[
        list[Path],
        typer.Argument(
            parser=path,
            metavar="RUN|CHECKPOINT|DIR...",
            help="Run folders, checkpoint folders, or folders of Hugging Face; several are compared with the first.",
        ),
    ],
    text: Annotated[
        list[Path], typer.Option("--text", parser=path, help="Perplexity of a UTF-8 file; may be repeated.")
    ] = [],  # noqa: B006 - typer reads it
    stride: Annotated[
        int | None, typer.Option(help="With --text: tokens between windows; a full context apart by default.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks by name, groups, or .yaml files of your own, with commas between.")
    ] = None,
    pairs: Pairs = None,
    mode: PairsMode = None,
    to: ToLanguage = None,
    data: Annotated[
        Path | None, typer.Option(parser=path, help="Folder of the tasks' data; nothing is ever downloaded.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; as many as the task says by default.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="Documents of each task, below 1 their share; told in every output.")
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="auto|N", help="Requests that are computed at once.")] = "auto",
    tp: Tp = 1,
    pp: Pp = 1,
    dp: Annotated[int, typer.Option(min=1, help="Copies of the model that share the requests.")] = 1,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask as a user, by the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="What the model is told before each question.")] = None,
    gen: Generation = [],  # noqa: B006
    samples: Annotated[bool, typer.Option("--samples", help="Keep the prompts too in samples.jsonl.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of few-shot examples and of sampling.")] = _SEED,
    output: Annotated[
        Path | None, typer.Option(parser=path, help="Folder of the results; RUN/evaluations/NAME by default.")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let .yaml files of tasks run functions (!function).")
    ] = False,
    checkpoints: Checkpoints = None,
) -> None:
    """Perplexity of texts and scores of tasks, straight from a checkpoint, at any layout, without a network."""
    with errors_as_sentences():
        from trimaran.runtime.evaluate.options import EvaluationOptions
        from trimaran.runtime.infer.prompts import check_typed_text

        check_typed_text("--system", system)
        options = EvaluationOptions(
            texts=tuple(text),
            stride=stride,
            tasks=tuple(name for name in (each.strip() for each in (tasks or "").split(",")) if name),
            pairs=pairs,
            mode=mode,
            to=to,
            data=data,
            limit=_limit(limit),
            num_fewshot=num_fewshot,
            batch_size=_batch_size(batch_size),
            chat=apply_chat_template,
            system=system,
            generation=dict(map(_setting, gen)),
            keep_prompts=samples,
            seed=seed,
            allow_code=allow_code,
        )
        _check(options)
        with ExitStack() as locks:
            jobs = _jobs(models, checkpoints, options, output, (tp, pp, dp))
            for job in jobs:
                locks.enter_context(FolderLock.of_run(job.folder, "trimaran evaluate", os.environ))
            _evaluate(jobs, options, by_checkpoint=checkpoints is not None)


def _check(options: "EvaluationOptions") -> None:
    if not options.texts and not options.tasks and options.pairs is None:
        raise ValueError("nothing to evaluate: give --text FILE, or --tasks such as arc_easy, or --pairs FILE")
    if options.stride is not None and not options.texts:
        raise ValueError("--stride is for --text: give --text too, or leave it out")
    if (options.pairs is None) != (options.mode is None):
        raise ValueError("--pairs and --mode go together: give both, such as --mode summarize --pairs FILE.jsonl")
    if options.to is not None and options.mode is None:
        raise ValueError("--to is for --mode translate: give --mode and --pairs too, or leave it out")
    of_pairs_too = {
        "--limit": options.limit is not None,
        "--system": options.system is not None,
        "--gen": bool(options.generation),
    }
    of_tasks = {
        "--data": options.data is not None,
        "--num-fewshot": options.num_fewshot is not None,
        "--apply-chat-template": options.chat,
        "--allow-code": options.allow_code,
    } | ({} if options.pairs is not None else of_pairs_too)
    given = [name for name, is_given in of_tasks.items() if is_given]
    if given and not options.tasks:
        raise ValueError(f"{given[0]} is for --tasks: give --tasks too, or leave it out")


def _limit(limit: float | None) -> int | float | None:
    from trimaran.runtime.evaluate.options import check_limit

    check_limit(limit)
    return int(limit) if limit is not None and limit >= 1 else limit


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise ValueError(f"--batch-size ({text}) must be auto or a whole number of at least 1")
    return int(text)


def _setting(text: str) -> tuple[str, Any]:
    """Return name and value of NAME=VALUE; the value is JSON, or else a text."""
    from trimaran.runtime.files import parse_json

    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--gen ({text}) must be NAME=VALUE, such as max_gen_toks=64")
    try:
        return name, parse_json(value)
    except ValueError:
        return name, {"True": True, "False": False}.get(value, value)


def _jobs(
    paths: Sequence[Path],
    checkpoints: str | None,
    options: "EvaluationOptions",
    output: Path | None,
    layout: tuple[int, int, int],
) -> list[Job]:
    """Return the models to evaluate, each with everything checked that can be wrong before its weights are read.

    Args:
        layout: tp, pp and dp.
    """
    from trimaran.runtime.evaluate.engine.weights import open_model
    from trimaran.runtime.evaluate.evaluation import prepare

    tp, pp, dp = layout
    jobs: list[Job] = []
    for each in paths:
        for step in _steps(each, checkpoints):
            model = open_model(each, tp=tp, pp=pp, dp=dp, step=step)
            prepared = prepare(options, model.text, model.spec.transformer)
            folder = results_folder(each, model, options, output, is_alone=len(paths) == 1 and checkpoints is None)
            if any(folder == job.folder for job in jobs):
                raise ValueError(f"{each} is given twice, or two models of one name; name each once")
            for note in prepared.notes:
                say(note, style="yellow")
            jobs.append(Job(each, model, folder))
    return jobs


def _steps(run: Path, checkpoints: str | None) -> Sequence[int | None]:
    """Return the steps of the checkpoints to evaluate; None is the newest, or the model itself."""
    if checkpoints is None:
        return [None]
    from trimaran.runtime.checkpoint.folder import find_checkpoints

    found = find_checkpoints(run / "checkpoints")
    whole = [each.step for each in found if each.broken is None]
    if not whole:
        raise ValueError(f"--checkpoints: {run} has no whole checkpoint; give the folder of a run")
    if checkpoints == "all":
        for each in found:
            if each.broken is not None:
                say(f"{each.path} is passed over: {each.broken}", style="yellow")
        return sorted(set(whole))
    names = [name for name in (each.strip() for each in checkpoints.split(",")) if name]
    if not names:
        raise ValueError(f"--checkpoints ({checkpoints}) must be all, or steps with commas between, such as 100,200")
    wrong = [each for each in names if not each.isdecimal() or int(each) not in whole]
    if wrong:
        shown = ", ".join(map(str, whole))
        raise ValueError(f"--checkpoints: {run} has no whole checkpoint of step {wrong[0]}; it has those of {shown}")
    return sorted({int(each) for each in names})


def _evaluate(jobs: Sequence[Job], options: "EvaluationOptions", *, by_checkpoint: bool) -> None:
    """Evaluate one model after the other; then show, compare and draw what was found."""
    from trimaran.launchers.report.evaluation_page import write_evaluation_page
    from trimaran.runtime.evaluate.compare import compare
    from trimaran.runtime.evaluate.results import JOURNAL, REPORT, read_evaluation

    found = []
    for job in jobs:
        if len(jobs) > 1:
            say(f"evaluating {job.name}, {job.model.origin}")
        _run(job, options)
        found.append(read_evaluation(job.folder))
        _show(found[-1])
    comparisons = [compare(found[0], each, seed=options.seed) for each in found[1:] if not by_checkpoint]
    for comparison in comparisons:
        _show_comparison(comparison)
    for number, (job, each) in enumerate(zip(jobs, found, strict=True)):
        (job.folder / JOURNAL).unlink(missing_ok=True)
        told = comparisons if number == 0 else []
        history = [other for other, of in zip(found, jobs, strict=True) if of.name == job.name] if by_checkpoint else []
        page = write_evaluation_page(job.folder / REPORT, each, told, history)
        if number in (0, len(jobs) - 1):
            say(f"{'scores of the checkpoints' if by_checkpoint else 'results, documents and report'}: {page}")


def _run(job: Job, options: "EvaluationOptions") -> None:
    """Evaluate a model in this process, or on as many ranks as its layout has."""
    from trimaran.launchers.worker.run import run_alone

    with scratch_folder("evaluate") as folder:
        task = write_evaluate_task(folder, job.model, job.name, job.folder, options)
        try:
            if job.model.spec.world_size == 1:
                with stoppable(lambda: ""):
                    run_alone(task)
            else:
                launch_folder(folder)
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT, saved=_where_it_goes_on(job)) from None
        except Stopped as stopped:
            raise Stopped(stopped.signal_number, stopped.problem, _where_it_goes_on(job)) from None


def _where_it_goes_on(job: Job) -> str:
    from trimaran.runtime.evaluate.answers import Answers
    from trimaran.runtime.evaluate.results import JOURNAL

    answers = counted(Answers(job.folder / JOURNAL, "").number, "answer")
    return f"{job.folder / JOURNAL} has {answers}, and the same command goes on from there"


def _show(found: "Evaluation") -> None:
    """Print the table of an evaluation, and what belongs beside its figures."""
    from trimaran.launchers.report.evaluation_page import number_text
    from trimaran.runtime.evaluate.results import limit_notes, scores_of

    table = new_table("task", "examples", "metric", "value", "standard error", "documents")
    for score in scores_of(found.results):
        arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        table.add_row(
            "  " * score.depth + score.alias.strip(" -"),
            "" if score.num_fewshot is None else str(score.num_fewshot),
            score.metric + ("" if score.filter == "none" else f" ({score.filter})") + arrow,
            number_text(score.value),
            "" if score.stderr is None else f"± {number_text(score.stderr)}",
            "" if score.documents is None else f"{score.documents:,}",
        )
    limited, others = limit_notes(found.results), found.results["notes"]
    table.caption, table.caption_justify = limited[0] if limited else None, "left"
    print_table(table)
    for note in others:
        if note not in limited:
            say(note, style="yellow")


def _show_comparison(found: "Comparison") -> None:
    """Print the differences between two models."""
    from trimaran.launchers.report.evaluation_page import interval_text, number_text

    table = new_table("task", "metric", found.first, found.other, "difference", "95% interval", "verdict")
    for row in found.differences:
        metric = row.metric + ("" if row.filter == "none" else f" ({row.filter})")
        values = (number_text(row.first), number_text(row.other), f"{row.difference:+.4g}")
        table.add_row(row.task, metric, *values, interval_text(row), row.verdict)
    print_table(table)
    for note in found.notes:
        say(note, style="yellow")
