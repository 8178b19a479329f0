"""The search without its processes: its file, the space, proposals, early ends, the study on disk, and objectives."""

import errno
import json
import math
import os
import random
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

import trimaran.runtime.tune.plan
from trimaran.runtime.spec import RunSpec, SpecError
from trimaran.runtime.tune.objective import figures_of, rows_of, with_progress, wrong_objectives
from trimaran.runtime.tune.plan import Plan
from trimaran.runtime.tune.propose import losses_of, propose
from trimaran.runtime.tune.prune import step_of_end
from trimaran.runtime.tune.space import Part, Space, space_of
from trimaran.runtime.tune.study import CurvePoint, Found, Study, StudyError, Trial
from trimaran.runtime.tune.tune_spec import ObjectiveSection, PruneSection, SearchSection

BASE: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24},
    "data": {"tokenizer_vocab_size": 270},
    "optimizer": {"lr": 3e-3},
    "train": {"num_steps": 60, "global_batch_size": 8, "micro_batch_size": 1, "seq_len": 16, "eval_interval": 10},
}
SPACE: dict[str, Any] = {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
RANDOM = {"sampler": "random", "trials": 3}
LOWER = [ObjectiveSection()]


def write(folder: Path, base: dict[str, Any] | None = None, **fields: Any) -> Path:
    """Write a search and its base; return the search's file."""
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE if base is None else base))
    tune = {"base": str(folder / "base.yaml"), "output_dir": str(folder / "study"), "space": SPACE, "search": RANDOM}
    (folder / "tune.yaml").write_text(yaml.safe_dump(tune | fields, sort_keys=False))
    return folder / "tune.yaml"


def make_space(raw: dict[str, Any], *, is_grid: bool = False) -> Space:
    space, errors = space_of(raw, BASE, "base.yaml", is_grid=is_grid)
    assert not errors, errors
    return space


def trial_at(number: int, values: dict[str, Any] | None = None, state: Any = "complete", *curve: float) -> Trial:
    """A trial with a held-out loss every 10 steps."""
    points = tuple(CurvePoint(step=10 * i, tokens=0, held_out_loss=loss) for i, loss in enumerate(curve, start=1))
    figures = (curve[-1],) if curve and state == "complete" else None
    return Trial(number=number, values=values or {}, state=state, folder="", curve=points, objectives=figures)


def test_everything_that_people_vary_is_searchable() -> None:
    """Initialization, positions, optimizer, activation, rate, decay, loss, length, layers, heads, size, experts, batch,
    dropout: every draw is a run with these values, or breaks a rule."""
    space = make_space(
        {
            "model.init": ["normal", "depth_scaled", "xavier"],
            "model.position": ["learned", "rotary", "alibi"],
            "optimizer.name": ["adamw"],
            "optimizer.betas": [[0.9, 0.95], [0.9, 0.999]],
            "optimizer.eps": {"low": 1e-10, "high": 1e-6, "log": True, "step": 10},
            "model.activation": ["gelu", "swiglu"],
            "optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True},
            "optimizer.weight_decay": [0.0, 0.1],
            "lr_schedule.name": ["cosine", "wsd"],
            "lr_schedule.wsd_decay_fraction": {
                "low": 0.1,
                "high": 0.5,
                "step": 0.1,
                "when": {"lr_schedule.name": "wsd"},
            },
            "lr_schedule.warmup_steps": {"low": 0, "high": 20},
            "model.z_loss": [0.0, 1e-4],
            "model.label_smoothing": {"low": 0.0, "high": 0.2},
            "train.seq_len": [16, 32],
            "model.num_layers, model.hidden_size": [[2, 16], [4, 24]],
            "model.num_heads": [2, 4, 5],
            "model.ffn_hidden_size": {"low": 16, "high": 64, "step": 16},
            "model.num_experts": [None, 4],
            "train.global_batch_size": {"low": 4, "high": 32, "log": True, "step": 2},
            "model.hidden_dropout": {"low": 0.0, "high": 0.3},
            "model.attention_dropout": [0.0, 0.1],
        }
    )
    search, valid, seen = SearchSection(sampler="random", trials=60), 0, dict[str, set[str]]()
    trials: list[Trial] = []
    for number in range(60):
        coordinates = propose(search, LOWER, space, 0, trials)
        assert coordinates is not None
        values = space.values_at(coordinates)
        assert ("lr_schedule.wsd_decay_fraction" in values) == (values["lr_schedule.name"] == "wsd")
        trials.append(trial_at(number, values))
        if values["model.num_heads"] == 5:
            with pytest.raises(SpecError, match="divisible by num_heads"):
                space.spec_of(values, Part(), {})
            continue
        spec = space.spec_of(values, Part(), {})
        valid += 1
        for path, value in space.fields_of(values).items():
            section, _, name = path.partition(".")
            assert getattr(getattr(spec, section), name) == value
            seen.setdefault(path, set()).add(str(value))
        assert spec.train.eval_batches * spec.train.global_batch_size == 4 * BASE["train"]["global_batch_size"]
        assert Trial.model_validate_json(trials[-1].model_dump_json()) == trials[-1]
    assert 30 < valid < 60
    assert len(seen) == 22
    assert all(len(values) > 1 for path, values in seen.items() if path != "optimizer.name")


