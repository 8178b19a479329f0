"""Before the ranks: check and prepare a run and fill its folder. After them: the report. Imports no torch at first."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from trimaran.launchers.before_start import check_device, check_run_folder
from trimaran.launchers.terminal import say, sentence
from trimaran.runtime.files import write_text
from trimaran.runtime.folder_lock import FolderLock
from trimaran.runtime.spec import RunSpec, dump_spec

if TYPE_CHECKING:
    from trimaran.runtime.data.prepare import PreparedData
    from trimaran.runtime.data.recipe.curated import Curated
    from trimaran.runtime.plan.calibrate.record import Machine
    from trimaran.runtime.plan.chips import Chip
    from trimaran.runtime.train.samples import TrainingData


def lock_run(folder: Path) -> FolderLock:
    """Lock a run folder for this run, which the ranks share; raise FolderInUse where another run has it.

    Raises:
        ValueError: the folder can't be made or written.
    """
    check_run_folder(folder)
    return FolderLock.of_run(folder, "trimaran train", os.environ)


def prepare_run(spec: RunSpec, folder: Path, chip: "Chip | Machine | None" = None) -> Path:
    """Check that the run may start or resume, prepare the data, fill the run folder; return the ranks' task file.

    The caller holds the lock of the folder.

    Args:
        chip: for which the plan is made; None: for this machine, as far as it is known.
    """
    from trimaran.launchers.data.examples import prepare_examples_of
    from trimaran.launchers.data.prepare import prepare_spec
    from trimaran.launchers.data.run_plan import tell_plan
    from trimaran.launchers.data.workers import WorkerOptions, local_workers
    from trimaran.runtime.data.recipe.curated import MANIFEST
    from trimaran.runtime.data.tokens.build import Digests
    from trimaran.runtime.finetune.data.prepare import PreparedExamples
    from trimaran.runtime.finetune.run_files import with_examples, write_chat_files
    from trimaran.runtime.train.pipeline import schedule_of

    check_device(spec, 1)  # before the data, which may take long
    schedule_of(spec)
    resumed = None
    if (folder / "checkpoints").is_dir():
        from trimaran.runtime.train.state import resume_path

        resumed = resume_path(spec)
    starts_from = resumed is None and spec.checkpoint.init_from is not None
    tokenizer, copies_texts = None, False
    if spec.checkpoint.init_from is not None:
        from trimaran.runtime.train.init_from import (
            check_initial_weights,
            copy_import_weights,
            copy_tokenizer_configs,
            has_same_tokenizer,
            tokenizer_of_weights,
        )

        if starts_from:
            check_initial_weights(spec)
        if spec.finetune is None:
            tokenizer = tokenizer_of_weights(spec, resumed=resumed is not None)
    former = None if resumed is None else Digests.read(folder / "data_manifest.json")
    workers = local_workers(WorkerOptions.of_spec(spec)) if spec.data.has_recipe else None
    curated: Curated | None = None
    data: TrainingData
    page = None
    if spec.finetune is not None:
        data = prepare_examples_of(spec, resumed=resumed is not None)
        spec = with_examples(spec, data)
    else:
        curated, data = prepare_spec(spec, workers, tokenizer, former)
        page = None if curated is None else write_data_page_of(curated, data)
    _check_run(spec, data)
    if starts_from:
        copies_texts = has_same_tokenizer(spec, data) or spec.finetune is not None  # which adds tokens at most
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_text(folder / "spec.yaml", dump_spec(spec))
    write_text(folder / "data_manifest.json", json.dumps(data.manifest, indent=1))
    shutil.copyfile(data.folder / "tokenizer.json", folder / "tokenizer.json")
    if curated is not None and page is not None:  # the run keeps what it was trained on, whatever becomes of the cache
        shutil.copyfile(page, folder / page.name)
        shutil.copyfile(curated.folder / MANIFEST, folder / MANIFEST)
    if starts_from:
        copy_import_weights(spec, folder)
    if copies_texts:
        copy_tokenizer_configs(spec, folder)
    data.tokenizer.keep_end_of_text(folder)
    if isinstance(data, PreparedExamples):
        write_chat_files(spec, data, folder)
    if spec.evaluation is not None:
        from trimaran.runtime.infer.prompts import RunText
        from trimaran.runtime.train.task_evaluation import prepare_tasks

        prepare_tasks(spec.evaluation, RunText.open(folder), spec)
    tell_plan(spec, folder, chip)
    task = folder / "logs" / "task.json"
    content = {"kind": "train", "spec": str((folder / "spec.yaml").resolve()), "data": str(data.folder.resolve())}
    write_text(task, json.dumps(content))
    return task


def _check_run(spec: RunSpec, data: "TrainingData") -> None:
    """Refuse what the ranks would refuse, before any rank is started."""
    from trimaran.runtime.train.samples import check_data
    from trimaran.runtime.train.state import check_same_data, read_state, resume_path

    if spec.finetune is not None and spec.finetune.method == "rl":
        from trimaran.runtime.finetune.rl.inputs import check_prompts

        check_prompts(spec, data)
    else:
        check_data(spec, data)
    path = resume_path(spec)
    if path is not None:
        check_same_data(read_state(path), data)


def what_is_saved(folder: Path) -> str:
    """Return the sentence that ends an interrupted run."""
    from trimaran.runtime.checkpoint.folder import latest, step_of

    path = latest(folder / "checkpoints")
    if path is None:
        return "nothing is saved yet, and the same command starts anew"
    return f"step {step_of(path)} is saved in {path}, and the same command resumes there"


def try_to_report(folder: Path) -> None:
    """Write the report; if that fails (on a full disk, say) only warn, because how the run ended matters more."""
    try:
        write_report_of(folder)
    except OSError as error:
        say(f"the report could not be written: {sentence(error)}", style="yellow")


def write_report_of(folder: Path, path: Path | None = None) -> Path:
    """Write the report of a run folder and return where it is; imports the report's packages."""
    from trimaran.launchers.report.page import write_report

    return write_report(folder, path)


def write_data_page_of(curated: "Curated", prepared: "PreparedData | None" = None) -> Path | None:
    """Write the page about a recipe's data, tell where it is and return that; imports the report's packages.

    Where it can't be written, that is told, for the data is there all the same.

    Args:
        prepared: see `write_data_page`.
    """
    from trimaran.launchers.report.data_page import write_data_page

    try:
        page = write_data_page(curated, prepared)
    except OSError as error:
        say(f"the page about the data could not be written: {sentence(error)}", style="yellow")
        return None
    say(f"what is kept, and why the rest is not: {page}")
    return page
