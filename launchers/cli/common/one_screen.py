"""The help of commands on one screen: short words for kinds of values, and defaults in the sentence."""

from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Final, get_args

_WORDS: Final = MappingProxyType({int: "N", float: "X", str: "TEXT", Path: "PATH", list[str]: "TEXT"})


def shorten_help(command: Any) -> Any:
    """Return a command of typer, or a group with all of its commands, whose help takes fewer lines.

    Typer has a wide column for `<int range>` and the like, and a line of its own for many a default.
    """
    for param in command.params:
        if param.param_type_name != "option":
            continue
        if param.metavar is None:
            param.metavar = "" if param.is_flag else _word_of(param)
        if param.show_default and _is_worth_saying(param.default):
            param.help = f"{(param.help or '').removesuffix('.')} (default {param.default})."
            param.show_default = False
    for each in getattr(command, "commands", {}).values():
        shorten_help(each)
    return command


def _is_worth_saying(default: object) -> bool:
    return default is not None and default is not False and default not in ([], (), "")


def _word_of(param: Any) -> str | None:
    """Return the word for an option's value; None leaves typer's own, which lists choices."""
    kind: Any = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    plain = [each for each in get_args(kind) if each is not NoneType] if kind not in _WORDS else [kind]
    return _WORDS.get(plain[0]) if len(plain) == 1 else None
