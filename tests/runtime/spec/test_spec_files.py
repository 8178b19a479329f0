"""Run specs as files: lines, overrides, writing back, examples, schema, and nothing heavy imported for any of it."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, BeforeValidator, Field, create_model

from trimaran.models.fields import Count
from trimaran.runtime.spec import (
    DataSection,
    RunSpec,
    SpecError,
    describe,
    diff_specs,
    dump_spec,
    findings,
    json_schema,
    load_spec,
    loading,
    names,
    parse_spec,
    parsing,
    rules,
)
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, Fraction
from trimaran.runtime.spec.tree import Place
from trimaran.runtime.spec.yaml_text import read_yaml

SEARCHES = ("ladder.yaml", "tune-lr.yaml", "twin-hamlet.yaml")
EXAMPLES = [
    each for each in sorted((Path(__file__).parents[3] / "examples").glob("*.yaml")) if each.name not in SEARCHES
]

BASE: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 12, "hidden_size": 768, "num_heads": 12},
    "optimizer": {"lr": 1e-3},
    "train": {"num_steps": 100, "global_batch_size": 32, "micro_batch_size": 4, "seq_len": 128},
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """Return BASE with `section.field: value` changes."""
    raw: dict[str, Any] = {section: dict(fields) for section, fields in BASE.items()}
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        (raw.setdefault(section, {}) if section else raw)[name] = value
    return raw


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


GOOD_TEXT = """\
model: {num_layers: 4, hidden_size: 64, num_heads: 4}
optimizer:
  lr: 3e-4
  eps: 1E-8
train:
  num_steps: 1_000
  global_batch_size: 8
  micro_batch_size: 4
  seq_len: 64
"""


def test_exponents_and_underscores_are_numbers(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GOOD_TEXT))
    assert (spec.optimizer.lr, spec.optimizer.eps, spec.train.num_steps) == (3e-4, 1e-8, 1000)


def test_output_dir_is_named_after_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD_TEXT)
    assert load_spec(path).train.output_dir == "runs/mine"
    assert load_spec(path, ["train.output_dir=runs/other"]).train.output_dir == "runs/other"


def test_errors_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(
            write(
                tmp_path, GOOD_TEXT.replace("seq_len: 64", "seq_length: 64").replace("batch_size: 8", "batch_size: 6")
            )
        )
    assert [str(error) for error in caught.value.errors] == [
        "train.seq_length (line 9): unknown field; did you mean train.seq_len?",
        (
            "train.global_batch_size (line 7): global_batch_size (6) must be micro_batch_size (4) * "
            "num_microbatches * dp (1), "
            "a multiple of 4 * 1 = 4; set train.global_batch_size to 4 or 8"
        ),
    ]


NOT_A_SPEC = [
    ("seed: 1\n bad: 2\n", "(line 2): is not valid YAML: mapping values are not allowed here"),
    ("seed: [1\n", "is not valid YAML: while parsing a flow sequence expected ',' or ']'"),
    ("model:\n\ttp: 1\n", "(line 2): is not valid YAML: while scanning for the next token found character '\\t'"),
    ("seed: 1\n---\nseed: 2\n", "keep one document a file; remove the line ---"),
    (
        "seed: 1\nzero:\n  stage: 1\n  stage: 0\n",
        "zero.stage (line 4): is given twice in the same place, first on line 3; keep one of them",
    ),
    ("data: {stages: [{tokens: 0, tokens: 5}]}\n", "data.stages[0].tokens (line 1): is given twice in the same place"),
    (
        "seed: !!python/object/apply:os.getcwd []\n",
        "(line 1): is not valid YAML: could not determine a constructor",
    ),
    ("seed: 1\nzero: \x07\n", "(line 2): is not valid YAML: special characters are not allowed"),
    ("", "must be a mapping of sections, got an empty file"),
    ("- model\n", "must be a mapping of sections, got list"),
    ("seed: &a [*a]\n", "(line 1): is not valid YAML: an alias stands inside the value that it names; write the value"),
    ("? [1, 2]\n: 3\n", "found unhashable key; write a name before the colon"),
    ("[a]: 1\n", "found unhashable key; write a name before the colon"),
    ("seed: !!bool maybe\n", "(line 1): is not valid YAML: 'maybe' is no !!bool; write plain numbers, text and lists"),
    ("seed: !!int ''\n", "(line 1): is not valid YAML: '' is no !!int; write plain numbers"),
    ("seed: !!int [1]\n", "expected a scalar node, but found sequence; write plain numbers"),
    *((f"seed: !!{tag} x\n", "without !! tags") for tag in ("timestamp", "binary", "set", "omap", "pairs", "bool")),
    ("seed: 1\nmodel: !!set {a}\n", "(line 2): is not valid YAML: could not determine a constructor for the tag"),
    ("seed: " + "[" * 5000, "(line 1): has values inside each other, more than 32 deep; close brackets, and indent"),
    ("- " * 5000, "(line 1): has values inside each other, more than 32 deep"),
    ("seed: 1\nzero: {stage: " + "9" * 5000 + "}", "(line 2): is not valid YAML: a number has 5,000 digits"),
    ("seed: !!int 0x" + "f" * 5000, "a number has 5,002 digits; write a smaller number"),
    ('seed: 1\ndata: {text_field: "a\\ud800"}', "(line 2): is not valid YAML: a text has half a surrogate"),
    ("zero: {<<: 5}\n", "but found scalar; let << name a section with an anchor, such as <<: *base"),
    ("zero: {<<: [5]}\n", "but found scalar; let << name a section with an anchor"),
    ("data: {source: [*.txt]}\n", "put a text that begins with * in quotes"),
]


def refusal(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Return the errors of a spec file, each as a sentence; none where it is accepted."""
    try:
        load_spec(path, overrides)
    except SpecError as error:
        return [str(each) for each in error.errors]
    return []