def test_presets_change_as_by_set(tmp_path: Path) -> None:
    base = BASE | {"model": {"preset": "gpt2-124m", "num_layers": 2, "vocab_size": 270}}
    space, errors = space_of(
        {"model.hidden_size": [48, 96], "model.preset": ["gpt2-124m", "gpt2-355m"]}, base, "", is_grid=False
    )
    assert not errors
    spec = space.spec_of({"model.hidden_size": 96, "model.preset": "gpt2-124m"}, Part(), {})
    assert (spec.transformer.num_layers, spec.transformer.hidden_size, spec.transformer.head_dim) == (2, 96, 8)
    fixed = Part(fixed={"model.num_layers": 3}, tokens=64 * 128)
    assert space.spec_of({"model.hidden_size": 48}, fixed, {}).transformer.num_layers == 3
    assert space.spec_of({"model.hidden_size": 48}, fixed, {}).train.num_steps == 64


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no field": ({"space": {"optimizer.lrr": [1e-3]}}, [r"no field of a run spec; did you mean optimizer\.lr\?"]),
    "another trainer's name": ({"space": {"train.batch_size": [1]}}, [r"did you mean train\.global_batch_size\?"]),
    "a section": ({"space": {"optimizer": [1]}}, ["is a section, not a field; name one of its fields"]),
    "the tuner's own": (
        {"space": {"train.output_dir": ["a"], "launcher.nodes": [1]}},
        ["train.output_dir can't be searched", "launcher.nodes can't be searched"],
    ),
    "low above high": (
        {"space": {"optimizer.lr": {"low": 0.1, "high": 0.01}}},
        [r"space\.optimizer\.lr\.low \(line 5\): must be below high, got low 0.1 and high 0.01"],
    ),
    "log of 0": (
        {"space": {"optimizer.weight_decay": {"low": 0.0, "high": 0.1, "log": True}}},
        ["has no logarithm, got 0.0 with log: true; set low above 0"],
    ),
    "empty": ({"space": {"optimizer.lr": []}}, ["must be a list with at least one value"]),
    "every one at once": (
        {
            "space": {
                "optimizer.lr": {"low": 1, "hihg": 2},
                "model.activation": ["gelu", "gleu"],
                "model.num_layers, model.hidden_size": [[1], [2, 32]],
                "seed": {"low": 1, "high": 5, "step": 0},
                "model.bias": {"low": 0, "high": 1},
            }
        },
        [
            r"lr\.hihg \(line 6\): unknown field; did you mean high\?",
            r"lr\.high \(line 4\): is required",
            "activation.*got 'gleu'.*did you mean gelu",
            "must have a value for each of the 2 fields",
            "step.*must be above 0, got 0",
            "model.bias is no number",
        ],
    ),
    "a condition on nothing": (
        {"space": {"optimizer.eps": {"values": [1e-8], "when": {"optimizer.nmae": "adamw"}}}},
        ["is no key of space that stands above this one"],
    ),
    "a condition that never holds": (
        {
            "space": {
                "lr_schedule.name": ["wsd"],
                "optimizer.eps": {"values": [1e-8], "when": {"lr_schedule.name": "cosine"}},
            }
        },
        ["'cosine' is none of the values of lr_schedule.name; they are 'wsd'"],
    ),
    "a grid without points": ({"search": {"sampler": "grid"}}, ["is a range without points.*give it a step"]),
    "no end": ({"search": {}}, ["search.trials.*is required for search.sampler tpe"]),
    "cmaes over lists": (
        {"space": {"optimizer.lr": [1e-3]}, "search": RANDOM | {"sampler": "cmaes"}},
        ["moves in ranges"],
    ),
    "two objectives": (
        {"objective": [{"metric": "held_out_loss"}, {"metric": "tokens_per_second"}], "prune": {"method": "median"}},
        ["prune.method.*can't judge a trial by two objectives"],
    ),
    "no such metric": ({"objective": {"metric": "held_out_los"}}, ["did you mean held_out_loss"]),
    "no such task": (
        {"objective": {"metric": "hellaswag/acc"}},
        ["is a metric of the task hellaswag, and the trials don't run it"],
    ),
    "first step too late": ({"prune": {"method": "median", "first_step": 60}}, ["must be below train.num_steps .60."]),
    "misspelled": (
        {"serach": {}, "search": RANDOM | {"sampler": "tpe2"}, "parallel_trials": 0},
        ["serach.*did you mean search", "search.sampler.*did you mean tpe", "parallel_trials.*must be at least 1"],
    ),
    "too many points": (
        {
            "space": {
                "optimizer.lr": {"low": 1e-3, "high": 1e-2, "step": 1e-5},
                "optimizer.weight_decay": {"low": 0, "high": 1, "step": 1e-3},
            },
            "search": {"sampler": "grid", "trials": 5},
        },
        ["has 901,901 points, and a grid can have 100,000"],
    ),
    "steps without a count": (
        {"space": {"optimizer.lr": {"low": 1e-3, "high": 1e-2, "step": 5e-324}, "model.bias": []}},
        ["makes inf steps"],
    ),
    "a step beyond the range": (
        {"space": {"optimizer.lr": {"low": 1e-3, "high": 1e-2, "step": 1}}},
        ["larger than the range, so that 0.001 alone would be tried"],
    ),
    "an empty name": ({"space": {"model.num_layers,": [[1, 2]]}}, ["'model.num_layers,' names an empty field"]),
    "nothing to search": ({"space": {}}, ["must have at least one name below it"]),
    "no such figure": (
        {"base": BASE | {"evaluation": {"tasks": ["arc_easy"]}}, "objective": "arc_easy/accuracy"},
        ["objective.metric .* has no figure accuracy of the task arc_easy.*did you mean arc_easy/acc?"],
    ),
    "no valid run": (
        {"space": {"model.num_heads": [5, 7]}},
        ["space.*none of 2 combinations over .* can be started: .* must be divisible by num_heads"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_search_is_refused_with_every_error(case: str, tmp_path: Path) -> None:
    fields, expected = WRONG[case]
    with pytest.raises(ValueError, match=expected[0]) as caught:
        Plan.load(write(tmp_path, **fields))
    for pattern in expected:
        assert re.search(pattern, str(caught.value)), str(caught.value)


def test_a_missing_base_and_a_run_spec_in_the_place_of_a_search_are_named(tmp_path: Path) -> None:
    search = write(tmp_path)
    (tmp_path / "base.yaml").rename(tmp_path / "away.yaml")
    with pytest.raises(SpecError, match=r"1 error in .*tune.yaml:\n  base \(line 1\): .*base.yaml cannot be read"):
        Plan.load(search)
    with pytest.raises(SpecError, match=r"is a run spec, not a search; write a file with base: .*away.yaml"):
        Plan.load(tmp_path / "away.yaml")


def test_values_inside_of_others_come_back_from_the_study(tmp_path: Path) -> None:
    """Fields that move together, one of which is a list."""
    key = "optimizer.betas, optimizer.lr"
    study, plan = study_at(tmp_path, space={key: [[[0.9, 0.95], 1e-3], [[0.9, 0.99], 1e-2]]}, search={"trials": 3})
    study.begin(plan.tune, plan.base)
    for _ in range(3):
        claim = study.claim(plan.next_trials)
        assert not isinstance(claim, str)
        study.record(claim.trial.model_copy(update={"state": "complete", "objectives": (1.0,)}))
        claim.lock.release()
    found = study.read()
    Plan.of_study(found)
    assert {trial.values[key] for trial in found.trials} <= {((0.9, 0.95), 1e-3), ((0.9, 0.99), 1e-2)}


def test_lines_of_a_trial_that_were_removed_are_proposed_again(tmp_path: Path) -> None:
    """And a trial that somebody has written into the study is refused."""
    study, plan = study_at(
        tmp_path, space={"model.num_heads": [2, 5], **SPACE}, search={"sampler": "tpe", "trials": 6, "seed": 1}
    )
    study.begin(plan.tune, plan.base)
    while not isinstance(claim := study.claim(plan.next_trials), str):
        study.record(claim.trial.model_copy(update={"state": "complete", "objectives": (3.0,)}))
        claim.lock.release()
    whole = study.read().trials
    assert {trial.state for trial in whole} == {"complete", "invalid"}
    path = study.folder / "study.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for lost in ([0], [2], [1, 3, 4], [len(whole) - 1]):
        path.write_text("".join(line for line in lines if not any(f'"number": {n},' in line for n in lost)))
        while not isinstance(claim := study.claim(plan.next_trials), str):
            study.record(claim.trial.model_copy(update={"state": "complete", "objectives": (3.0,)}))
            claim.lock.release()
        assert study.read().trials == whole
    for change, sentence in (
        ('"optimizer.lr"', '"optimizer.lrr"'), ("trials/00000", "../00000"),
    ):  # fmt: skip
        path.write_text(lines[0] + "".join(lines[1:]).replace(change, sentence))
        with pytest.raises(
            StudyError, match=r"trial 0 in study.jsonl has .*; remove its lines: it is then tried again"
        ):
            Plan.of_study(study.read())


def test_an_objective_that_the_runs_do_not_give_is_refused(tmp_path: Path) -> None:
    base = BASE | {"train": BASE["train"] | {"eval_interval": 0}, "data": BASE["data"] | {"held_out_fraction": 0.0}}
    with pytest.raises(SpecError) as caught:
        Plan.load(write(tmp_path, base))
    assert "the trials hold no text out; set data.held_out_fraction above 0" in str(caught.value)
    assert "the trials never evaluate; set train.eval_interval" in str(caught.value)
    assert Plan.load(write(tmp_path, base, objective={"metric": "tokens_per_second"})).first_spec()
    for task, metric in (("arc_easy", "arc_easy/acc"), ("mmlu", "mmlu_stem/acc"), ("leaderboard", "mmlu/acc")):
        evaluated = base | {"evaluation": {"tasks": [task]}}
        assert Plan.load(write(tmp_path, evaluated, objective={"metric": metric})).first_spec()


MIXED: dict[str, Any] = {
    "optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "optimizer.weight_decay": [0.0, 0.1, 0.3],
    "lr_schedule.name": ["cosine", "wsd"],
    "lr_schedule.wsd_decay_fraction": {"low": 0.1, "high": 0.5, "step": 0.1, "when": {"lr_schedule.name": "wsd"}},
}


def loss_of(values: dict[str, Any]) -> float:
    """A bowl around a rate of 10 ** -2.5."""
    bowl = (math.log10(values["optimizer.lr"]) + 2.5) ** 2
    return float(bowl + values["optimizer.weight_decay"] + 0.3 * (values["lr_schedule.name"] == "cosine"))


def run_search(sampler: Any, count: int, seed: int = 0) -> list[Trial]:
    space, trials = make_space(MIXED), list[Trial]()
    for number in range(count):
        coordinates = propose(SearchSection(sampler=sampler, trials=count, seed=seed), LOWER, space, 0, trials)
        assert coordinates is not None
        values = space.values_at(coordinates)
        trials.append(trial_at(number, values, "complete", loss_of(values)))
    return trials


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "qmc", "random"])
def test_proposals_follow_from_the_study_alone_and_get_better(sampler: str) -> None:
    trials = run_search(sampler, 32)
    assert run_search(sampler, 8) == trials[:8]
    assert run_search(sampler, 8, seed=1) != trials[:8]
    losses = [loss_of(trial.values) for trial in trials]
    if sampler in ("tpe", "cmaes"):
        assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    # Trials that run, failed, diverged or were never started are no obstacle.
    states: list[Any] = ["running", "failed", "diverged", "invalid", "pruned"]
    mixed = [trial.model_copy(update={"state": states[i % 5], "objectives": None}) for i, trial in enumerate(trials)]
    space = make_space(MIXED)
    assert propose(SearchSection(sampler=sampler, trials=99), LOWER, space, 0, [*trials[:16], *mixed]) is not None


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "cmaes"])
def test_no_values_are_tried_twice_while_there_are_others(sampler: Any) -> None:
    space = make_space({"optimizer.weight_decay": {"low": 0.0, "high": 0.3, "step": 0.1}, "train.seq_len": [8, 16]})
    trials: list[Trial] = []
    for number in range(10):
        found = propose(SearchSection(sampler=sampler, trials=10), LOWER, space, 0, trials)
        assert found is not None, "more than there are points, as asked for"
        values = space.values_at(found)
        trials.append(trial_at(number, values, "complete", values["optimizer.weight_decay"]))
    assert len({str(trial.values) for trial in trials[:8]}) == 8


