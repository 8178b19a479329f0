"""The task of evaluating a model and the folder of its results, for whoever asks: the command line or Python."""

from pathlib import Path
from typing import TYPE_CHECKING

from trimaran.launchers.before_start import check_writable
from trimaran.launchers.worker.tasks import EvaluateTask
from trimaran.runtime.files import check_regular
from trimaran.runtime.spec import dump_spec

if TYPE_CHECKING:
    from trimaran.runtime.evaluate.engine.weights import EvaluatedModel
    from trimaran.runtime.evaluate.options import EvaluationOptions


def results_folder(
    name: Path, model: "EvaluatedModel", options: "EvaluationOptions", output: Path | None, *, is_alone: bool
) -> Path:
    """Return the folder of a model's results, which can be written.

    Args:
        name: as the user has named the model.
        output: as the user has named it; None for one of the run's.
        is_alone: whether `output` is of this model alone.

    Raises:
        ValueError: it can't be written, or something else stands there.
    """
    from trimaran.runtime.evaluate.results import FOLDER, JOURNAL, REPORT, RESULTS, SAMPLES

    if output is not None:
        step = "" if model.step is None else f"-step-{model.step}"
        folder = output if is_alone else output / f"{name.resolve().name}{step}"
    elif model.step is None:
        raise ValueError(f"{name} is no run, which the results would be a part of; give --output, a folder for them")
    else:
        folder = model.origin.parent.parent / FOLDER / options.name(model.step)
    check_writable("--output" if output is not None else "the folder of the results,", folder)
    for file in (folder / each for each in (RESULTS, SAMPLES, REPORT, JOURNAL)):
        if file.is_dir():
            raise ValueError(f"{file} is a folder, in the place of a file of the results; remove it")
        if file.exists():
            check_regular(file)
    return folder


def write_evaluate_task(
    folder: Path, model: "EvaluatedModel", name: Path, results: Path, options: "EvaluationOptions"
) -> EvaluateTask:
    """Write the task of the ranks at the model's layout as folder/task.json.

    Args:
        folder: for temporary files.
        results: the folder of the results.
    """
    (folder / "spec.yaml").write_text(dump_spec(model.spec), encoding="utf-8")
    task = EvaluateTask(
        spec=folder / "spec.yaml",
        model=model.origin.resolve(),
        name=name,
        folder=results.resolve(),
        options=options,
    )
    (folder / "task.json").write_text(task.model_dump_json(), encoding="utf-8")
    return task
