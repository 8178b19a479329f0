"""The rules of the house: which room may import which, what is installed, and how long, typed and documented code is.

Everything is read from the source with `ast`; nothing of trimaran is imported. A failing test lists every place.
"""

import ast
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import pytest

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

ROOT = Path(__file__).parents[1]
FLOORS = {"kernels": 1, "models": 2, "runtime": 3, "launchers": 4, "package": 5}
ROOMS = tuple(FLOORS)[:4]
"""Folders that are packages under their own name; the folder `package` is `trimaran` itself."""
LONGEST_FUNCTION = 80  # lines, without the docstring
LONGEST_FILE = 600
# Installed with us, yet not to be paid for at import by those who do not use them: one file may.
OPTIONAL_PACKAGES = (
    "deepspeed",
    "mpi4py",
    "matplotlib",
    "tensorboard",
    "rich",
    "tokenizers",
    "transformers",
    "scipy",
    "optuna",
    "cmaes",
    "sklearn",
)
# A run spec is checked in under a second and a schedule is drawn on a machine without torch; the command line starts at
# once.
WITHOUT_TORCH = (
    "models/config.py",
    "models/fields.py",
    "models/presets/*.py",
    "models/shape/*.py",
    "runtime/spec/**/*.py",
    "runtime/pipeline/schedule.py",
    "runtime/pipeline/passes.py",
    "runtime/pipeline/simulate.py",
    "runtime/pipeline/draw.py",
    "runtime/pipeline/partition.py",
    "runtime/plan/**/*.py",
    "package/__init__.py",
    "launchers/api/*.py",
    "launchers/cli/app.py",
    "launchers/cli/planning/calibrate.py",
    "launchers/cli/planning/plan.py",
    "launchers/cli/planning/presets.py",
    "launchers/data/run_plan.py",
)
# Methods that torch calls and documents.
FRAMEWORK_METHODS = {"forward", "backward", "setup_context", "extra_repr"}


@cache
def source_files() -> dict[str, Path]:
    """Return every Python file of the package by module name without `trimaran.`; a package has its own name."""
    found = {}
    for room in FLOORS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    """Return the parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Return every node of the file, which most tests look at."""
    return tuple(ast.walk(tree(path)))


def place(path: Path, node: ast.AST | None = None) -> str:
    """Return where something is, to be clicked on."""
    line = getattr(node, "lineno", None)
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))


def imported_names(node: ast.AST) -> list[str]:
    """Return the full dotted names that an import statement may stand for, or nothing for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def own_modules(node: ast.AST) -> list[str]:
    """Return our modules that an import statement reads, named as in `source_files`."""
    found = []
    for name in imported_names(node):
        if name.split(".")[0] != "trimaran":
            continue
        name = name.removeprefix("trimaran.")
        while name and name not in source_files():  # `from trimaran.models.config import X` reads models.config
            name = name.rpartition(".")[0]
        if name:
            found.append(name)
    return found


def runs_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Walk the statements that run at import: not function bodies, not what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from chain.from_iterable(runs_at_import(statement) for statement in child.orelse)
            continue
        yield child
        yield from runs_at_import(child)


@cache
def nodes_at_import(path: Path) -> tuple[ast.AST, ...]:
    """Return the nodes of the file that run at import."""
    return tuple(runs_at_import(tree(path)))


def functions(path: Path) -> list[Function]:
    """Return every function and method of a file, nested ones too."""
    return [node for node in nodes(path) if isinstance(node, Function)]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the circles of a directed graph that a depth-first walk meets, each as `a -> b -> a`."""
    open_path: list[str] = []
    done: set[str] = set()
    found = []

    def visit(name: str) -> None:
        open_path.append(name)
        for target in sorted(graph[name]):
            if target in open_path:
                found.append(" -> ".join([*open_path[open_path.index(target) :], target]))
            elif target not in done:
                visit(target)
        done.add(open_path.pop())

    for name in sorted(graph):
        if name not in done:
            visit(name)
    return found


