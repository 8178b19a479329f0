"""A task: one input of a stage becomes files, written whole under a name that tells all that decides their content.

A task that was done before is not done again, whoever did it, so that a broken run goes on where it stopped; and the
same task done twice at once gives the same files, so that either may stay.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Protocol

from trimaran.runtime.data.engine.watch import Watch
from trimaran.runtime.data.files import KnownFile, NotPrepared, hash_file, new_folder, once_per_change
from trimaran.runtime.files import read_json

_RECORD = "task.json"
PIECE: Final = "{:05d}"
"""Folder of a piece of what a task writes, by its number."""

Progress = Callable[[str, int, int, int], None]
"""Called with the stage's name, and of its input the tasks done, all tasks, and the bytes done."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """What a finished task has written: its folder, and of every file the sha256 and the bytes.

    Attributes:
        result: what the task's function returned, JSON. A function that writes its output in pieces, each a folder
            named by PIECE, returns {"pieces": [the result of each]}.
    """

    folder: Path
    files: Mapping[str, tuple[str, int]]
    result: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """One sha256 of all files and their names."""
        return _digest({name: sha256 for name, (sha256, _) in self.files.items()})

    @property
    def pieces(self) -> "list[Output]":
        """The pieces that were written, each as an output; the whole where it is one."""
        if "pieces" not in self.result:
            return [self]
        found: list[Output] = []
        for number, result in enumerate(self.result["pieces"]):
            start = PIECE.format(number) + "/"
            files = {name.removeprefix(start): file for name, file in self.files.items() if name.startswith(start)}
            found.append(Output(self.folder / PIECE.format(number), files, result))
        return found

    @staticmethod
    def read(folder: Path) -> "Output | None":
        """Return what stands in `folder`, that of a task or of a piece.

        None where the task has not finished or its files are not what they were.
        """
        if not (folder / _RECORD).is_file():
            whole = Output.read(folder.parent) if (folder.parent / _RECORD).is_file() else None
            return next((piece for piece in whole.pieces if piece.folder == folder), None) if whole else None
        try:
            record = read_json(folder / _RECORD)
            files = {name: (str(sha256), int(size)) for name, (sha256, size) in record["files"].items()}
            if all((folder / name).stat().st_size == size for name, (_, size) in files.items()):
                return Output(folder, files, record["result"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        return None


@dataclass(frozen=True)
class Task:
    """One unit of work.

    Attributes:
        stage: folder of the stage's tasks, below the root.
        function: `module:name` of what does it: called with `arguments`, the input folders, an empty folder to fill and
            a `Watch`; returns JSON. The same arguments and inputs must give the same files to the byte.
        arguments: JSON.
        identity: what decides the content in the place of `arguments`, where these have more, as the path of a file.
        about: the input, for a person.
        inputs: what earlier tasks have written.
        versions: of the packages that decide the content.
        files: that `arguments` name, and whose content decides what is written.
    """

    stage: str
    function: str
    arguments: Mapping[str, Any]
    about: str
    inputs: tuple[Output, ...] = ()
    identity: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    files: tuple[KnownFile, ...] = ()

    @cached_property
    def key(self) -> str:
        """The name of the task's folder: a hash of function, arguments, the content of inputs and files, and versions.

        Files do not enter where there are none, so that work of before they did is found.
        """
        inputs = [given.digest for given in self.inputs]
        identity = self.arguments if self.identity is None else self.identity
        files = [[[file.path, file.sha256] for file in self.files]] if self.files else []
        return _digest([self.function, dict(identity), inputs, dict(self.versions), *files])[:24]

    def folder(self, root: Path) -> Path:
        """Return where its files stand, below `root`."""
        return root / self.stage / self.key

    def slow_file(self, root: Path) -> Path:
        """Return the file of the documents that took too long, beside the folder."""
        return (root / self.stage / f"{self.key}.slow.json").absolute()

    def found(self, root: Path) -> Output | None:
        """Return what an earlier run has written."""
        return Output.read(self.folder(root))

    def run(self, root: Path, watch: Watch) -> Output:
        """Do the task unless it is done; return what it wrote.

        Raises:
            DataError: one of `files` is not what it was.
        """
        folder = self.folder(root)
        found = self.found(root)
        if found is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)  # damaged
        module, _, name = self.function.partition(":")
        function = getattr(import_module(module), name)
        with new_folder(folder) as temporary:
            result = function(self.arguments, [given.folder for given in self.inputs], temporary, watch)
            for file in self.files:  # whenever the function has read it
                file.check()
            files = {
                str(path.relative_to(temporary)): (hash_file(path), path.stat().st_size)
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            record = {"about": self.about, "function": self.function, "files": files, "result": result}
            (temporary / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return Output(folder, files, result)


class TaskRunner(Protocol):
    """What does the tasks of a recipe, or finds what they have written."""

    @property
    def root(self) -> Path:
        """The folder in which tasks write."""

    def begin(self) -> None:
        """Prevent other processes from working in the folder."""

    def run(self, tasks: Sequence[Task], on_done: Callable[[Task, Output], None]) -> list[Output]:
        """Return the outputs of the tasks in their order; `on_done` is called with each."""


def run_stage(
    runner: TaskRunner,
    stage: str,
    tasks: Sequence[Task],
    progress: Progress,
    on_output: Callable[[Output], None] = lambda _: None,
) -> list[Output]:
    """Run the tasks of a stage and tell how far they are; return their outputs in order.

    Args:
        on_output: called with each as it ends, in any order.
    """
    done, size = 0, 0

    def on_done(task: Task, output: Output) -> None:
        nonlocal done, size
        del task
        done += 1
        size += sum(piece.result.get("text_bytes", {}).get("in", 0) for piece in output.pieces)
        progress(stage, done, len(tasks), size)
        on_output(output)

    progress(stage, 0, len(tasks), 0)
    return runner.run(tasks, on_done)


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@dataclass(frozen=True)
class InThisProcess:
    """Does the tasks that were not done before in this process, one after the other."""

    root: Path

    def begin(self) -> None:
        """Do nothing: tasks that two processes do at once give the same files."""

    def run(self, tasks: Sequence[Task], on_done: Callable[[Task, Output], None]) -> list[Output]:
        """Return the outputs of the tasks in their order."""
        outputs, found = [], find_outputs(tasks, self.root)
        for task in tasks:
            if task.key not in found:
                shutil.rmtree(task.folder(self.root), ignore_errors=True)  # damaged
                found[task.key] = task.run(self.root, Watch())
            on_done(task, found[task.key])
            outputs.append(found[task.key])
        return outputs


@dataclass(frozen=True)
class OnDisk:
    """Finds what tasks have written in earlier runs, and does none."""

    root: Path

    def begin(self) -> None:
        """Do nothing: no work is done."""

    def run(self, tasks: Sequence[Task], on_done: Callable[[Task, Output], None]) -> list[Output]:
        """Return the outputs of the tasks in their order.

        Raises:
            NotPrepared: one is missing.
        """
        outputs, found = [], find_outputs(tasks, self.root)
        for task in tasks:
            output = found.get(task.key)
            if output is None:
                raise NotPrepared(f"{task.about}: its stage {task.stage} is not done yet; run trimaran prepare")
            on_done(task, output)
            outputs.append(output)
        return outputs


def find_outputs(tasks: Sequence[Task], root: Path) -> dict[str, Output]:
    """Return what earlier runs have written for the tasks of one stage, by key.

    Files that have changed since they were last read are read once and compared with their sha256. A damaged output is
    told, and counts as not there.
    """
    found = {task.key: output for task in tasks if (output := task.found(root)) is not None}
    damaged = damaged_files(list(found.values()), root / "checked" / f"{tasks[0].stage}.json") if found else []
    for path in damaged:
        logger.warning("%s is not what was written there; its task is done again", path)
    folders = {folder for path in damaged for folder in path.parents}
    return {key: output for key, output in found.items() if output.folder not in folders}


def damaged_files(outputs: Sequence[Output], record: Path) -> list[Path]:
    """Return the files whose content is not what their task has written.

    Args:
        record: see `once_per_change`.
    """
    files = [(output.folder / name, sha256) for output in outputs for name, (sha256, _) in output.files.items()]
    hashes = once_per_change([path for path, _ in files], record, hash_file)
    return [path for (path, sha256), found in zip(files, hashes, strict=True) if found != sha256]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
