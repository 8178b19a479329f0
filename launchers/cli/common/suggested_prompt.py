"""The prompt of the commands that `trimaran train` suggests at its end."""

import shlex
from pathlib import Path

from trimaran.launchers.worker.tasks import TrainTask, read_task


def suggested_prompt(run: Path) -> str | None:
    """Return the first words of a run's held-out text, or of what it trained on; None where it learned from examples.

    Imports what reads prepared data.
    """
    from trimaran.runtime.data.opening import opening_of
    from trimaran.runtime.data.prepare import PreparedData
    from trimaran.runtime.train.samples import open_data

    task = read_task(run / "logs" / "task.json")
    data = open_data(task.data) if isinstance(task, TrainTask) else None
    if not isinstance(data, PreparedData):
        return None
    return opening_of(data) or None


def in_quotes(text: str) -> str:
    """Return a text as one word for a shell; an apostrophe, as in Turkish names, stays readable in double quotes."""
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)
