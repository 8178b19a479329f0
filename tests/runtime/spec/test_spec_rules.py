"""The rules of the run spec read the fields that they name, and are skipped where one that they need is unknown.

Every rule is run on the good and the bad specs of test_spec.py, with records that note which fields are read.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar, get_args

import pytest
from pydantic import BaseModel

from tests.runtime.spec.test_spec import BAD, GOOD, changed
from trimaran.models.config import TransformerConfig
from trimaran.models.fields import Derived, FieldError, Rule, RuleTable
from trimaran.models.shape.rules import SHAPE_RULES
from trimaran.runtime.pipeline.schedules import SCHEDULES, ScheduleName
from trimaran.runtime.spec.fields import RunFields, draft_transformer
from trimaran.runtime.spec.names import known_paths
from trimaran.runtime.spec.rules import RULES, broken_rules
from trimaran.runtime.spec.tree import parts_of, step
from trimaran.runtime.train.lr_schedule import DECAYS, ENDING, REQUIRED_FIELDS, LrScheduleName

Record = TypeVar("Record", bound=BaseModel)
AnyRule = Rule[[RunFields, TransformerConfig]]
READ: set[str] = set()
# Changes for branches that no single wrong field reaches.
FURTHER: list[dict[str, Any]] = [
    {"model.preset": "gpt2-124m"},
    {"parallel.tp": 8, "parallel.uneven_heads": True, "model.num_kv_heads": 12},
    {"parallel.tp": 5, "model.ffn_hidden_size": 7, "parallel.ep": 2, "model.num_experts": 2},
    {"kernels.backend": "triton", "precision.dtype": "float64", "launcher.device": "cpu", "model.head_dim": 512},
    {"model.rotary_scaling": {"kind": "ntk", "factor": 2.0}, "model.rotary_dim": 2, "model.rotary_base": 1.0},
    {"model.rotary_scaling": {"kind": "ntk", "factor": 2.0}, "model.head_dim": 3},
    {"model.rotary_scaling": {"kind": "ntk", "factor": 2.0}, "model.position": "alibi"},
    {"model.rotary_dim": 65},
    {"model.score_head": "only"},
    {"finetune": {"method": "rl", "rl": {"algorithm": "ppo", "rewards": ["length:9"]}}, "model.score_head": "beside"},
    {"finetune": {"method": "rl", "rl": {"rewards": ["length:9"], "value_from": "runs/reward"}}},
    {"model.block": "parallel", "model.norm_position": "post", "model.residual_scale": 2.0},
    {"model.residual_scale": 2.0, "model.init": "tfixup", "model.head_transform": True},
    {"model.attention_pattern": []},
    {"model.attention_pattern": ["window"]},
    {"model.init": "mup"},
    {"model.mup_base_width": 64},
    {"lr_schedule.name": "wsd", "lr_schedule.decay_steps": 50},
    {"data.corpora": {"web": {"source": ["web"]}}, "data.stages": [{"tokens": 0, "weights": {"web": 1}}] * 2},
    {"zero.stage": 0, "zero.shard_size": 2},
    {"evaluation": {"tasks": ["piqa"]}, "model.objective": "masked_lm"},
    {"finetune": {}, "train.num_steps": 0, "data.source": ["chats.jsonl"]},
    {"finetune": {"epochs": 2.0, "method": "reward", "loss_on": "all"}, "data.format": "messages"},
    {"finetune": {"preference": {}}, "data.source": ["a.jsonl"], "data.clean": {}, "model.objective": "masked_lm"},
    {"finetune": {"method": "rl"}, "data.format": "prompts"},
    {"data.format": "alpaca"},
    {"zero.shard_size": 3, "parallel.dp": 12, "parallel.ep": 2},
    {"finetune": {"adapter": {}}, "model.objective": "masked_lm"},
    {"finetune": {"adapter": {"base": "nf4"}}, "parallel.tp": 3, "model.num_kv_heads": 4},
    {"finetune": {"adapter": {"base": "nf4"}}, "parallel.tp": 16, "model.num_kv_heads": 4, "model.num_heads": 16},
    {"finetune": {"adapter": {"base": "nf4"}, "method": "rl", "rl": {"rewards": ["length:9"], "kl": 0.1}}},
]


@cache
def watched(record: type[Record], path: str) -> type[Record]:
    """Return the class with a note in READ of every field that is looked at, by its path in a spec."""

    def look(self: Any, name: str) -> Any:
        if path and name in record.model_fields:
            READ.add(f"{path}.{name}")
        return record.__getattribute__(self, name)

    return type(f"Watched{record.__name__}", (record,), {"__getattribute__": look, "__module__": __name__})


def watch(value: Any, path: str = "") -> Any:
    """Return a copy of a record, and of those in it, that notes in READ what is looked at; the shape as a whole."""
    if isinstance(value, dict):
        return {name: watch(item, f"{path}.NAME") for name, item in value.items()}
    if isinstance(value, list):
        return [watch(item, f"{path}[N]") for item in value]
    if not isinstance(value, BaseModel):
        return value
    copy = value.model_copy()
    if not isinstance(value, TransformerConfig):
        vars(copy).update({name: watch(part, step(path, name)) for name, part in vars(copy).items()})
    object.__setattr__(copy, "__class__", watched(type(value), path))
    return copy


@cache
def specs() -> list[RunFields]:
    """Return the specs in which every field is valid by itself."""
    found = []
    for changes in [*GOOD, *FURTHER, *(changes for changes, _ in BAD)]:
        raw = {name: section if section is not None else {} for name, section in changed(changes).items()}
        try:
            found.append(RunFields.model_validate(raw))
        except ValueError:
            continue
    assert len(found) > 60
    return found


def without(spec: RunFields, path: str) -> RunFields:
    """Return a draft that lacks one field; of items the first one lacks it, and a record that is null lacks none."""
    draft = spec.model_copy(deep=True)
    *way, name = parts_of(path)
    holder: Any = draft
    for part in way:
        holder = holder[part] if isinstance(part, int) else getattr(holder, part)
    if holder is not None:
        del vars(holder)[name]
    return draft


def rules() -> Iterator[AnyRule]:
    """Yield every rule as one of (spec, shape), with paths of a spec."""
    yield from RULES.rules
    for rule in SHAPE_RULES.rules:
        paths = (tuple(f"model.{name}" for name in names) for names in (rule.needs, rule.may_read))
        yield Rule(lambda spec, shape, check=rule.check: check(shape), *paths)  # type: ignore[misc]


def is_known(spec: RunFields, shape: TransformerConfig, path: str) -> bool:
    """Return whether a draft has a field; of items all must have it."""
    section, *names = parts_of(path)
    holders: list[Any] = [shape if section == "model" and names != ["preset"] else vars(spec)[str(section)]]
    for name in names:
        holders = [holder for holder in holders if holder is not None]
        if name == "NAME":
            holders = [item for holder in holders for item in holder.values()]
        elif isinstance(name, int):
            holders = [item for holder in holders for item in holder or ()]
        elif any(name not in vars(holder) for holder in holders):
            return False
        else:
            holders = [vars(holder)[name] for holder in holders]
    return True


@cache
def watched_specs() -> list[tuple[RunFields, TransformerConfig]]:
    """Return the specs and their shapes, which note in READ what is looked at."""
    return [(watch(spec), watch(draft_transformer(spec), "model")) for spec in specs()]


def problems(rule: AnyRule) -> list[str]:
    """Return what is wrong with the fields that a rule names."""
    named = {*rule.needs, *rule.may_read}
    found = [f"{path} is no field" for path in sorted(named - set(known_paths()))]
    if found:
        return found
    read: set[str] = set()
    for spec, shape in watched_specs():
        if all(is_known(spec, shape, path) for path in rule.needs):
            READ.clear()
            list(rule.check(spec, shape))
            read |= READ
    found += [f"{path} is read and not named" for path in sorted(read - named)]
    return found + [f"{path} is named and never read" for path in sorted(named - read)]


def test_every_rule_names_the_fields_that_it_reads_and_no_others() -> None:
    found = {rule.needs: wrong for rule in rules() if (wrong := problems(rule))}
    assert not found
    assert len(RULES.rules) + len(SHAPE_RULES.rules) == len(list(rules())) > 45


def test_a_slip_in_a_rule_is_found() -> None:
    table = RuleTable[[RunFields, TransformerConfig]]()

    @table.needs("parallel.tpp")
    def misspelled(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
        yield from ()

    @table.needs("parallel.tp", "zero.stage")
    def careless(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
        if spec.parallel.tp and spec.num_stages and shape.is_gated:
            yield from ()

    @table.needs("data.corpora", "data.stages", "data.stages[N].weights")
    def careless_below_a_section(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
        if sum(each.tokens for each in spec.data.stages or ()) > sum(
            each.weight for each in spec.data.corpora.values()
        ):
            yield from ()

    assert [problems(rule) for rule in table.rules] == [
        ["parallel.tpp is no field"],
        [
            "model.activation is read and not named",
            "parallel.pp is read and not named",
            "parallel.virtual_stages is read and not named",
            "zero.stage is named and never read",
        ],
        [
            "data.corpora.NAME.weight is read and not named",
            "data.stages[N].tokens is read and not named",
            "data.stages[N].weights is named and never read",
        ],
    ]


def test_a_rule_that_reads_what_a_draft_lacks_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(spec: RunFields, shape: TransformerConfig) -> Iterator[FieldError]:
        assert spec.train.num_steps
        yield from ()

    monkeypatch.setattr(RULES, "rules", [Rule(careless, (), ())])
    with pytest.raises(AttributeError, match="num_steps"):
        broken_rules(without(specs()[0], "train.num_steps"))


def test_without_a_field_the_rules_that_need_it_are_skipped_and_the_others_speak() -> None:
    silent = 0
    for spec in specs():
        shape, errors = draft_transformer(spec), broken_rules(spec)
        if not errors:
            continue
        for path in {path for rule in rules() for path in rule.needs if list_errors(rule, spec, shape)}:
            draft = without(spec, path)
            lacking = draft_transformer(draft)
            left = [error.rule for rule in rules() for error in list_errors(rule, draft, lacking)]
            assert sorted(error.rule for error in broken_rules(draft)) == sorted(left)
            silent += len(left) < len(errors)
    assert silent > 100


def list_errors(rule: AnyRule, spec: RunFields, shape: TransformerConfig) -> list[FieldError]:
    known = all(is_known(spec, shape, path) for path in rule.needs)
    return list(rule.check(spec, shape)) if known else []


def test_a_derived_default_reads_fields_declared_before_it() -> None:
    names = list(TransformerConfig.model_fields)
    derived = {
        name: field.default_factory.sources
        for name, field in TransformerConfig.model_fields.items()
        if isinstance(field.default_factory, Derived)
    }
    assert len(derived) == 11
    wrong = {name: sources for name, sources in derived.items() if not set(sources) <= set(names[: names.index(name)])}
    assert not wrong


def test_the_choices_of_a_field_are_the_keys_of_the_tables_that_serve_it() -> None:
    assert get_args(ScheduleName) == tuple(SCHEDULES)
    assert get_args(LrScheduleName) == tuple(DECAYS)
    assert {*ENDING, *REQUIRED_FIELDS} <= set(DECAYS)
