"""The steps of `trimaran twin ask` and `trimaran twin report`: from a twin's folder to what is told of it."""

import asyncio
from pathlib import Path

from trimaran.launchers.before_start import check_writable
from trimaran.launchers.chat.start import stopping
from trimaran.launchers.cli.common.console import ranks_of
from trimaran.launchers.run_folder import find_checkpoint
from trimaran.launchers.terminal import log_to_terminal, say, writing_output
from trimaran.launchers.twin.collect import Said, talking
from trimaran.launchers.twin.page import render
from trimaran.launchers.twin.report import Wish, make_report
from trimaran.runtime.files import write_text
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.pages.html import write_page
from trimaran.runtime.twin.asking import Twin
from trimaran.runtime.twin.record import TWIN, TwinRecord
from trimaran.runtime.twin.report.record import TwinReport


def ask_step(run: Path, question: str, sampling: SamplingParams, *, retrieval: bool, tp: int, pp: int) -> None:
    """Print a twin's answer, and below it what it rests on.

    Raises:
        ValueError: the run is no twin or has no checkpoint, or the question is too long.
    """
    if not question.strip():
        raise ValueError("the question is empty; ask something")
    twin, checkpoint = Twin.open(run), find_checkpoint(run)

    async def answer() -> Said:
        with stopping():
            async with talking(lambda path: ranks_of(path, tp=tp, pp=pp, slots=1), checkpoint, run) as talker:
                (said,) = await talker.answer(twin, [question], sampling, retrieval=retrieval)
                return said

    _print(asyncio.run(answer()), twin)


def _print(said: Said, twin: Twin) -> None:
    checked = said.checked
    with writing_output():
        print(said.text if checked is None else twin.library.mark(checked, said.question), flush=True)
    for each in {citation.number: citation for citation in (checked.citations if checked is not None else ())}.values():
        where = ", ".join(part for part in (each.title, each.chapter) if part)
        say(f"[{each.number}] {where}, lines {each.first_line} to {each.last_line} ({each.file})")


def report_step(run: Path, wish: Wish, *, tp: int, pp: int) -> None:
    """Measure a twin, and write twin/report.json and twin/report.html.

    Raises:
        ValueError: the run is no twin or has no checkpoint, its folder can't be written, or a source of others' texts
            can't be read.
    """
    Twin.open(run)
    check_writable("the folder of the report,", run / TWIN)  # before what takes minutes
    log_to_terminal()

    async def measure() -> TwinReport:
        with stopping():
            return await make_report(run, wish, lambda path: ranks_of(path, tp=tp, pp=pp), say)

    found, folder = asyncio.run(measure()), run / TWIN
    write_text(folder / "report.json", found.model_dump_json(indent=1) + "\n")
    page = write_page(folder / "report.html", render(found, TwinRecord.read(folder)))
    say(f"report: {page}")
