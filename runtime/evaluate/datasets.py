"""Evaluation sets by name: which files of a folder hold them, and their documents in the fields that lm-eval reads.

A file is known by its name and its folder's, as published or as in a copy of the hub's repository:
arc_easy.jsonl, ARC-Easy/test-00000-of-00001.parquet, hellaswag/val.jsonl.gz, gsm8k/main/train.csv. Without lm-eval.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Final

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.records import READABLE, kind_of, read_content, read_records
from trimaran.runtime.evaluate.fields import Row
from trimaran.runtime.evaluate.forms import READ, Document, texts_of

STEM: Final = (
    "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science college_mathematics "
    "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning"
)
HUMANITIES: Final = (
    "formal_logic high_school_european_history high_school_us_history high_school_world_history international_law "
    "jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law "
    "world_religions"
)
SOCIAL_SCIENCES: Final = (
    "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
    "high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations "
    "security_studies sociology us_foreign_policy"
)
OTHER: Final = (
    "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
    "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
)
SUBJECTS: Final = tuple(sorted(f"{STEM} {HUMANITIES} {SOCIAL_SCIENCES} {OTHER}".split()))
"""The 57 subjects of MMLU (Hendrycks et al. 2021)."""
_SPLITS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"test": ("test",), "train": ("train",), "validation": ("validation", "val", "valid", "dev"), "dev": ("dev",)}
)
"""Split -> how files name it."""
_CHOICES: Final = "query, choices, gold"
_SHOWN: Final = 6
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class EvaluationSet:
    """A set that is known by name.

    Args:
        names: of its files or folders, the first one preferred.
        hub: repository on the hub, and configuration there.
        split: that is evaluated.
        fields: as published.
        flat: of a flat file, "" where there is none.
        examples: split that few-shot examples are drawn from, None where lm-eval's task has none.
        hint: what else may help where its files are missing.
    """

    name: str
    names: tuple[str, ...]
    hub: tuple[str, str | None]
    split: str
    fields: str
    flat: str = _CHOICES
    examples: str | None = "train"
    hint: str = ""

    @property
    def wanted(self) -> str:
        """The fields that its records may have, for errors."""
        flat = f", or flat: {self.flat}" if self.flat else ""
        return f"{self.name} takes the fields {self.fields} (as published){flat}"


_SCIENCE: Final = "choices {text, label}, answerKey"
_WINOGRAD: Final = "context_options, continuation, gold"
_ALL: Final = (
    EvaluationSet("arc_easy", ("arc_easy", "arc_e"), ("allenai/ai2_arc", "ARC-Easy"), "test", f"question, {_SCIENCE}"),
    EvaluationSet(
        "arc_challenge",
        ("arc_challenge", "arc_c"),
        ("allenai/ai2_arc", "ARC-Challenge"),
        "test",
        f"question, {_SCIENCE}",
    ),
    EvaluationSet(
        "hellaswag",
        ("hellaswag",),
        ("Rowan/hellaswag", None),
        "validation",
        "activity_label, ctx_a, ctx_b, endings, label",
    ),
    EvaluationSet(
        "mmlu",
        ("mmlu", "hendrycks_test"),
        ("cais/mmlu", "all"),
        "test",
        "subject, question, choices, answer",
        "subject, question, choices, gold",
        "dev",
    ),
    EvaluationSet(
        "truthfulqa",
        ("mc_task", "truthful_qa", "truthfulqa"),
        ("truthfulqa/truthful_qa", "multiple_choice"),
        "validation",
        "question, mc1_targets, mc2_targets",
        "query, choices, gold (one number or, for mc2, a list)",
        None,
    ),
    EvaluationSet(
        "lambada",
        ("lambada_openai", "lambada_test_en", "lambada"),
        ("EleutherAI/lambada_openai", "default"),
        "test",
        "text",
        "context, continuation",
        None,
    ),
    EvaluationSet("piqa", ("piqa",), ("baber/piqa", None), "validation", "goal, sol1, sol2, label"),
    EvaluationSet(
        "winogrande",
        ("winogrande_xl", "winogrande"),
        ("allenai/winogrande", "winogrande_xl"),
        "validation",
        "sentence, option1, option2, answer",
        _WINOGRAD,
    ),
    EvaluationSet(
        "wsc",
        ("wsc_fixed", "wsc"),
        ("aps/super_glue", "wsc.fixed"),
        "validation",
        "text, span1_text, span2_text, span2_index, label",
        hint="the 273 Winograd schemas (winograd_wsc, context_options) are the task wsc273, this is SuperGLUE's",
    ),
    EvaluationSet(
        "wsc273",
        ("wsc273", "winograd_wsc", "winograd"),
        ("lighteval/winograd_wsc", "wsc273"),
        "test",
        "text, pronoun, pronoun_loc, options, label",
        _WINOGRAD,
        None,
    ),
    EvaluationSet("boolq", ("boolq",), ("aps/super_glue", "boolq"), "validation", "passage, question, label"),
    EvaluationSet(
        "openbookqa",
        ("openbookqa", "openbook_qa"),
        ("allenai/openbookqa", "main"),
        "test",
        f"question_stem, {_SCIENCE}",
    ),
    EvaluationSet(
        "copa", ("copa",), ("aps/super_glue", "copa"), "validation", "premise, choice1, choice2, question, label"
    ),
    EvaluationSet("gsm8k", ("gsm8k",), ("openai/gsm8k", "main"), "test", "question, answer", ""),
)
SETS: Final[Mapping[str, EvaluationSet]] = MappingProxyType({each.name: each for each in _ALL})


def set_of_hub(path: str | None, config: str | None) -> EvaluationSet | None:
    """Return the set that is a repository and configuration of the hub; None where it is none of ours."""
    if path == SETS["mmlu"].hub[0] and config in SUBJECTS:
        return SETS["mmlu"]
    return next((each for each in _ALL if each.hub == (path, config)), None)


@dataclass(frozen=True)
class Split:
    """The documents of one split.

    Args:
        groups: MMLU's subject, else "", -> documents.
        files: path -> sha256 of the content.
    """

    groups: Mapping[str, Sequence[Document]]
    files: Mapping[str, str]


@dataclass
class Library:
    """The evaluation sets in a folder, each read once.

    Args:
        folder: None for no folder.
    """

    folder: Path | None
    _read: dict[tuple[str, str], Split | None] = field(default_factory=dict)

    def split(self, name: str, split: str) -> Split:
        """Return a split of a set.

        Raises:
            DataError: no file has it, several could be it, or a record breaks a rule.
        """
        found = self.find(name, split)
        if found is None:
            raise self.missing(SETS[name], split)
        return found

    def find(self, name: str, split: str) -> Split | None:
        """Return a split of a set, None where no file has it; DataError as for `split`."""
        if (name, split) not in self._read:
            self._read[name, split] = self._read_split(SETS[name], split)
        return self._read[name, split]

    def paths(self, name: str, split: str) -> list[Path]:
        """Return the files that have a split of a set, none where it is missing; DataError as for `split`."""
        subjects = _subject_files(self.folder, self._files, split) if name == "mmlu" else {}
        return self._choose(SETS[name], split) or list(subjects)

    def missing(self, wanted: EvaluationSet, split: str) -> DataError:
        """Return the error of a split that no file has."""
        aliases = _SPLITS[split]
        names = [f"{wanted.names[0]}/{aliases[0]}", f"{wanted.names[0]}_{aliases[0]}"]
        names += [wanted.names[-1]] if split == wanted.split else []
        files = f"a file {', '.join(names[:-1])} or {names[-1]} ({READABLE})"
        if self.folder is None:
            where = "give its folder with --data"
        else:
            seen = [str(path.relative_to(self.folder)) for path in self._files]
            has = f"it has {', '.join(seen[:_SHOWN])}{', ...' if len(seen) > _SHOWN else ''}" if seen else "it has none"
            where = f"looked for one in {self.folder} and below ({has})"
        hint = f"; {wanted.hint}" if wanted.hint else ""
        return DataError(f"the {split} split of {wanted.name} is missing: {files}; {where}; {wanted.wanted}{hint}")

    @cached_property
    def _files(self) -> list[Path]:
        """All files below the folder that may hold records, in the order of their names."""
        if self.folder is None:
            return []
        if not self.folder.is_dir():
            raise DataError(f"there is no folder {self.folder}; name the one that has the evaluation sets")
        return [path for path in _walk(self.folder, frozenset()) if kind_of(path)]

    def _read_split(self, wanted: EvaluationSet, split: str) -> Split | None:
        subjects = _subject_files(self.folder, self._files, split) if wanted.name == "mmlu" else {}
        paths = self.paths(wanted.name, split)
        if not paths:
            return None
        groups: dict[str, list[Document]] = {}
        hashes = {}
        for path in paths:
            content = read_content(path)
            hashes[str(path)] = hashlib.sha256(content).hexdigest()
            columns = None
            if path in subjects and b"question" not in content.partition(b"\n")[0].lower():
                columns = ["question", "A", "B", "C", "D", "answer"]  # as Hendrycks et al. published it
            for place, record in read_records(path, content, csv_fields=columns):
                row = Row(record, f"{path}, {place}", wanted.wanted)
                group = "" if wanted.name != "mmlu" else subjects.get(path) or row.among("subject", SUBJECTS)
                groups.setdefault(group, []).append(READ[wanted.name](row))
        if not groups:
            raise DataError(f"{', '.join(map(str, paths))} has no record; {wanted.wanted}")
        return Split(groups, hashes)

    def _choose(self, wanted: EvaluationSet, split: str) -> list[Path]:
        """Return the file of a split, or its shards in order; DataError where several could be it."""
        ranked: dict[tuple[bool, int], dict[Path, list[Path]]] = {}
        for path in self._files:
            rank = _rank(self._parts(path), wanted, split)
            if rank is not None:
                ranked.setdefault(rank, {}).setdefault(_without_shard(path), []).append(path)
        if not ranked:
            return []
        best = ranked[min(ranked)]
        if len(best) > 1:
            names = " and ".join(str(paths[0]) for paths in best.values())
            raise DataError(f"{names} could both be the {split} split of {wanted.name}; leave one of them there")
        return next(iter(best.values()))

    def _parts(self, path: Path) -> tuple[str, ...]:
        assert self.folder is not None
        return (*_parents(self.folder, path), _normal(_stem(path)))


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Yield the files below a folder, its own first, links followed; a link to a folder above itself is passed over."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    yield from (path for path in paths if not path.is_dir())
    for path in paths:
        if path.is_dir():
            yield from _walk(path, above | {here})


def _parents(folder: Path, path: Path) -> list[str]:
    """Return the names of the folders above a file up to `folder` itself; of the hub's cache that of the repository."""
    names = [folder.resolve().name, *path.relative_to(folder).parts[:-1]]
    return [_normal(name.split("--")[-1]) for name in names]