def test_text_that_is_not_a_spec_is_refused_with_its_line(tmp_path: Path) -> None:
    found = [(text[:40], sentence, refusal(write(tmp_path, text))) for text, sentence in NOT_A_SPEC]
    assert not [each for each in found if each[1] not in "\n".join(each[2])]


LAUGHS = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
MERGES = "a: &a0 {x: 1}\n" + "".join(f"b{i}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(40))
LAUGHS_IN_A_FIELD = "zero: {stage: [&a [x, x], &b [*a, *a], &c [*b, *b], &d [*c, *c], &e [*d, *d], *e]}\n"
TOO_MUCH = {
    "laughs": (LAUGHS, "(line 10): holds more than 3,000 values, with aliases written out; write the values out"),
    "laughs in merges": (MERGES, "holds more than 3,000 values, with aliases written out"),
    "small laughs in a field": (
        GOOD_TEXT + LAUGHS_IN_A_FIELD,
        "zero.stage (line 10): must be a whole number, got [[",
    ),
    "values": (GOOD_TEXT + "data: {source: [" + "a, " * 4000 + "]}\n", "(line 10): holds more than 3,000 values; a"),
    "sources": (
        GOOD_TEXT + "data: {source: [" + "a.txt, " * 1200 + "]}\n",
        "must have at most 1000 items, got 1200; write fewer; name folders or globs instead of single files",
    ),
    "written out": (
        GOOD_TEXT + "data: {source: [" + f"{'a' * 126}, " * 999 + "]}\n",
        "has more than 128 KiB with every field written out; a spec with every field has 8 KiB; where data.source",
    ),
    "bytes": (
        GOOD_TEXT + "data: {source: [" + "a.txt, " * 400_000 + "]}\n",
        "has more than 128 KiB, too much for what it should hold; a spec with every field has 8 KiB; where data.source",
    ),
    "keys": ("".join(f"key{i}: 1\n" for i in range(100_000)), "has more than 128 KiB"),
    "fewer keys": ("".join(f"key{i}: 1\n" for i in range(1000)), "  and 986 more"),
    "lines of text": ("seed: x\n" + "  y\n" * 30_000, "seed (line 1): must be a whole number, got 'x y y"),
    "a long name": (f"? {'x' * 100_000}\n: 1\n", "unknown field"),
    "long names with much in them": (
        GOOD_TEXT + f"data: {{corpora: {{? {'x.' * 30_000} : {{{''.join(f'a{i}: 1, ' for i in range(1400))}}}}}}}\n",
        "  and 1,381 more",
    ),
    "wrong corpora": (
        GOOD_TEXT + f"data: {{corpora: {{{', '.join(f'c{i}: [{i}]' for i in range(900))}}}}}\n",
        "  and 880 more",
    ),
    "wrong stages": (
        GOOD_TEXT + f"data: {{stages: [{'{tokens: -1, weights: {web: -1}}, ' * 370}]}}\n",
        "  and 720 more",
    ),
    "a long choice": (GOOD_TEXT + f"parallel: {{schedule: {'x' * 100_000}}}\n", "must be gpipe, 1f1b, interleaved"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_spec_of_any_size_is_refused_in_under_a_second(name: str, tmp_path: Path) -> None:
    text, sentence = TOO_MUCH[name]
    path = write(tmp_path, text)
    before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert sentence in str(caught.value)
    assert time.process_time() - before < 3.0  # at most 0.6 on a free core; what grows with the square takes more
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50 << 10
    assert len(str(caught.value).splitlines()) <= 22


def test_only_regular_files_are_read_as_a_spec(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "good").symlink_to(write(tmp_path, GOOD_TEXT))
    assert load_spec(tmp_path / "good").train.seq_len == 64
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path / "link", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(SpecError, match=f"cannot be read: it is {kind}, and only regular files are read"):
            load_spec(path)


def test_twenty_errors_are_shown_and_further_ones_counted(tmp_path: Path) -> None:
    names = [f"paralel.tp{i}" for i in range(1300)]
    with pytest.raises(SpecError) as caught:
        parse_spec(BASE | {"zero": dict.fromkeys(names, 1), "seed": "x"})
    assert len(caught.value.errors) == 1301
    lines = str(caught.value).splitlines()
    assert (lines[0], len(lines), lines[-1]) == ("1,301 errors in the run spec:", 22, "  and 1,281 more")


def test_surrogates_that_json_writes_in_pairs_are_one_character(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD_TEXT + 'data: {text_field: "\\ud83d\\ude00"}\n')
    assert load_spec(path).data.text_field == "\N{GRINNING FACE}"


def test_every_repeated_key_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(write(tmp_path, "seed: 1\nseed: 2\nzero: {stage: 0, stage: 1}\n"))
    assert [error.field for error in caught.value.errors] == ["seed", "zero.stage"]


def test_missing_and_unreadable_files_are_spec_errors(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere\.yaml: cannot be read: No such file or directory"):
        load_spec(tmp_path / "nowhere.yaml")
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        load_spec(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"seed: 1 # caf\xe9\n")
    with pytest.raises(SpecError, match=r"is not UTF-8 text \(byte 13\)"):
        load_spec(tmp_path / "latin.yaml")


def test_aliases_and_merge_keys_work(tmp_path: Path) -> None:
    text = GOOD_TEXT.replace("optimizer:\n", "optimizer: &o\n") + "checkpoint: &c {interval: 5}\n"
    assert load_spec(write(tmp_path, text), ["checkpoint.keep_last=7"]).checkpoint.keep_last == 7


# --- overrides


def test_overrides_are_parsed_as_yaml_and_win(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD_TEXT)
    overrides = [
        "parallel.tp=2",
        "optimizer.lr=1e-3",
        "data.source=[a.txt, b.txt]",
        "model.preset=",
        "seed=7",
        "logging.timeline=false",
    ]
    spec = load_spec(path, overrides)
    assert (spec.parallel.tp, spec.optimizer.lr, spec.data.source) == (2, 1e-3, ["a.txt", "b.txt"])
    assert (spec.model.preset, spec.seed, spec.logging.timeline) == (None, 7, False)


BAD_OVERRIDES = [
    ("parallel.tpp=2", "parallel.tpp: unknown field; did you mean parallel.tp?"),
    ("tp=2", "tp: unknown field; did you mean parallel.tp?"),
    ("train.lr=2", "train.lr: unknown field; did you mean optimizer.lr?"),
    (
        "model.mlp.ffn_hidden_size=2",
        "model.mlp.ffn_hidden_size: unknown field; did you mean model.ffn_hidden_size?",
    ),
    (
        "parallel.tp",
        "--set: 'parallel.tp' is not FIELD=VALUE; write it like --set parallel.tp=4, without spaces around =",
    ),
    (
        "parallel={tp: 2}",
        "parallel: is a section, not a field; set one field at a time, such as --set parallel.tp=...",
    ),
    (
        "train.output_dir=",
        (
            "train.output_dir: must be text, got null; write a value: folder of the run; a spec file without it writes "
            "to runs/NAME-OF-THE-FILE"
        ),
    ),
    (
        f"train.output_dir=runs/{'x' * 300}",
        f"train.output_dir: must have names of at most 200 bytes, got 'runs/{'x' * 51}...; write a shorter one",
    ),
    (
        f"data.source=[{'ü' * 150}]",
        f"data.source[0]: must have names of at most 255 bytes, got '{'ü' * 56}...; write a shorter one",
    ),
    (
        "data.source=text",
        "data.source: must be a list with at least one item, got 'text'; write it as [text]",
    ),
    (
        "launcher.rendezvous=:::",
        (
            "launcher.rendezvous: must be text, got a mapping; set launcher.rendezvous to text, in quotes where it has "
            "a colon"
        ),
    ),
    (
        "launcher.device=tpu",
        "launcher.device: must be auto, cpu or cuda, got 'tpu'; set launcher.device to auto, cpu or cuda",
    ),
    (f"seed={'9' * 5000}", "--set seed: is not valid YAML: a number has 5,000 digits; write a smaller number"),
    (
        'data.text_field="\\ud800"',
        (
            "--set data.text_field: is not valid YAML: a text has half a surrogate pair, which is no character; write "
            "the character itself"
        ),
    ),
    ("optimizer.lr=fast", "optimizer.lr: must be a number, got 'fast'; set optimizer.lr to a number"),
    (
        "train.global_batch_size=6",
        (
            "train.global_batch_size: global_batch_size (6) must be micro_batch_size (4) * num_microbatches "
            "* dp (1), "
            "a multiple of 4 * 1 = 4; set train.global_batch_size to 4 or 8"
        ),
    ),
]


def test_bad_override_says_what_to_write_instead(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD_TEXT)
    found = [(override, sentence, refusal(path, [override])) for override, sentence in BAD_OVERRIDES]
    assert not [each for each in found if each[2] != [each[1]]]


CORPORA_TEXT = (
    GOOD_TEXT
    + """\
data:
  corpora:
    web: {source: [web.warc.gz]}
    books:
      source: [books.zst]
  stages:
    - {tokens: 0, weights: {web: 1}}
    - tokens: 1000
      weights:
        web: 1
        books: 3
"""
)


def test_overrides_reach_fields_of_records_in_mappings_and_lists(tmp_path: Path) -> None:
    path = write(tmp_path, CORPORA_TEXT)
    overrides = ["data.corpora.web.weight=2", "data.corpora.code.source=[c]", "data.stages[1].weights.code=4"]
    scaling = ["model.rotary_scaling.kind=ntk", "model.rotary_scaling.factor=2"]
    spec = load_spec(path, [*overrides, *scaling, "data.stages[1].tokens=2000"])
    assert spec.data.stages is not None
    assert [corpus.weight for corpus in spec.data.corpora.values()] == [2, 1, 1]
    assert [(stage.tokens, stage.weights) for stage in spec.data.stages] == [
        (0, {"web": 1}),
        (2000, {"web": 1, "books": 3, "code": 4}),
    ]
    assert load_spec(write(tmp_path, dump_spec(spec))) == spec


def test_overrides_remove_names_and_records(tmp_path: Path) -> None:
    path = write(tmp_path, CORPORA_TEXT)
    more, fewer = (
        load_spec(path, ["data.stages=null"]),
        load_spec(path, ["data.stages=null", "data.corpora.books=null"]),
    )
    assert diff_specs(more, fewer) == [
        "data.corpora.books.source: [books.zst] -> null",
        "data.corpora.books.text_field: text -> null",
        "data.corpora.books.weight: 1.0 -> null",
    ]
    assert load_spec(path, ["data.corpora=null", "data.stages=null"]).data.corpora == {}
    assert refusal(path, ["data.stages[2].tokens=5", "data.corpora.web.weight=0", "data.stages[0].weights=0"]) == [
        (
            "data.stages[2].tokens: names an item that its list does not have; "
            "count its items from 0, or set the whole list"
        ),
        "data.corpora.web.weight: must be above 0, got 0; set data.corpora.web.weight to a number above 0, such as 1.0",
        (
            "data.stages[0].weights: must be a mapping of names, got 0; "
            "write names below it, indented, each with its value"
        ),
    ]


def test_errors_below_a_section_name_their_own_line(tmp_path: Path) -> None:
    wrong = CORPORA_TEXT.replace("books: 3", "boks: 3").replace("web.warc.gz]", "web.warc.gz], wight: 1")
    wrong = wrong.replace("source: [books.zst]", "format: txt").replace("tokens: 1000", "tokens: 0")
    assert [error.partition(": ")[0] for error in refusal(write(tmp_path, wrong))] == [
        "data.corpora.web.wight (line 12)",
        "data.corpora.books.source (line 13)",
        "data.stages[1].weights.boks (line 20)",
        "data.stages[1].tokens (line 17)",
    ]


class Thresholds(BaseModel):
    """Fields of a record that true and false may stand for."""

    model_config = SECTION_CONFIG
    min_words: Count = Field(default=50, description="Fewest words.")
    max_words: Count = Field(default=100, description="Most words.")


class Label(BaseModel):
    """An item of a list."""

    model_config = SECTION_CONFIG
    label: str = Field(description="Label.")
    min: Fraction = Field(description="Least score.")


def switch(value: object) -> object:
    """Return the record that true stands for, and null for false."""
    return ({} if value else None) if isinstance(value, bool) else value


Switched = Annotated[Thresholds | None, BeforeValidator(switch, json_schema_input_type=bool | Thresholds | None)]


class Filter(BaseModel):
    """A record that need not be there, with records in it."""

    model_config = SECTION_CONFIG
    quality: bool | Thresholds = Field(default=False, description="Quality.")
    length: Switched = Field(default=None, description="Length.")
    kinds: bool | list[Literal["email", "phone"]] = Field(default=True, description="Kinds.")
    labels: list[Label] = Field(default=[], description="Labels.")


@pytest.fixture
def deeper_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spec whose data section has `recipe`, a Filter or null."""
    field: Any = (Filter | None, Field(default=None, description="Recipe."))
    data: Any = create_model("Data", __base__=DataSection, recipe=field)
    section: Any = (data, Field(default_factory=data, description="The text."))
    run = create_model("Run", __base__=RunSpec, data=section)
    monkeypatch.setattr(parsing, "RunSpec", run)
    for module in (names, parsing, findings, loading):
        monkeypatch.setattr(module, "SPEC", Place(run))
    for module in (names, rules):
        monkeypatch.setattr(module, "known_paths", cache(names.known_paths.__wrapped__))


def recipe_of(path: Path, *overrides: str) -> Any:
    """Return the recipe of a spec file, which is read back as it is written."""
    spec = load_spec(path, overrides)
    assert load_spec(write(path.parent, dump_spec(spec))) == spec
    return spec.model_dump()["data"]["recipe"]


@pytest.mark.usefixtures("deeper_spec")
def test_a_record_that_need_not_be_there_is_made_changed_and_removed(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"quality": False, "length": None, "kinds": True, "labels": []}
    changed_words, path = {"min_words": 3, "max_words": 100}, tmp_path / "run.yaml"
    path.write_text(GOOD_TEXT)
    assert recipe_of(path) is None
    assert recipe_of(path, "data.recipe={}") == plain
    assert recipe_of(path, "data.recipe.kinds=[email]") == {**plain, "kinds": ["email"]}
    assert recipe_of(path, "data.recipe.quality.min_words=3") == {**plain, "quality": changed_words}
    path.write_text(GOOD_TEXT + "data: {recipe: {quality: true, length: true, labels: [{label: a, min: 0.5}]}}\n")
    assert recipe_of(path, "data.recipe=null") is None
    words = [f"data.recipe.{name}.min_words=3" for name in ("quality", "length")]
    assert recipe_of(path, *words, "data.recipe.labels[0].min=1") == {
        **plain,
        "quality": changed_words,
        "length": changed_words,
        "labels": [{"label": "a", "min": 1}],
    }


BAD_RECIPE = """\
data:
  recipe:
    qality: {max_wrds: 3}
    length: {min_wrds: 3, max_words: 0}
    kinds: [emial]
    labels:
      - {label: a, min: 0.5}
      - {label: b, min: 1.5}
      - {label: c}
      - d
      - {min: x, lable: e}
"""
BAD_RECIPE_ERRORS = [
    "qality (line 12): unknown field; did you mean data.recipe.quality?",
    "quality.max_wrds (line 12): unknown field; did you mean data.recipe.quality.max_words?",
    "length.min_wrds (line 13): unknown field; did you mean data.recipe.length.min_words?",
    "labels[4].lable (line 20): unknown field; did you mean data.recipe.labels[4].label?",
    "length.max_words (line 13): must be at least 1, got 0; set data.recipe.length.max_words to 1 or more",
    "kinds[0] (line 14): must be email or phone, got 'emial'; did you mean email?",
    "labels[1].min (line 17): must be at most 1, got 1.5; set data.recipe.labels[1].min to a number at most 1",
    "labels[2].min (line 18): is required; write min under data.recipe.labels[2]: least score",
    "labels[3] (line 19): must be a section with fields, got 'd'; write its fields below it, indented: label, min",
    "labels[4].min (line 20): must be a number, got 'x'; set data.recipe.labels[4].min to a number",
]
BAD_RECIPE_OVERRIDES = [
    *(
        (
            f"data.recipe.{name}={value}",
            (
                f"data.recipe.{name}: must be true, false or a section with fields, got {got}; "
                f"set data.recipe.{name} to true, or write fields below it: min_words, max_words"
            ),
        )
        for name in ("quality", "length")
        for value, got in (("maybe", "'maybe'"), ("[1]", "[1]"))
    ),
    (
        "data.recipe.kinds=3",
        (
            "data.recipe.kinds: must be true or false or a list with at least one item, got 3; "
            "set data.recipe.kinds to true or false, or write it as [item, item]"
        ),
    ),
    (
        "data.recipe=3",
        (
            "data.recipe: must be a section with fields, got 3; "
            "write its fields below it, indented: quality, length, kinds, labels"
        ),
    ),
    ("data.labels=[]", "data.labels: unknown field; did you mean data.recipe.labels?"),
    ("data.recpe.labels=[]", "data.recpe.labels: unknown field; did you mean data.recipe.labels?"),
    (
        "data.recipe.quality.x.y=1",
        "data.recipe.quality.x.y: unknown field; the fields of data.recipe.quality are min_words, max_words",
    ),
    ("data.recipe.kinds.x=1", "data.recipe.kinds.x: unknown field; data.recipe.kinds has no fields; set it as a whole"),
    ("data.recipe.seq_len=3", "data.recipe.seq_len: unknown field; did you mean train.seq_len?"),
    ("data.recipe.labels.min=3", "data.recipe.labels.min: unknown field; did you mean data.recipe.labels[N].min?"),
]


@pytest.mark.usefixtures("deeper_spec")
def test_errors_at_any_depth_have_their_path_line_rule_and_remedy(tmp_path: Path) -> None:
    errors = refusal(write(tmp_path, GOOD_TEXT + BAD_RECIPE))
    assert errors == [f"data.recipe.{error}" for error in BAD_RECIPE_ERRORS]
    path = write(tmp_path, GOOD_TEXT)
    found = [(override, "".join(refusal(path, [override]))) for override, _ in BAD_RECIPE_OVERRIDES]
    assert found == BAD_RECIPE_OVERRIDES


def test_override_that_is_not_yaml_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"--set parallel\.tp: is not valid YAML"):
        load_spec(write(tmp_path, GOOD_TEXT), ["parallel.tp=[1"])


# --- writing, comparing, describing


@settings(max_examples=50)
@given(
    lr=st.floats(1e-12, 1e3, exclude_min=True),
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1).filter(
        lambda text: text == text.strip() and len(text.encode()) < 240
    ),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_written_spec_reads_back_equal(
    lr: float, name: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = parse_spec(changed({"optimizer.lr": lr, "data.source": [f"x{name}"], "data.text_field": name, "seed": seed}))
    assert load_spec(write(tmp_path_factory.mktemp("spec"), dump_spec(spec))) == spec


@pytest.mark.parametrize(
    "word", ["1e3", "yes", "null", "~", "1:30", "2024-01-01", "0x10", "010", "true", "3", "", "=", "<<"]
)
def test_text_that_looks_like_something_else_stays_text(word: str, tmp_path: Path) -> None:
    spec = parse_spec(changed({"data.text_field": word or " "}))
    assert load_spec(write(tmp_path, dump_spec(spec))) == spec
    # Readers with the older YAML 1.1 rules get the same text.
    assert yaml.safe_load(dump_spec(spec))["data"]["text_field"] == (word or " ")


def test_differences_are_listed_by_field() -> None:
    a = parse_spec(BASE)
    b = parse_spec(changed({"parallel.tp": 2, "optimizer.lr": 3e-4, "data.source": ["a", "b"], "model.bias": True}))
    assert diff_specs(a, a) == []
    assert diff_specs(a, b) == [
        "model.bias: null -> true",
        "parallel.tp: 1 -> 2",
        "data.source: [quickstart] -> [a, b]",
        "optimizer.lr: 0.001 -> 0.0003",
    ]


def test_description_explains_padding_layout_batch_and_tokens() -> None:
    spec = parse_spec(
        changed(
            {"model.preset": "gpt2-124m", "parallel.tp": 2, "parallel.pp": 2, "parallel.dp": 2, "model.num_layers": 12}
        )
    )
    rows = dict(describe(spec))
    assert rows["parameters"] == "124,439,808"
    assert rows["vocabulary"] == "50,257 tokens, padded to 50,258 so that each of the 2 tp ranks holds 25,129 rows"
    assert rows["layout"] == "tp 2 x pp 2 x dp 2 x cp 1 = 8 ranks"
    assert rows["pipeline"] == "1f1b, 2 stages, 4 microbatches, bubble 20.0% for equal stages"
    assert rows["batch"] == "32 sequences = 4 micro_batch_size x 4 microbatches x 2 dp"
    assert rows["tokens per step"] == "4,096 (32 sequences of 128)"
    assert rows["total tokens"] == "409,600 in 100 steps, 0.00329 a parameter"
    assert "recipe" not in rows
    example = load_spec(next(path for path in EXAMPLES if path.name == "web-corpus.yaml"), ["data.dedup.url=false"])
    assert dict(describe(example))["recipe"] == (
        "clean (html, repair_encoding, unicode, pii); filter (languages, gopher, gopher_repetition, c4, fineweb); "
        "dedup (exact, near, lines, substring); decontaminate (2 evaluation sets)"
    )


# --- examples, schema, speed


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_valid_and_obeys_the_exported_schema(path: Path) -> None:
    spec = load_spec(path)
    assert describe(spec)
    validator = jsonschema.Draft202012Validator(json_schema())
    document = yaml.safe_load(dump_spec(spec))
    validator.validate(document)
    # JSON has one kind of number and no 3e-4 problem; the file as written must obey the schema as well.
    validator.validate(json.loads(json.dumps(read_yaml(path.read_text(encoding="utf-8"), path.name).value)))


def test_there_are_examples_and_quickstart_has_eight_ranks() -> None:
    quickstart = next(path for path in EXAMPLES if path.name == "quickstart.yaml")
    spec = load_spec(quickstart)
    assert (spec.parallel.tp, spec.parallel.pp, spec.parallel.dp, spec.world_size) == (2, 2, 2, 8)
    assert spec.train.output_dir == "runs/quickstart"


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel.tpp": 2},
        {"zero.stage": 4},
        {"parallel.cp": 2},
        {"train.num_steps": -1},
        {"seed": "x"},
        {"data.corpora": {"web": {"source": ["a"], "wieght": 1}}},
        {"data.stages": [{"tokens": 0, "weights": {"web": -1}}]},
    ],
)
def test_schema_refuses_what_the_spec_refuses(changes: dict[str, Any]) -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(BASE, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(changes), schema)


def test_loading_takes_under_a_second_and_imports_no_torch() -> None:
    # Processor time, interpreter start included, so that a busy machine does not decide.
    program = (
        "import sys, time\n"
        "from trimaran.runtime.spec import SpecError, describe, load_spec\n"
        "describe(load_spec(sys.argv[1]))\n"
        "try:\n"
        "    load_spec(sys.argv[1], ['parallel.tp=3', 'seed=x'])\n"
        "except SpecError:\n"
        "    heavy = [name for name in ('torch', 'numpy', 'triton', 'deepspeed') if name in sys.modules]\n"
        "    print(heavy, time.process_time())\n"
    )
    quickstart = next(path for path in EXAMPLES if path.name == "quickstart.yaml")
    done = subprocess.run(
        [sys.executable, "-c", program, str(quickstart)], capture_output=True, text=True, check=True, timeout=60
    )
    heavy, _, seconds = done.stdout.strip().rpartition(" ")
    assert heavy == "[]"
    assert float(seconds) < 1.0