def test_imports_run_down_only() -> None:
    wrong = [
        f"{place(path, node)}: {path.relative_to(ROOT).parts[0]} imports {target}"
        for path in source_files().values()
        for node in nodes(path)
        for target in own_modules(node)
        if FLOORS[target.split(".")[0]] > FLOORS[path.relative_to(ROOT).parts[0]]
    ]
    assert not wrong, "\n".join(wrong)


OPENED_BY_NAME = {"gzip.open", "tarfile.open", "safe_open", "np.memmap"}
OPENED_ELSEWHERE = {"system.open"}  # fsspec's, of another machine, where no pipe is


def opens_any_file(call: ast.Call) -> bool:
    """Whether a call reads the file of a path without `check_regular`."""
    function, argument = ast.unparse(call.func), call.args[0] if call.args else None
    if function in OPENED_BY_NAME:
        return not (isinstance(argument, ast.Call) and ast.unparse(argument.func) == "check_regular")
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "read_bytes"):
        return True
    if function in OPENED_ELSEWHERE or (
        function != "open" and not re.fullmatch(r"[a-z].*\.open", function)
    ):  # Checkpoint.open is no file's
        return False
    words = (*call.args, *(word.value for word in call.keywords))
    writes = any(isinstance(each, ast.Constant) and re.fullmatch("[wax][bt+]*", str(each.value)) for each in words)
    return not writes and function != "os.open" and not function.startswith("check_regular(")


def test_only_regular_files_are_opened_for_reading() -> None:
    """A pipe in the place of a file would hold a run up for ever, and a device would fill the memory."""
    wrong = [
        f"{place(path, node)}: {ast.unparse(node)} may open a pipe; use trimaran.runtime.files"
        for room in ("runtime", "launchers")
        for path in sorted((ROOT / room).rglob("*.py"))
        if path != ROOT / "runtime" / "files.py"
        for node in nodes(path)
        if isinstance(node, ast.Call) and opens_any_file(node)
    ]
    assert not wrong, "\n".join(wrong)
    for code in ("path.read_text()", "open(path)", "path.open('rb')", "gzip.open(path)", "safe_open(path, 'pt')"):
        call = ast.parse(code, mode="eval").body
        assert isinstance(call, ast.Call)
        assert opens_any_file(call), code


def longest_path(graph: dict[str, set[str]]) -> list[str]:
    """Return the longest path of a directed graph without circles."""

    @cache
    def longest_from(name: str) -> list[str]:
        return [name, *max((longest_from(target) for target in sorted(graph[name])), key=len, default=[])]

    return max((longest_from(name) for name in sorted(graph)), key=len)


def launchers_by_file() -> dict[str, set[str]]:
    """Return which files of launchers each of them imports, inside functions too; empty packages are left out."""
    files = {
        name: path for name, path in source_files().items() if name.startswith("launchers.") and tree(path).body[1:]
    }
    return {
        name: {target for node in nodes(path) for target in own_modules(node)} & files.keys() - {name}
        for name, path in files.items()
    }


def launchers_by_room() -> dict[str, set[str]]:
    """Return which rooms of launchers each of them imports: its folders, and the files that stand beside them."""
    rooms: dict[str, set[str]] = {}
    for name, targets in launchers_by_file().items():
        rooms.setdefault(name.split(".")[1], set()).update(target.split(".")[1] for target in targets)
    return {room: targets - {room} for room, targets in rooms.items()}


@pytest.mark.parametrize(
    ("what", "graph_of", "most_floors"), [("files", launchers_by_file, 8), ("rooms", launchers_by_room, 6)]
)
def test_a_call_climbs_few_floors_of_launchers(
    what: str, graph_of: Callable[[], dict[str, set[str]]], most_floors: int
) -> None:
    graph = graph_of()
    assert not circles(graph), "\n".join(circles(graph))
    path = longest_path(graph)
    arrows, floors = sum(map(len, graph.values())), len(path)
    print(f"launchers: {len(graph)} {what}, {arrows} arrows, {floors} floors: {' -> '.join(path)}")
    print("launchers as flat files (24 and 2 folders) had 82 arrows and 10 floors")
    assert floors <= most_floors, f"{floors} floors, over {most_floors}: {' -> '.join(path)}"


