"""A user's own task in a YAML file: what it includes and which code it names, looked at before anything of it runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from trimaran.runtime.data.files import DataError
from trimaran.runtime.files import read_bytes

FUNCTION: Final = "!function"
_PLAIN: Final = "tag:yaml.org,2002:"
_TYPES: Final = frozenset(f"{_PLAIN}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge"))
_MOST_INCLUDES: Final = 100


def check_task_file(path: Path, *, allow_code: bool) -> None:
    """Raise DataError where a task's file, or one that it includes, is no YAML or names code that is not allowed.

    Nothing of what the files name is imported.
    """
    waiting, seen = [path], set[Path]()
    while waiting:
        file = waiting.pop().resolve()
        if file in seen:
            continue
        seen.add(file)
        if len(seen) > _MOST_INCLUDES:
            raise DataError(f"{path} includes more than {_MOST_INCLUDES} files; write what it needs into fewer")
        root = _parsed(file)
        for node in _nodes(root):
            place = f"{file}, line {node.start_mark.line + 1}"
            if node.tag == FUNCTION:
                if not allow_code:
                    raise DataError(
                        f"{place}: {FUNCTION} {node.value} runs code of that file's folder; read it, and give "
                        "--allow-code where you trust it, or write a template in its place"
                    )
            elif node.tag not in _TYPES:
                raise DataError(
                    f"{place}: {node.tag} is no value of a task; write a text, a number, a list or a record"
                )
        waiting += [file.parent / name for name in _includes(root)]


def _parsed(path: Path) -> yaml.MappingNode:
    try:
        root = yaml.compose(read_bytes(path, 1 << 24), Loader=yaml.SafeLoader)
    except OSError as error:
        raise DataError(f"cannot read the task file {path}: {error.strerror}; name one that is there") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"the task file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise DataError(f"the task file {path} must be a record of fields, such as task: and dataset_path:")
    return root


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    waiting: list[Any] = [node]
    seen = set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:  # an alias
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, yaml.MappingNode):
            waiting += [part for pair in each.value for part in pair]
        elif isinstance(each, yaml.SequenceNode):
            waiting += each.value


def _includes(root: yaml.MappingNode) -> list[str]:
    for key, value in root.value:
        if key.value == "include":
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            return [str(part.value) for part in parts]
    return []