def test_a_grid_has_every_point_once() -> None:
    space = make_space(MIXED | {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True, "step": 10}}, is_grid=True)
    for limit in (None, 20):
        points: list[Trial] = []
        search = SearchSection(sampler="grid", trials=limit)
        while (found := propose(search, LOWER, space, 0, points)) is not None:
            points.append(trial_at(len(points), space.values_at(found)))
        assert len(points) == len({str(point.values) for point in points}) == 4 * 3 * (1 + 5)
        assert {point.values["optimizer.lr"] for point in points} == {1e-4, 1e-3, 1e-2, 1e-1}


def test_tpe_takes_two_objectives() -> None:
    both = [ObjectiveSection(), ObjectiveSection(metric="tokens_per_second")]
    space, trials = make_space(MIXED), run_search("random", 14)
    trials = [
        trial.model_copy(update={"objectives": (loss_of(trial.values), 100.0 * i)}) for i, trial in enumerate(trials)
    ]
    trials[3] = trials[3].model_copy(update={"state": "diverged", "objectives": None})
    assert propose(SearchSection(sampler="tpe", trials=20), both, space, 0, trials) is not None
    losses = losses_of(both, trials)
    assert losses[3] is not None
    assert all(losses[3][0] > each[0] and losses[3][1] > each[1] for i, each in enumerate(losses) if i != 3 and each)