def test_the_longest_path_is_found() -> None:
    assert longest_path({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]


def test_no_circle_between_files() -> None:
    graph = {
        name: {t for node in nodes(path) for t in own_modules(node)} - {name} for name, path in source_files().items()
    }
    assert not circles(graph), "\n".join(circles(graph))


def test_the_search_for_circles_finds_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]


def test_imports_are_absolute_and_carry_the_name_of_the_package() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    wrong = [
        f"{place(path, node)}: {ast.unparse(node)}"
        for path in [*source_files().values(), *tests]
        for node in nodes(path)
        if (isinstance(node, ast.ImportFrom) and node.level)
        or any(name.split(".")[0] in FLOORS for name in imported_names(node))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {".".join(("trimaran", *path.parent.relative_to(ROOT).parts)) for path in source_files().values()}
    folders = (folders - {"trimaran.package"}) | {"trimaran"}
    assert listed == folders, (
        f"not in pyproject.toml: {sorted(folders - listed)}; not on disk: {sorted(listed - folders)}"
    )
    without_init = [
        name
        for name in folders
        if name != "trimaran" and not (ROOT / name.removeprefix("trimaran.").replace(".", "/") / "__init__.py").exists()
    ]
    assert not without_init, f"no __init__.py in {without_init}"
    assert not (ROOT / "__init__.py").exists()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_marked_as_typed_and_linked_for_the_type_checkers(room: str) -> None:
    assert (ROOT / room / "py.typed").exists()
    link = ROOT / ".typing" / "trimaran" / room
    assert link.is_symlink(), f"{link.relative_to(ROOT)} is not a symlink"
    assert os.readlink(link) == f"../../{room}"


def test_the_package_itself_is_marked_as_typed_and_linked_for_the_type_checkers() -> None:
    assert (ROOT / "package" / "py.typed").exists()
    assert os.readlink(ROOT / ".typing" / "trimaran" / "__init__.py") == "../../package/__init__.py"


def test_no_function_is_too_long() -> None:
    wrong = []
    for path in source_files().values():
        for function in functions(path):
            docstring = ast.get_docstring(function, clean=False)
            lines = (function.end_lineno or 0) - function.lineno + 1 - (len(docstring.splitlines()) if docstring else 0)
            if lines > LONGEST_FUNCTION:
                wrong.append(f"{place(path, function)}: {function.name} has {lines} lines, over {LONGEST_FUNCTION}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files().values()}
    wrong = [
        f"{place(path)}: {lines} lines, over {LONGEST_FILE}" for path, lines in lengths.items() if lines > LONGEST_FILE
    ]
    assert not wrong, "\n".join(wrong)


def test_lines_of_pages_and_settings_end_at_120_columns() -> None:
    """Python files are ruff's (E501). A row of a table can't be broken."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    others = [ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run", "tests/README.md")]
    wrong = [
        f"{place(path)}:{number}: {len(line)} columns"
        for path in [*pages, *others, *(ROOT / "examples").glob("*.yaml")]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line.expandtabs(4)) > 120 and not line.startswith("|")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_global_statement() -> None:
    wrong = [
        place(path, node) for path in source_files().values() for node in nodes(path) if isinstance(node, ast.Global)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_to_do_in_a_comment() -> None:
    words = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
    others = [
        path
        for folder in ("tests", "examples", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    ]
    wrong = [
        f"{place(path)}:{number}: {line.strip()}"
        for path in [
            *source_files().values(),
            *(path for path in others if path.suffix in (".py", ".yaml", ".md")),
            ROOT / "Makefile",
        ]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_function_is_fully_typed() -> None:
    wrong = []
    for path in source_files().values():
        for function in functions(path):
            signature = function.args
            arguments = [
                *signature.posonlyargs,
                *signature.args,
                *signature.kwonlyargs,
                signature.vararg,
                signature.kwarg,
            ]
            bare = [
                arg.arg
                for arg in arguments
                if arg is not None and arg.annotation is None and arg.arg not in ("self", "cls")
            ]
            if bare or function.returns is None:
                wrong.append(f"{place(path, function)}: {function.name}: {', '.join(bare) or 'what it returns'}")
    assert not wrong, "\n".join(wrong)


def test_every_public_function_and_class_has_a_docstring() -> None:
    wrong = []

    def is_described_elsewhere(node: Function | ast.ClassDef) -> bool:
        """Return whether the node is a setter, an overload, a method of torch's, or an attribute of a protocol."""
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        is_attribute = "property" in decorators and ast.unparse(node.body[0]) == "..."
        return (
            is_attribute
            or node.name in FRAMEWORK_METHODS
            or any(text.endswith((".setter", "overload")) for text in decorators)
        )

    def look(path: Path, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and not is_described_elsewhere(node):
                    wrong.append(f"{place(path, node)}: {node.name}")
                if isinstance(node, ast.ClassDef):
                    look(path, node.body)

    for path in source_files().values():
        look(path, tree(path).body)
    assert not wrong, "\n".join(wrong)


def test_only_launchers_read_the_environment_and_the_command_line() -> None:
    forbidden = {"os.environ", "os.environb", "os.getenv", "os.putenv", "sys.argv"}
    wrong = []
    for name, path in source_files().items():
        if name.split(".")[0] == "launchers":
            continue
        for node in nodes(path):
            uses = [ast.unparse(node)] if isinstance(node, ast.Attribute) else imported_names(node)
            wrong += [f"{place(path, node)}: {use}" for use in uses if use in forbidden]
    assert not wrong, "\n".join(wrong)


def test_only_one_file_initialises_the_process_group() -> None:
    wrong = [
        place(path, node)
        for name, path in source_files().items()
        if name != "launchers.worker.process_group"
        for node in nodes(path)
        if (isinstance(node, ast.Attribute) and node.attr == "init_process_group")
        or any(target.endswith(".init_process_group") for target in imported_names(node))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", OPTIONAL_PACKAGES)
def test_at_most_one_file_imports_an_optional_package_at_import(package: str) -> None:
    files = {
        place(path)
        for path in source_files().values()
        for node in nodes_at_import(path)
        for name in imported_names(node)
        if name.split(".")[0] == package or name.startswith(f"torch.utils.{package}")
    }
    assert len(files) <= 1, f"{package} is imported by {sorted(files)}; import it inside the functions that use it"


def test_only_the_kernels_import_triton() -> None:
    wrong = [
        place(path, node)
        for name, path in source_files().items()
        if name.split(".")[0] != "kernels"
        for node in nodes(path)
        for imported in imported_names(node)
        if imported.split(".")[0] == "triton"
    ]
    assert not wrong, "\n".join(wrong)


def test_what_must_be_quick_reaches_no_torch() -> None:
    modules = source_files()
    at_import: dict[str, set[str]] = {}
    torch_users = set()
    for name, path in modules.items():
        run = nodes_at_import(path)
        at_import[name] = {target for node in run for target in own_modules(node)}
        if any(imported.split(".")[0] == "torch" for node in run for imported in imported_names(node)):
            torch_users.add(name)
    names = {path: name for name, path in modules.items()}
    wrong = []
    for start in (names[path] for pattern in WITHOUT_TORCH for path in sorted(ROOT.glob(pattern))):
        reached, waiting = {start: start}, [start]
        while waiting:
            name = waiting.pop()
            parents = {name.rpartition(".")[0]} & modules.keys()  # importing a.b runs a/__init__.py first
            for target in (at_import[name] | parents) - reached.keys():
                reached[target] = f"{reached[name]} -> {target}"
                waiting.append(target)
        wrong += [f"{chain_} -> torch" for name, chain_ in sorted(reached.items()) if name in torch_users]
    assert not wrong, "\n".join(wrong)


def test_every_dependency_is_pinned_and_no_pin_names_a_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    pins = [
        line for name in ("constraints.txt", "constraints-cpu.txt") for line in (ROOT / name).read_text().splitlines()
    ]
    wrong = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line)]
    assert not wrong, f"not of the form NAME==VERSION: {wrong}"

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {plain(line.split("==")[0]) for line in pins}
    missing = [line for line in wanted if plain(re.split(r"[^A-Za-z0-9_.-]", line)[0]) not in pinned]
    assert not missing, f"no pin for {missing}"