def _stem(path: Path) -> str:
    name = path.name[: -len(".gz")] if path.name.lower().endswith(".gz") else path.name
    return _SHARD.sub("", Path(name).stem)


def _without_shard(path: Path) -> Path:
    return path.with_name(_stem(path) + "".join(path.suffixes[-2:]))


def _normal(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _rank(parts: tuple[str, ...], wanted: EvaluationSet, split: str) -> tuple[bool, int] | None:
    """Return how well the names of folders and file fit a split, the least best; None where they don't."""
    *parents, stem = parts
    config = _normal(wanted.hub[1] or "")
    for index, name in enumerate(wanted.names):
        in_folder = name in parents and stem in _SPLITS[split]
        if in_folder or stem in {f"{name}_{alias}" for alias in _SPLITS[split]} | (
            {name} if split == wanted.split else set()
        ):
            return bool(config) and config not in (*parents, stem), index
    return None


def _subject_files(folder: Path | None, files: Sequence[Path], split: str) -> dict[Path, str]:
    """Return MMLU's files of one subject: anatomy_test.csv, or a folder anatomy with a file test."""
    found = {}
    for path in files:
        assert folder is not None
        stem, parents = _normal(_stem(path)), _parents(folder, path)
        for alias in _SPLITS[split]:
            subject = parents[-1] if stem == alias else stem.removesuffix(f"_{alias}") if stem.endswith(alias) else ""
            if subject in SUBJECTS:
                found[path] = subject
    return found


def find_item_files(name: str, folder: Path) -> list[Path]:
    """Return the files that `read_item_texts` reads; DataError as there."""
    return Library(folder).paths(name, SETS[name].split)


def read_item_texts(name: str, folder: Path) -> Iterator[str]:
    """Yield question and answers of each document of a set's evaluated split, for decontamination.

    Raises:
        DataError: as for `Library.split`.
    """
    for documents in Library(folder).split(name, SETS[name].split).groups.values():
        yield from (" ".join(texts_of(name, document)) for document in documents)
