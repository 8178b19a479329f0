"""The seconds that tests took, recorded, and the table of tests/README.md that is made of them.

    python -m tests.durations               write the table anew, from the seconds that are recorded
    python -m tests.durations --take        before that, record what the sessions since the last time took

A session that passes, of all tests or some, leaves the seconds of its functions in .cache/tests/durations.json. The
table names every file of tests: the promise that it holds, which is the first sentence of its docstring, and its
seconds.
"""

import ast
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.scheduling import RECORD, SHORTEST_RECORDED_S, function_of, recorded_seconds

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "tests" / "README.md"
LEFT = ROOT / ".cache" / "tests" / "durations.json"
"""What sessions left: node id of a function -> seconds of all its cases that ran."""
_START, _END = "<!-- table -->\n", "<!-- end of table -->\n"


class Durations:
    """A pytest plugin that adds up what each test function takes: set-up, call and teardown of all its cases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, node_id: str, seconds: float) -> None:
        """Add the seconds of one phase of one test."""
        function = function_of(node_id)
        self.seconds[function] = self.seconds.get(function, 0.0) + seconds

    def leave(self, file: Path = LEFT) -> None:
        """Add the seconds to those that earlier sessions left; a function's latest count."""
        seconds = (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}) | self.seconds
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}-{os.getpid()}")
        new.write_text(json.dumps({name: round(each, 2) for name, each in seconds.items()}), encoding="utf-8")
        new.replace(file)


def merged(recorded: Mapping[str, float], left: Mapping[str, float]) -> dict[str, float]:
    """Return the record with the seconds that sessions left, of functions that still exist and take long enough."""
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files_of_tests()}
    found = {}
    for function, seconds in sorted({**recorded, **left}.items()):
        file, _, name = function.rpartition("::")
        if seconds >= SHORTEST_RECORDED_S and f"def {name}(" in texts.get(file, ""):
            found[function] = seconds
    return found


def take(file: Path = LEFT) -> None:
    """Record what sessions left."""
    recorded = merged(recorded_seconds(), json.loads(file.read_text(encoding="utf-8")))
    RECORD.write_text(json.dumps(recorded, indent=0) + "\n", encoding="utf-8")
    file.unlink()


def files_of_tests() -> list[Path]:
    """Return every file of tests."""
    return sorted((ROOT / "tests").rglob("test_*.py"))


def promise(file: Path) -> str:
    """Return the first sentence of a test file's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def table(recorded: Mapping[str, float]) -> str:
    """Return the table of promises, test files and seconds, the dearest folder's files together."""
    seconds: dict[str, float] = {}
    for function, taken in recorded.items():
        file = function.partition("::")[0]
        seconds[file] = seconds.get(file, 0.0) + taken
    rows = []
    for file in files_of_tests():
        name = file.relative_to(ROOT).as_posix()
        rows.append(f"| {promise(file)} | [{name.removeprefix('tests/')}]({name.removeprefix('tests/')}) |")
        rows[-1] += f" {seconds.get(name, 0.0):.1f} |"
    return "\n".join(["| promise | test file | seconds |", "|---|---|---:|", *rows]) + "\n"


def page_with(text: str) -> str:
    """Return tests/README.md with `text` as its table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_START)
    return f"{before}{_START}\n{text}\n{_END}{rest.partition(_END)[2]}"


if __name__ == "__main__":
    if "--take" in sys.argv:
        take()
    PAGE.write_text(page_with(table(recorded_seconds())), encoding="utf-8")
