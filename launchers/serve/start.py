"""`python -m trimaran.launchers.serve.start FOLDER`: the process that starts the ranks of a served model.

It ends, and its ranks with it, when the standard input is closed: the talker that has started it is gone then, however
it ended. Why it failed is written to a file of the folder.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from trimaran.launchers.env.exit_codes import Stopped, exit_code_after
from trimaran.launchers.serve.wish import SOCKET, StartFailure, read_wish, write_failure
from trimaran.launchers.terminal import is_for_users, sentence
from trimaran.runtime.files import write_text


def main() -> int:
    """Run the ranks of the folder on the command line; return the exit code once they have ended."""
    folder = Path(sys.argv[1])
    threading.Thread(target=_end_with_talker, name="talker", daemon=True).start()
    has_begun = False
    try:
        task = _prepare(folder)
        has_begun = True
        _run(folder, task)
    except Stopped as stopped:
        return exit_code_after(stopped.signal_number)
    except Exception as error:
        message = sentence(error) if is_for_users(error) else f"{type(error).__name__}: {error}"
        failure = StartFailure(message, is_wrong_value=not has_begun and is_for_users(error))
        write_failure(folder, failure)
        if not is_for_users(error):
            raise
        return 2 if failure.is_wrong_value else 1
    return 0


def _prepare(folder: Path) -> Path:
    """Write the spec of the ranks and their task; return the task's file."""
    from trimaran.launchers.worker.tasks import ServeTask
    from trimaran.runtime.evaluate.engine.weights import open_model
    from trimaran.runtime.spec import dump_spec

    wish = read_wish(folder)
    model = open_model(Path(wish.model), tp=wish.tp, pp=wish.pp, dp=wish.dp)
    write_text(folder / "spec.yaml", dump_spec(model.spec))
    task = ServeTask(
        spec=folder / "spec.yaml",
        model=model.origin.resolve(),
        socket=folder / SOCKET,
        slots=wish.slots,
        context=wish.context,
    )
    write_text(folder / "task.json", task.model_dump_json())
    return folder / "task.json"


def _run(folder: Path, task: Path) -> None:
    from trimaran.launchers.local.launch import launch_folder
    from trimaran.launchers.worker.run import run_alone
    from trimaran.launchers.worker.tasks import read_task
    from trimaran.runtime.spec import load_spec

    spec = load_spec(folder / "spec.yaml")
    if spec.world_size == 1:
        run_alone(read_task(task))
        return
    logs = read_wish(folder).logs
    launch_folder(folder, None if logs is None else Path(logs))


def _end_with_talker() -> None:
    while os.read(0, 1 << 10):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    from trimaran.launchers.worker.process import exit_process

    exit_process(main())
