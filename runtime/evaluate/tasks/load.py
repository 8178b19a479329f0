"""The tasks of an evaluation: what is wrong with names, data, templates and examples is told before weights load."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimaran.runtime.data.extras import require_extra
from trimaran.runtime.data.files import DataError
from trimaran.runtime.evaluate.datasets import Library
from trimaran.runtime.evaluate.generation import with_options
from trimaran.runtime.evaluate.options import SEED, check_limit
from trimaran.runtime.evaluate.tasks.catalog import ALIASES, MEANS, shots_of


@dataclass(frozen=True)
class TaskSet:
    """The tasks of an evaluation.

    Args:
        names: as they were asked for.
        tasks: name -> lm-eval's task; of groups their tasks.
        groups: name -> lm-eval's group.
        limit: most documents of a task, below 1 their share; None for all.
        seed: of the draw of few-shot examples.
    """

    names: tuple[str, ...]
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    limit: float | None = None
    seed: int = SEED

    def hashes(self) -> dict[str, dict[str, str]]:
        """Return the sha256 of every task's configuration, `tasks`, and of every file of its documents, `data`."""
        digests = {}
        for name, task in self.tasks.items():
            text = json.dumps(plain(task.dump_config()), sort_keys=True)
            digests[name] = hashlib.sha256(text.encode()).hexdigest()
        files = [getattr(task, "files", {}) for task in self.tasks.values()]
        return {"tasks": digests, "data": {path: digest for each in files for path, digest in each.items()}}


def plain(value: Any) -> Any:
    """Return a configuration as JSON has it; functions by their name."""
    return json.loads(json.dumps(value, default=lambda each: getattr(each, "__qualname__", str(each))))


def load_tasks(
    names: Sequence[str],
    data: Path | None = None,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    seed: int = SEED,
    allow_code: bool = False,
    generation: Mapping[str, Any] | None = None,
) -> TaskSet:
    """Return the tasks of these names, groups of lm-eval, or .yaml files.

    Args:
        data: folder of the evaluation sets; None to look into the cache of the `datasets` package alone.
        num_fewshot: examples in each prompt; None for each task's own number. A task whose own number is 0 keeps it, as
            in lm-eval.
        allow_code: whether a task's own file may name functions to run.
        generation: settings of generation (max_gen_toks, temperature, until, ...) in the place of the tasks' own.

    Raises:
        DataError: a name is unknown (the nearest are told), data are missing or wrong, a template or regex does not
            compile, code is not allowed, or there are too few examples.
    """
    require_extra("lm_eval", extra="evaluate")
    if not names:
        raise DataError("no task is named; give --tasks, such as --tasks arc_easy,hellaswag")
    check_limit(limit)
    if num_fewshot is not None and num_fewshot < 0:
        raise DataError(f"num_fewshot ({num_fewshot}) must not be negative")
    from trimaran.runtime.evaluate.rehearsal import rehearse
    from trimaran.runtime.evaluate.tasks.offline import Builder

    builder = Builder(Library(data), allow_code=allow_code)
    wanted = [each for name in dict.fromkeys(names) for each in ALIASES.get(name, (name,))]
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in wanted:
        if name in MEANS and num_fewshot is not None:
            own = ", ".join(f"{part.task} {part.shots}" for part in MEANS[name])
            raise DataError(f"{name} has its own numbers of examples ({own}); leave out --num-fewshot, or name tasks")
        for part in MEANS.get(name, ()):
            named = {} if part.name == part.task else {"task": part.name, "task_alias": part.name}
            _add(builder.build(part.task, num_fewshot=part.shots, **named), tasks, groups)
        if name not in MEANS:
            shots = shots_of(name)
            built = builder.build(name) if shots is None else builder.build(name, num_fewshot=shots)
            _add(built, tasks, groups)
    for name, task in tasks.items():
        if getattr(task, "MULTIMODAL", False):
            raise DataError(f"{name} shows pictures or sound, which a language model does not take; leave it out")
        if getattr(task, "UNSAFE_CODE", False) and not allow_code:
            raise DataError(f"{name} runs code that the model writes; give --allow-code where that may do no harm")
        _settle(name, task, num_fewshot, generation)
    if generation and not any(task.get_config("output_type") == "generate_until" for task in tasks.values()):
        raise DataError(
            f"--gen is for tasks whose answers are generated, and {', '.join(names)} has none; leave it out"
        )
    rehearse(tasks, seed)
    return TaskSet(tuple(names), tasks, groups, limit, seed)


def _add(built: Sequence[Any], tasks: dict[str, Any], groups: dict[str, Any]) -> None:
    for each in built:
        if hasattr(each, "get_all_tasks"):
            groups |= {group.name: group for group in (each, *each.get_all_groups())}
            members = each.get_all_tasks()
        else:
            members = [each]
        for task in members:
            tasks.setdefault(task.task_name, task)
            _check_same(tasks[task.task_name], task)


def _check_same(known: Any, task: Any) -> None:
    sources = [str((each.get_config("metadata") or {}).get("config_source")) for each in (known, task)]
    if sources[0] != sources[1]:
        raise DataError(
            f"two tasks have the name {task.task_name}: those of {sources[0]} and {sources[1]}; name one otherwise, in "
            "its line task:"
        )
    if known.get_config("num_fewshot") != task.get_config("num_fewshot"):
        raise DataError(
            f"the task {task.task_name} is asked for twice, with different numbers of examples; ask for one"
        )


def _settle(name: str, task: Any, num_fewshot: int | None, generation: Mapping[str, Any] | None) -> None:
    """Set the number of examples and the settings of generation, as lm-eval's `simple_evaluate` does."""
    own = task.get_config("num_fewshot")
    shots = own if num_fewshot is None or own == 0 else num_fewshot
    task.set_config(key="num_fewshot", value=shots or 0)
    if generation and task.get_config("output_type") == "generate_until":
        settings = with_options(task.get_config("generation_kwargs"), generation, name)
        task.set_config(key="generation_kwargs", value=settings)
    if shots:
        _check_shots(name, task, shots)


def _check_shots(name: str, task: Any, shots: int) -> None:
    """Raise DataError where there are too few documents to draw examples from."""
    without = getattr(task, "without", None)
    if without is not None:
        fewer = "leave the task out" if name.startswith("leaderboard") else "give --num-fewshot 0"
        raise DataError(f"{name} begins with {shots} examples, and {without}. Add it, or {fewer}")
    pool = getattr(getattr(task, "sampler", None), "df", None)
    if pool is None:
        return
    asked = task.config.test_split or task.config.validation_split
    own = task.fewshot_cfg.split or task.config.training_split or task.config.validation_split or task.config.test_split
    is_own = own == asked and not (task.fewshot_cfg.split is None and task.fewshot_cfg.samples)
    if len(pool) < shots + is_own:
        raise DataError(
            f"{name} begins with {shots} examples, and there are {len(pool)} to draw from; give --num-fewshot "
            f"{max(0, len(pool) - is_own)} or less"
        )
