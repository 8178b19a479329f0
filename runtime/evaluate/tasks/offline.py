"""Tasks of lm-eval over local files: of the known sets, of a task's own data_files, of the hub's cache. No network."""

import hashlib
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import datasets
import huggingface_hub.constants
import jinja2
import jinja2.sandbox
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env as templates
from tqdm import tqdm

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.records import read_content, read_records
from trimaran.runtime.evaluate.datasets import EvaluationSet, Library, Split, set_of_hub
from trimaran.runtime.evaluate.tasks.catalog import FOLDERS, nearest
from trimaran.runtime.evaluate.tasks.check_config import TEMPLATES, check_config
from trimaran.runtime.evaluate.tasks.own_yaml import check_task_file

TASKS: Final = Path(lm_eval.tasks.__file__).parent
_BESIDE: Final = "group_source"
"""Where the metadata of a task that the file of its group defines has that file."""
_MOST_TEMPLATES: Final = 512
_FILE_KINDS: Final = ("json", "csv", "parquet")
PROMPT_ERRORS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    SyntaxError,
    TypeError,
    ValueError,
    jinja2.TemplateError,
)
"""What a configuration can make lm-eval raise."""
_PROMPT_OPTIONS: Final = (
    "limit",
    "system_instruction",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "tokenizer_name",
)
"""Options of `build_all_requests` that prompts depend on; the name of the tokenizer stands for its chat template."""
_NAME: Final = re.compile(r"""^["']?(?:task|group)["']?:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)


@contextmanager
def offline() -> Iterator[None]:
    """Keep the hub's packages from the network in the block, whatever they read from the environment at import."""
    constants: tuple[tuple[Any, str], ...] = (
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
    )
    before = [getattr(module, name) for module, name in constants]
    has_bars = datasets.is_progress_bar_enabled()
    compile_template = templates.from_string
    # tqdm's own lock is a semaphore of the system, which a rank that is killed would leave behind.
    if not hasattr(tqdm, "_lock"):
        tqdm.set_lock(threading.RLock())
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    try:
        for module, name in constants:
            setattr(module, name, True)
        datasets.disable_progress_bars()
        # lm-eval compiles a template anew for each field of each document, and lets it reach all of Python.
        templates.from_string = lru_cache(_MOST_TEMPLATES)(_sandbox().from_string)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for (module, name), value in zip(constants, before, strict=True):
            setattr(module, name, value)
        templates.from_string = compile_template
        if has_bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _sandbox() -> jinja2.Environment:
    """Return lm-eval's environment of templates with no way from a template to code: a task's file may be anybody's."""
    found = jinja2.sandbox.SandboxedEnvironment(
        loader=templates.loader, undefined=templates.undefined, keep_trailing_newline=templates.keep_trailing_newline
    )
    found.filters |= templates.filters
    return found


class OfflineTask(ConfigurableTask):  # type: ignore[misc]
    """lm-eval's task of a configuration, whose documents come from local files.

    Attributes:
        files: path -> sha256 of what was read; {} for the hub's cache.
        without: why the task can't have few-shot examples; None where it can.
    """

    def __init__(self, config: dict[str, Any], library: Library) -> None:
        self.library, self.files = library, dict[str, str]()
        self.without: DataError | None = None
        self._processed: dict[str, Any] = {}
        self._built: tuple[Any, ...] = ()
        self._own: Sequence[str] = ()
        super().__init__(config=config)

    def set_fewshot_seed(self, seed: int | None = None) -> None:
        """Begin the draw of few-shot examples again."""
        self._seed = seed
        super().set_fewshot_seed(seed)

    def build_all_requests(self, **options: Any) -> None:
        """Make the prompts of all documents, once: those of the next evaluation with the same options are the same."""
        key = (self.config.num_fewshot, self._seed, *(options.get(name) for name in _PROMPT_OPTIONS))
        if key != self._built:
            super().set_fewshot_seed(self._seed)
            super().build_all_requests(**options)
            self._built = key
        for instance in self.instances:
            instance.resps, instance.filtered_resps = [], {}

    def check_targets(self) -> None:
        """Raise DataError where the right answer of a document of the task's own files is none of its choices."""
        if not self._own or self.OUTPUT_TYPE != "multiple_choice" or callable(self.config.process_results):
            return
        for doc_id, document in {each.doc_id: each.doc for each in self.instances}.items():
            choices = self.doc_to_choice(document)
            gold = self.doc_to_text(document) if self.multiple_input else self.doc_to_target(document)
            for each in gold if isinstance(gold, list) else [gold]:
                if not (0 <= each < len(choices) if isinstance(each, int) else each in choices):
                    raise DataError(
                        f"task {self.config.task}, document {doc_id} ({', '.join(self._own)}): the right answer is "
                        f"{each!r}, and there are {len(choices)} choices; correct the file, or doc_to_target"
                    )

    def training_docs(self) -> Any:
        """Return the documents of the training split, processed once: lm-eval does it at every look."""
        return self._documents_of(self.config.training_split)

    def validation_docs(self) -> Any:
        """Return those of the validation split."""
        return self._documents_of(self.config.validation_split)

    def test_docs(self) -> Any:
        """Return those of the test split."""
        return self._documents_of(self.config.test_split)

    def _documents_of(self, split: str | None) -> Any:
        if split is not None and split not in self._processed:
            documents, process = self.dataset[split], self.config.process_docs
            self._processed[split] = documents if process is None else process(documents)
        return self._processed.get(split or "")

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Read the documents: lm-eval's hook."""
        if callable(self.config.custom_dataset):
            super().download(dataset_kwargs, **kwargs)
            return
        known = set_of_hub(self.DATASET_PATH, self.DATASET_NAME)
        if self.DATASET_PATH in _FILE_KINDS and dataset_kwargs and "data_files" in dataset_kwargs:
            self.dataset = self._own_files(dataset_kwargs["data_files"])
        elif known is not None and self.library.find(known.name, known.split) is not None:
            self.dataset = self._known(known)
        else:
            try:
                super().download(dataset_kwargs, **kwargs)
            except (OSError, ValueError, RuntimeError) as error:  # what `datasets` raises for a set it does not have
                raise self._missing(known, error) from error

    def _known(self, known: EvaluationSet) -> datasets.DatasetDict:
        group = (self.DATASET_NAME or "") if known.name == "mmlu" else ""
        found = {known.split: self._dataset_of(self.library.split(known.name, known.split), known, group)}
        examples = self.library.find(known.name, known.examples) if known.examples else None
        if examples is not None and group in examples.groups:
            found[str(known.examples)] = self._dataset_of(examples, known, group)
        elif known.examples:
            self.without = self.library.missing(known, known.examples)
        self._without_splits(set(found))
        if known.name == "wsc273" and found[known.split][0]["pronoun"] == "_":
            self.config.process_docs = self.fewshot_cfg.process_docs = None  # the options are as lm-eval makes them
        return datasets.DatasetDict(found)

    def _dataset_of(self, split: Split, known: EvaluationSet, group: str) -> datasets.Dataset:
        if group not in split.groups:
            names = ", ".join(split.files)
            raise DataError(f"{names} has no question of the subject {group}; leave out the task, or add its questions")
        self.files |= split.files
        return datasets.Dataset.from_list(list(split.groups[group]))

    def _without_splits(self, found: set[str]) -> None:
        """Take splits that are not there out of the configuration; few-shot examples come from them."""
        for name in ("training_split", "validation_split", "test_split", "fewshot_split"):
            if getattr(self.config, name) not in found:
                setattr(self.config, name, None)
        if self.fewshot_cfg.split not in found:
            self.fewshot_cfg.split = None

    def _own_files(self, named: Any) -> datasets.DatasetDict:
        """Return the documents of the files that a task's own YAML names, each a split or a list of files of one."""
        splits = named if isinstance(named, dict) else {"train": named}
        found = {}
        for split, paths in splits.items():
            records: list[Any] = []
            for name in paths if isinstance(paths, list) else [paths]:
                path = self._path_of(str(name))
                content = read_content(path)
                for place, record in read_records(path, content):
                    if not isinstance(record, dict):
                        raise DataError(f"{path}, {place} must be a record of fields, and it is {str(record)[:80]}")
                    records.append(record)
                self.files[str(path)] = hashlib.sha256(content).hexdigest()
            if not records:
                raise DataError(f"{self.config.task}: {paths} has no record")
            found[split] = datasets.Dataset.from_list(records)
        for name in ("training_split", "validation_split", "test_split", "fewshot_split"):
            split = getattr(self.config, name)
            if split is not None and split not in found:
                has = ", ".join(found)
                raise DataError(f"{self.config.task}: {name} ({split}) is no split of data_files, which has {has}")
        self._own = tuple(self.files)
        return datasets.DatasetDict(found)

    def _path_of(self, name: str) -> Path:
        """Return a file that a task names: beside its YAML, in the folder of the data, or from where we stand."""
        metadata = self.config.metadata or {}
        source = Path(metadata.get(_BESIDE, metadata.get("config_source", "")))
        folders = [source.parent, *([self.library.folder] if self.library.folder else []), Path()]
        return next((path for folder in folders if (path := folder / name).is_file()), folders[0] / name)

    def _missing(self, known: EvaluationSet | None, error: Exception) -> DataError:
        if known is not None:
            return self.library.missing(known, known.split)
        config = f", configuration {self.DATASET_NAME}" if self.DATASET_NAME else ""
        splits = [self.config.test_split or self.config.validation_split, self.config.training_split]
        fields = sorted(_fields_of(self.config))
        return DataError(
            f"{self.config.task} needs {self.DATASET_PATH}{config} with the split {' and '.join(filter(None, splits))}"
            f"{' and the fields ' + ', '.join(fields) if fields else ''}, which the cache of the datasets package does "
            "not have, and nothing is downloaded here: load it once where there is a network, or copy the cache "
            f"({' '.join(str(error).split())[:200]})"
        )


def reason_of(error: BaseException) -> str:
    """Return the kind and the message of an error that a task's configuration or code has raised, on one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _fields_of(config: Any) -> set[str]:
    """Return the fields of a document that the templates of a task read."""
    from jinja2 import meta

    found = set[str]()
    for name in TEMPLATES:
        text = getattr(config, name)
        if isinstance(text, str) and text:
            found |= meta.find_undeclared_variables(templates.parse(text))
            found |= {text} if text.isidentifier() else set()
    return found


class _Factory(TaskFactory):  # type: ignore[misc]
    """lm-eval's factory with our tasks; checks what lm-eval tells only after all generation."""

    def __init__(self, library: Library) -> None:
        super().__init__()
        self.library = library

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        config = self._load_full_config(entry, overrides)
        name = config.get("task", entry.name)
        if "class" in config:
            return super()._build_task(entry, overrides)
        for key in ("tag", "group", "task_list"):
            config.pop(key, None)
        try:
            check_config(config)
            return OfflineTask(config, self.library)
        except DataError:
            raise
        except PROMPT_ERRORS as error:
            hint = "; of its first document, doc_to_target must be one of doc_to_choice, none of which may be empty"
            hint = hint if isinstance(error, IndexError) and config.get("output_type") == "multiple_choice" else ""
            raise DataError(f"the task {name} ({entry.yaml_path}) can't be built: {reason_of(error)}{hint}") from error


class Builder:
    """Makes tasks and groups by name or file.

    Args:
        allow_code: whether a task's own file may name functions to run.
    """

    def __init__(self, library: Library, *, allow_code: bool) -> None:
        self._factory, self._allow_code = _Factory(library), allow_code
        with offline():
            self._index: dict[str, Entry] = TaskIndex.build([TASKS / folder for folder in FOLDERS])

    def build(self, name: str, **overrides: Any) -> list[Task | Group]:
        """Return the task or group of a name or .yaml file, or the tasks of a tag.

        Raises:
            DataError: the name is unknown, the data or a package are missing, or the configuration is wrong.
        """
        try:
            with offline():
                entry = self._entry(name)
                built = self._factory.build(entry, overrides=overrides, registry=self._index)
        except DataError:
            raise
        except ImportError as error:
            if error.name is None:
                raise DataError(f"the task {name} can't be built: {reason_of(error)}") from error
            raise DataError(
                f"the task {name} needs the package {error.name}; install it, or leave the task out"
            ) from error
        except Exception as error:  # code of a task, which may raise anything
            raise DataError(f"the task {name} can't be built, and nothing is downloaded: {reason_of(error)}") from error
        return built if isinstance(built, list) else [built]

    def _entry(self, name: str) -> Entry:
        if name.endswith((".yaml", ".yml")):
            return self._own(Path(name))
        if name in self._index:
            return self._index[name]
        texts = {path: read_content(path).decode("utf-8", "replace") for path in sorted(TASKS.rglob("*.yaml"))}
        names = {found: path for path, text in texts.items() for found in _NAME.findall(text)}
        if name in names:
            entry = TaskIndex.entry_from_path(names[name])
            if entry is not None and entry.kind is Kind.TASK:
                return entry
        elif not any(name in text for text in texts.values()):
            raise DataError(f"there is no task {name}; {nearest(name, names)}")
        self._index |= TaskManager().task_index  # all of lm-eval's index: a group or tag names tasks of other folders
        if name not in self._index:
            raise DataError(f"there is no task {name}; {nearest(name, self._index)}")
        return self._index[name]

    def _own(self, path: Path) -> Entry:
        check_task_file(path, allow_code=self._allow_code)
        config = load_yaml(path, resolve_func=False)
        name = config.get("group", config.get("task"))
        if not isinstance(name, str):
            raise DataError(f"the task file {path} has no name; write task: NAME")
        kind = Kind.GROUP if "group" in config else Kind.PY_TASK if "class" in config else Kind.TASK
        if kind is Kind.GROUP and not config.get("task"):
            raise DataError(f"the group {name} ({path}) has no task; name those that it consists of in its line task:")
        for inner in _inline(config) if kind is Kind.GROUP else ():
            beside = {**inner, "metadata": {_BESIDE: str(path)}}
            self._index.setdefault(inner["task"], Entry(inner["task"], Kind.TASK, None, beside))
        for member in _members(config) if kind is Kind.GROUP else ():
            if member == name:
                raise DataError(f"the group {name} ({path}) has itself among its tasks; take it out of its line task:")
            if member not in self._index:
                self._index[member] = self._entry(member)
        return Entry(name, kind, path.resolve(), config)


def _inline(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the tasks that the file of a group defines itself."""
    listed = config.get("task")
    for each in listed if isinstance(listed, list) else ():
        if isinstance(each, dict) and "group" in each:
            yield from _inline(each)
        elif isinstance(each, dict) and isinstance(each.get("task"), str) and "dataset_path" in each:
            yield each


def _members(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tasks and groups that the file of a group names; those that it defines itself are none of them."""
    listed = config.get("task")
    for each in listed if isinstance(listed, list) else [listed]:
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict) and "group" in each:
            yield from _members(each)
        elif isinstance(each, dict) and isinstance(each.get("task"), str) and "dataset_path" not in each:
            yield each["task"]
