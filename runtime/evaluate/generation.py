"""Settings of generation, by their names in lm-eval, which takes any value as it is, to those of our sampling."""

import math
from collections.abc import Mapping
from typing import Any, Final

from trimaran.runtime.data.files import DataError

MAX_NEW_TOKENS: Final = 256  # of lm-eval's `hf` backend where a task does not say
SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Settings that have the same name in our sampling."""
_LENGTHS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_WHOLE: Final = frozenset({*_LENGTHS, "max_length", "top_k"})
_OF_DRAWS: Final = ("temperature", "top_k", "top_p", "min_p")


def check_settings(settings: object, place: str) -> dict[str, Any]:
    """Return the settings that have a value, each of its type.

    Args:
        place: the task and the document, or the option, for errors.

    Raises:
        DataError: a setting is unknown, or its value is of another type.
    """
    if not isinstance(settings, Mapping):
        raise DataError(f"{place}: generation_kwargs must be a record of settings, and it is {settings!r}")
    found = {}
    for name, value in settings.items():
        if value is not None:
            found[name] = _checked(name, value, place)
    return found


def _checked(name: str, value: Any, place: str) -> Any:
    if name == "until":
        texts = value if isinstance(value, list) else [value]
        if all(isinstance(each, str) for each in texts):
            return value
        rule = "a text or a list of texts"
    elif name == "do_sample":
        if isinstance(value, bool):
            return value
        rule = "true or false"
    elif name in _WHOLE or name in SAMPLING:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and (name not in _WHOLE or value == int(value)):
            return int(value) if name in _WHOLE else value
        rule = "a whole number" if name in _WHOLE else "a number"
    else:
        raise DataError(
            f"{place}: generation has no setting {name}; take until, max_gen_toks, do_sample, {', '.join(SAMPLING)}"
        )
    raise DataError(f"{place}: {name} must be {rule}, and it is {value!r}")


def with_options(own: object, options: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return a task's own settings with those of `--gen` in their place.

    Raises:
        DataError: a setting is wrong, or it would have no effect.
    """
    place = f"--gen, for the task {task}"
    asked = check_settings(options, "--gen")
    whole = {**check_settings(own or {}, f"task {task}"), **asked}
    if any(name in asked for name in _LENGTHS):  # in the place of the task's, whatever name that has
        whole = {name: value for name, value in whole.items() if name not in _LENGTHS or name in asked}
    temperature = whole.get("temperature", 0.0)
    draws = whole.get("do_sample", temperature > 0)
    if draws and not temperature:
        raise DataError(f"{place}: with do_sample=true nothing is drawn at temperature 0; add --gen temperature=0.7")
    idle = [name for name in _OF_DRAWS if asked.get(name) and not draws]
    if idle:
        raise DataError(
            f"{place}: {idle[0]}={asked[idle[0]]} has no effect where nothing is drawn; add --gen do_sample=true"
            + ("" if temperature else " and --gen temperature=0.7")
        )
    return whole