@pytest.mark.parametrize("method", ["median", "hyperband"])
def test_trials_are_ended_as_by_optuna(method: Any) -> None:
    """Sequential trials with noisy curves; of Hyperband one bracket, which is successive halving."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    first, factor, steps = 20, 3, 59
    pruner: optuna.pruners.BasePruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=first)
    if method == "hyperband":
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=factor)
    study = optuna.create_study(pruner=pruner)
    draw, trials, ended = random.Random(3), list[Trial](), 0
    prune = PruneSection(method=method, first_step=first, factor=factor)
    for number in range(40):
        end, start = draw.uniform(2, 4), draw.uniform(4, 6)
        curve = [start + (end - start) * i / 5 + draw.gauss(0, 0.2) for i in range(1, 6)]
        whole = trial_at(number, None, "running", *curve)
        ours = step_of_end(prune, whole, trials, steps)
        asked, theirs = study.ask(), None
        for point in whole.curve:
            asked.report(point.held_out_loss, point.step)
            if asked.should_prune():
                theirs = point.step
                break
        assert ours == theirs
        kept = curve if ours is None else curve[: ours // 10]
        trials.append(trial_at(number, None, "complete" if ours is None else "pruned", *kept))
        state = optuna.trial.TrialState.COMPLETE if ours is None else optuna.trial.TrialState.PRUNED
        study.tell(asked, kept[-1] if ours is None else None, state=state)
        ended += ours is not None
    assert 10 < ended < 35


def test_hyperband_has_brackets_that_begin_later() -> None:
    prune = PruneSection(method="hyperband", first_step=10, factor=2)
    good = [trial_at(number, None, "complete", *[1.0] * 8) for number in range(40)]
    ends = {step_of_end(prune, trial_at(number, None, "running", *[2.0] * 8), good, 80) for number in range(100, 200)}
    assert ends == {10, 20, 40, None}


def study_at(folder: Path, **fields: Any) -> tuple[Study, Plan]:
    plan = Plan.load(write(folder, **fields))
    return Study(Path(plan.tune.output_dir), {}), plan


def test_a_trial_is_claimed_once_and_left_by_a_process_that_ends(tmp_path: Path) -> None:
    """Threads stand for processes: each trial goes to one of them, and what one leaves the next one takes over."""
    study, plan = study_at(tmp_path, search={"sampler": "random", "trials": 12})
    assert study.begin(plan.tune, plan.base) == []
    claimed: list[int] = []

    def work() -> None:
        mine = Study(study.folder, {})
        while not isinstance(claim := mine.claim(plan.next_trials), str):
            claimed.append(claim.trial.number)
            if claim.trial.number % 4 == 3 and not claim.is_resumed:
                claim.lock.release()  # as the kernel does for a process that dies
                continue
            mine.record(claim.trial.model_copy(update={"state": "complete", "objectives": (1.0,)}))
            claim.lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = study.read()
    assert [trial.number for trial in found.trials] == list(range(12))
    assert {trial.state for trial in found.trials} == {"complete"}
    assert sorted(claimed) == sorted([*range(12), 3, 7, 11])
    alone = Plan.of_study(found).next_trials(Found(found.tune, found.base, ()))
    assert alone[0].values == found.trials[0].values


def test_a_line_that_was_cut_is_dropped_and_earlier_ones_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, plan = study_at(tmp_path)
    study.begin(plan.tune, plan.base)
    claim = study.claim(plan.next_trials)
    assert not isinstance(claim, str)
    before, file = study.read(), study.folder / "study.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"trial": {"number": 0, "sta')
    assert study.read() == before
    done = claim.trial.model_copy(update={"state": "diverged", "error": "loss"})
    study.record(done)
    assert file.read_bytes().startswith(whole + b'{"time": ')
    assert study.read().trials == (done,)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = file.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        study.record(claim.trial)
    assert caught.value.filename == str(file)
    assert file.read_bytes() == whole
    claim.lock.release()
    file.write_bytes(b"{}\n" + whole)
    with pytest.raises(StudyError, match="line 1 is damaged"):
        study.read()


def test_a_study_goes_on_with_its_own_settings_alone(tmp_path: Path) -> None:
    study, plan = study_at(tmp_path)
    study.begin(plan.tune, plan.base)
    same, longer = study_at(tmp_path, search=RANDOM | {"trials": 9}, parallel_trials=2)
    assert same.begin(longer.tune, longer.base) == ["search.trials: 3 -> 9", "parallel_trials: 1 -> 2"]
    assert study.read().tune.search.trials == 9
    changed = BASE | {"train": BASE["train"] | {"seq_len": 32}}
    other = {"optimizer.lr": {"low": 1e-5, "high": 1e-1, "log": True}}
    _, plan = study_at(tmp_path, base=changed, space=other, search=RANDOM | {"trials": 9, "seed": 4})
    with pytest.raises(StudyError) as caught:
        study.begin(plan.tune, plan.base)
    for line in ("base.train.seq_len: 16 -> 32", "space.optimizer.lr.low: 0.0001 -> 1e-05", "search.seed: 0 -> 4"):
        assert line in str(caught.value)
    assert "search.trials" not in str(caught.value)
    _, plan = study_at(tmp_path, space={"seed": [1, 2]})
    with pytest.raises(StudyError, match=r"has another study, over optimizer.lr; choose another output_dir"):
        study.begin(plan.tune, plan.base)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(StudyError, match=r"has metrics.jsonl and no study.jsonl, so it is not the folder of a study"):
        Study(tmp_path / "run", {}).begin(plan.tune, plan.base)


def test_a_search_in_which_every_proposal_breaks_a_rule_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimaran.runtime.tune.plan, "_MOST_INVALID", 20)
    plan = Plan.load(write(tmp_path, space={"model.num_heads": [2, *range(17, 30)], "optimizer.lr": [1e-3]}))
    plan = replace(plan, space=make_space({"model.num_heads": [5, 7]}))
    with pytest.raises(StudyError, match=r"the last 20 combinations all break a rule, \d+ of them: model"):
        plan.next_trials(Found(plan.tune, plan.base, ()))


def spec_of(**train: Any) -> RunSpec:
    return make_space(SPACE).spec_of(
        {"optimizer.lr": 1e-3}, Part(), {f"train.{key}": value for key, value in train.items()}
    )


def test_objectives_are_read_from_a_run_folder(tmp_path: Path) -> None:
    spec = spec_of()
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 2.0, "tokens_per_second": 1.0 if step == 1 else 100.0 + step} for step in range(1, 21)
    ]
    rows.insert(10, {"step": 10, "held_out_loss": 3.0})
    rows.append({"step": 20, "held_out_loss": 2.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data_manifest.json").write_text(json.dumps({"splits": {"held_out": {"tokens": 300, "bytes": 900}}}))
    results = tmp_path / "evaluations" / "last" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps({"results": {"arc_easy": {"acc,none": 0.25, "acc_stderr,none": 0.1, "alias": "x"}}}))
    read = rows_of(tmp_path)
    trial = with_progress(trial_at(0), spec, read)
    assert [(point.step, point.held_out_loss) for point in trial.curve] == [(10, 3.0), (20, 2.5)]
    assert trial.tokens == 20 * 8 * 16
    assert with_progress(trial_at(0), spec, read, 10).tokens == 10 * 8 * 16

    def figure(metric: str, of: Trial = trial) -> Any:
        return figures_of([ObjectiveSection(metric=metric)], of, tmp_path, read)

    assert figure("held_out_loss") == (2.5,)
    assert figure("held_out_loss", with_progress(trial_at(0), spec, read, 10)) == (3.0,)
    assert figure("bits_per_byte") == (pytest.approx(2.5 / 3 / math.log(2)),)
    assert figure("tokens_per_second") == (110.5,)
    assert figure("arc_easy/acc") == (0.25,)
    assert figure("arc_easy/f1") is None
    assert figure("held_out_loss", trial_at(0)) is None
    assert rows_of(tmp_path / "nowhere") == []
    lower = {
        name: ObjectiveSection(metric=name).is_better_lower for name in ("held_out_loss", "a/acc", "a/word_perplexity")
    }
    assert lower == {"held_out_loss": True, "a/acc": False, "a/word_perplexity": True}
    assert wrong_objectives(Plan.load(write(tmp_path)).tune, spec) == []
