"""What a task's configuration may say, checked before it is built: lm-eval tells some of it after all generation."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final

import jinja2
from lm_eval.api.registry import aggregation_registry, filter_registry, metric_registry
from lm_eval.config.task import TaskConfig
from lm_eval.utils import env as templates

from trimaran.runtime.data.files import DataError

TEMPLATES: Final = (
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "description",
    "gen_prefix",
    "doc_to_decontamination_query",
)
"""Fields whose text is a template."""
_NAMES: Final = frozenset(each.name for each in fields(TaskConfig))
_FUNCTION: Final = "a function, written !function FILE.NAME"
_KINDS: Final[Mapping[str, tuple[Any, str]]] = {
    "custom_dataset": (Callable, _FUNCTION),
    "process_docs": (Callable, _FUNCTION),
    "process_results": (Callable, _FUNCTION),
    "description": (str, "a text"),
    "target_delimiter": (str, "a text"),
    "fewshot_delimiter": (str, "a text"),
    "dataset_kwargs": (Mapping, "a record"),
    "generation_kwargs": (Mapping, "a record of settings, such as until and max_gen_toks"),
    "metric_list": (list, "a list of records, such as - metric: acc"),
    "filter_list": (list, "a list of records with name and filter"),
}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise DataError where a template or regex of a task does not compile, or a metric or filter is unknown."""
    name = config["task"]
    _check_fields(name, config)
    records = [("", config)]
    if isinstance(config.get("fewshot_config"), dict):
        records.append(("fewshot_config.", config["fewshot_config"]))
    for prefix, record in records:
        for key in TEMPLATES:
            if isinstance(record.get(key), str):
                try:
                    templates.from_string(record[key])
                except jinja2.TemplateSyntaxError as error:
                    raise DataError(
                        f"the task {name}: the template {prefix}{key} is wrong at line {error.lineno}: {error.message}"
                    ) from error
    for metric in config.get("metric_list") or ():
        known = metric.get("metric")
        if isinstance(known, str) and (
            metric.get("hf_evaluate") or (known not in metric_registry and not config.get("process_results"))
        ):
            raise DataError(
                f"the task {name}: the metric {known} is none of lm-eval's own, and nothing is downloaded; take one of "
                f"{', '.join(sorted(metric_registry.keys()))}"
            )
        aggregation = metric.get("aggregation")
        if isinstance(aggregation, str) and aggregation not in aggregation_registry:
            known_ones = ", ".join(sorted(aggregation_registry.keys()))
            raise DataError(f"the task {name}: there is no aggregation {aggregation}; take one of {known_ones}")
        for pattern in metric.get("regexes_to_ignore") or ():
            _check_regex(name, "metric_list.regexes_to_ignore", pattern)
    for each in config.get("filter_list") or ():
        for step in each["filter"]:
            _check_filter(name, each.get("name"), step)


def _check_fields(name: str, config: Mapping[str, Any]) -> None:
    """Raise DataError where a field is unknown, missing or of another type."""
    for key, value in config.items():
        if key not in _NAMES:
            close = difflib.get_close_matches(key, _NAMES, n=1)
            remedy = f"did you mean {close[0]}?" if close else "remove it"
            raise DataError(f"the task {name}: {key} is no field of a task; {remedy}")
        if key in _KINDS and value is not None and not isinstance(value, _KINDS[key][0]):
            raise DataError(f"the task {name}: {key} must be {_KINDS[key][1]}, and it is {value!r}")
    for key, least in (("num_fewshot", 0), ("repeats", 1)):
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or value < least):
            raise DataError(f"the task {name}: {key} must be a whole number of at least {least}, and it is {value!r}")
    for key, inner in (("metric_list", "metric"), ("filter_list", "filter")):
        for each in config.get(key) or ():
            if not isinstance(each, Mapping) or inner not in each:
                raise DataError(f"the task {name}: {key} must be {_KINDS[key][1]}, and it has {each!r}")
            steps = each[inner] if inner == "filter" else []
            if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
                raise DataError(f"the task {name}: filter_list.filter must be a list of records with function")
    needed = ["doc_to_text", "doc_to_target"]
    needed += ["doc_to_choice"] if config.get("output_type") == "multiple_choice" else []
    missing = [key for key in needed if config.get(key) is None]
    if missing and config.get("use_prompt") is None:
        raise DataError(f"the task {name} needs the field {missing[0]}, a template such as '{{{{question}}}}'")


def _check_filter(task: str, name: str, step: Mapping[str, Any]) -> None:
    options = {key: value for key, value in step.items() if key != "function"}
    if step.get("function") not in filter_registry:
        known = ", ".join(sorted(filter_registry.keys()))
        raise DataError(f"the task {task}: the filter {name} has no function {step.get('function')!r}; take {known}")
    for key, value in options.items():
        if "regex" in key:
            _check_regex(task, f"filter_list.{name}.{key}", value)
    try:
        filter_registry.get(step["function"])(**options)
    except TypeError as error:
        raise DataError(f"the task {task}: the filter {name}, {step['function']}: {error}") from error


def _check_regex(task: str, place: str, pattern: object) -> None:
    try:
        re.compile(str(pattern))
    except re.error as error:
        raise DataError(f"the task {task}: the regex {place} ({pattern}) does not compile: {error}") from error
