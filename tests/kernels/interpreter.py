"""Triton's interpreter without the work that it throws away: the same results in less than half the time.

That a kernel is interpreted is fixed when it is decorated, so a process that interprets kernels imports them anew.
"""

import dataclasses
import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

from triton.runtime import interpreter

from tests.launchers.forked import Forked, fork_server

ROOT = Path(__file__).parents[2]
_ANEW = """
import sys
from torch.library import Library
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in ("triton", "trimaran") and not name.startswith("triton._C"):
        for each in list(vars(module).values()):
            if isinstance(each, Library):
                each._destroy()  # else its operators could not be registered again
        del sys.modules[name]
sys.path.append(sys.argv.pop(1))  # last, so that only `tests.` is found by it
"""


def start_interpreted(
    code: str, arguments: Sequence[str], streams: Sequence[IO[Any]], preload: Sequence[str]
) -> Forked:
    """Start a program text in a fork of the fork server's process, where Triton's kernels are interpreted.

    Args:
        streams: what are the program's standard input, output and errors.
        preload: modules that the fork server imports before.
    """
    fork_server()
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    descriptors = {number: stream.fileno() for number, stream in enumerate(streams)}
    words = ["-c", _ANEW + code, str(ROOT), *arguments]
    return Forked(words, ROOT, descriptors, environment, preload=preload)


@cache
def _builtin_names(package: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(package) if interpreter.tl.core.is_builtin(getattr(package, name, None)))


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """Patch as the interpreter's function of this name does; names are looked up once a process, not at every call."""
    for name in _builtin_names(package):
        member = getattr(package, name)
        if interpreter.tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


_LANGUAGES: dict[int, list[Any]] = {}
"""Identity of a function's globals -> the modules of the language that it sees."""


def _patch_lang(fn: Any, real: Any) -> Any:
    """Patch as the interpreter's function of this name does, unless a caller's patch of the same modules still holds.

    The interpreter patches at every call of a function inside a kernel.
    """
    found = _LANGUAGES.get(id(fn.__globals__))
    if found is None:
        languages = (interpreter.tl, interpreter.tl.core)
        found = [value for value in fn.__globals__.values() if any(value is each for each in languages)]
        _LANGUAGES[id(fn.__globals__)] = found
    if found and all(language.range.__name__ == "_new_range" for language in found):
        return interpreter._LangPatchScope()
    return real(fn)


def speed_up() -> None:
    """Make the interpreter patch the language once a kernel, and not compute overflow checks that it never reads.

    The checks of integer overflow are computed at every sum and product, and dropped unless Triton's debug option is
    on. Where another version of Triton has other internals, nothing is changed.
    """
    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = _patch_builtin
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = partial(_patch_lang, real=interpreter._patch_lang)
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if not getattr(options, "debug", True) and hasattr(options, "sanitize_overflow"):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
