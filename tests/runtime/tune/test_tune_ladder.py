"""The ladder on a trainer whose law is known: rungs, optima, the target's spec and its errors; muP's transfer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.tune.ladders import (
    BASE,
    BATCHES,
    RATES,
    WIDTHS,
    best_batch,
    best_rate,
    loss_of,
    read,
    record,
    shape,
    trials_of,
)
from trimaran.runtime.plan.scaling.figures import ScalingError
from trimaran.runtime.spec import load_spec
from trimaran.runtime.tune.extrapolate import Extrapolation, extrapolate, rows_of, write_extrapolation
from trimaran.runtime.tune.ladder import Ladder, ladder_of
from trimaran.runtime.tune.plan import Plan
from trimaran.runtime.tune.space import space_of
from trimaran.runtime.tune.study import Found, Study, StudyError, Trial
from trimaran.runtime.tune.transfer import carried_values


def climbed(noise: float = 0.0, **changes: Any) -> tuple[Extrapolation, Ladder]:
    ladder, space = read(**changes)
    return extrapolate(ladder, space, trials_of(ladder, space, noise), "runs/tune/target"), ladder


def test_a_ladder_finds_the_known_optimum_and_loss_of_its_target(tmp_path: Path) -> None:
    found, ladder = climbed(0.001)
    n = found.target.transformer.num_parameters()
    d = found.target.tokens_per_step * found.target.train.num_steps
    assert d / n == pytest.approx(20, rel=1e-3)
    assert found.predicted is not None
    assert found.predicted.covers(loss_of(n, d))
    assert found.predicted.value == pytest.approx(loss_of(n, d), rel=0.01)
    assert found.values["rate"].value == pytest.approx(best_rate(n, d), rel=0.1)
    assert found.values["rate"].covers(best_rate(n, d))
    (held,) = found.held_out
    assert held.run.parameters == max(rung.parameters for rung in ladder.rungs)
    assert abs(held.error) < 0.015
    assert found.held_out_optima[0].factor < 1.5
    assert found.target_flops == pytest.approx(d * found.target.transformer.flops_per_token(32))
    assert found.spent_flops == pytest.approx(sum(6 * 11 * r.parameters * r.tokens for r in ladder.rungs), rel=1e-3)
    assert not found.untold
    written = write_extrapolation(found, tmp_path)
    assert load_spec(written) == found.target, "target.yaml is ready to train"
    words = dict(rows_of(found))
    assert "by 0.3118 C^-0.1250" in words["DeepSeek LLM, learning rate"]
    assert "E 1." in words["law of the loss, E + C/N^c"]


def test_a_rung_keeps_the_proportions_of_the_bases_schedule() -> None:
    ladder, space = read()
    for part in ladder.parts(None):
        spec = space.spec_of({"optimizer.lr": 1e-3}, part, {})
        steps = spec.train.num_steps
        assert spec.lr_schedule.warmup_steps == pytest.approx(steps / 10, abs=1)
        assert spec.train.eval_interval == pytest.approx(steps / 4, abs=1)
        assert spec.tokens_per_step * steps == pytest.approx(part.tokens, rel=0.01)


def test_rate_and_batch_are_found_together() -> None:
    space = {"optimizer.lr": RATES, "train.global_batch_size": BATCHES}
    found, _ = climbed(space=space, ladder={"vary": ["rate", "batch"]})
    n = found.target.transformer.num_parameters()
    d = found.target.tokens_per_step * found.target.train.num_steps
    assert found.values["rate"].value == pytest.approx(best_rate(n, d), rel=0.1)
    assert found.values["batch"].value == pytest.approx(best_batch(n, d), rel=0.1)
    assert found.target.train.global_batch_size % 2 == 0, "a multiple of what a rank takes at once"
    assert abs(found.target.train.global_batch_size - best_batch(n, d)) <= 3


def test_several_ratios_part_parameters_from_tokens() -> None:
    found, ladder = climbed(ladder={"tokens_per_parameter": [20, 5, 80]})
    assert len(ladder.rungs) == 15
    assert {"A", "B", "a", "b", "E"} == set(found.loss.constants if found.loss else ())
    assert found.loss is not None
    assert found.loss.constants["a"].value == pytest.approx(0.35, rel=0.05)
    assert found.loss.constants["b"].value == pytest.approx(0.35, rel=0.05)
    assert [each.value for each in found.optima["rate"].exponents] == pytest.approx([-0.9, 0.2], rel=0.05)
    assert len(found.held_out) == 3


def test_too_few_rungs_are_said_and_give_no_number() -> None:
    found, _ = climbed(ladder={"rungs": [shape(width) for width in WIDTHS[:3]]})
    assert found.predicted is None
    assert found.loss is None
    assert found.values["rate"].low < found.values["rate"].value < found.values["rate"].high
    assert "no loss is predicted: E + C/N^c has 3 constants and needs 4 sizes" in found.untold[0]
    assert "takes one rung more" in found.untold[1]
    assert "held-out loss" not in dict(rows_of(found))


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        ({"low": 1e-4, "high": 8e-4, "log": True, "step": 2}, "widen high of optimizer.lr"),
        ({"low": 2e-2, "high": 0.32, "log": True, "step": 2}, "widen low of optimizer.lr"),
    ],
)
def test_the_best_at_an_edge_is_refused_for_every_rung_at_once(rates: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ScalingError) as caught:
        climbed(space={"optimizer.lr": rates})
    lines = str(caught.value).splitlines()
    assert len(lines) >= 2, lines
    assert all(line.startswith("rung ") for line in lines)
    assert sentence in lines[0]


def test_a_ladder_goes_on_from_a_range_that_was_widened(tmp_path: Path) -> None:
    """The trials so far are kept, and the values between and beyond them are tried."""
    narrow = {"optimizer.lr": RATES | {"low": 2e-4, "high": 1.6e-3}}
    tune = record(space=narrow)
    study = Study(tmp_path / "study", {})
    plan = Plan.of(tune, BASE, {}, "tune.yaml")
    study.begin(tune, BASE, plan.holds)
    started: list[Trial] = []
    while new := plan.next_trials(Found(tune, BASE, tuple(started))):
        started += [trial.model_copy(update={"state": "complete", "objectives": (3.0,)}) for trial in new]
    assert len(started) == len(WIDTHS) * 4
    for trial in started:
        study.record(trial)
    wide = record(space={"optimizer.lr": RATES | {"low": 1e-4, "high": 3.2e-3}})
    widened = Plan.of(wide, BASE, {}, "tune.yaml")
    changes = study.begin(wide, BASE, widened.holds)
    assert [change.partition(":")[0] for change in changes] == ["space.optimizer.lr.low", "space.optimizer.lr.high"]
    more = list(started)
    while new := widened.next_trials(Found(wide, BASE, tuple(more))):
        more += [trial.model_copy(update={"state": "complete"}) for trial in new]
    assert [trial.values["optimizer.lr"] for trial in more[len(started) :]] == [1e-4, 3.2e-3] * len(WIDTHS)
    shifted = record(space={"optimizer.lr": RATES | {"low": 3e-4, "high": 2.4e-3}})
    with pytest.raises(StudyError, match="begun with other settings"):
        study.begin(shifted, BASE, Plan.of(shifted, BASE, {}, "tune.yaml").holds)


def test_rungs_of_few_steps_are_told() -> None:
    found, ladder = climbed(ladder={"tokens_per_parameter": [0.02]})
    assert ladder.rungs[0].tokens / (8 * 32) == pytest.approx(3.1, abs=0.1), "3 steps"
    assert len(found.untold) == 0
    found, _ = climbed(ladder={"tokens_per_parameter": [0.01]})
    assert "rung 40.2K has a trial of 512 tokens where 402 were asked for, because its steps are few" in found.untold[0]


def test_rungs_have_names_of_their_own_and_ratios_are_named_once() -> None:
    shapes = [shape(64), shape(64) | {"ffn_hidden_size": 161}, shape(96), shape(128)]
    ladder, _ = read(ladder={"rungs": shapes})
    assert len({rung.name for rung in ladder.rungs}) == 4, [rung.name for rung in ladder.rungs]
    assert [part.rung for part in ladder.parts(None)] == [rung.name for rung in ladder.rungs]
    assert problems(ladder={"tokens_per_parameter": [20, 5, 20]})[0].startswith(
        "ladder.tokens_per_parameter: names 20 twice"
    )


def test_running_and_missing_trials_are_named() -> None:
    ladder, space = read()
    trials = trials_of(ladder, space)
    trials[3] = trials[3].model_copy(update={"state": "running"})
    with pytest.raises(ScalingError, match="1 trial running; run `trimaran tune` again"):
        extrapolate(ladder, space, trials, "runs/x")
    with pytest.raises(ScalingError, match="has no trial yet"):
        extrapolate(ladder, space, [], "runs/x")


def test_mup_searches_the_base_width_and_carries_its_rate() -> None:
    ladder, space = read(ladder={"transfer": "mup"})
    parts = ladder.parts(None)
    assert [part.follows for part in parts] == [None, *[parts[0].rung] * 4]
    assert [part.trials for part in parts] == [None, 1, 1, 1, 1]
    trials = trials_of(ladder, space)
    assert len(trials) == 11 + 4
    found = extrapolate(ladder, space, trials, "runs/tune/target")
    base, model = ladder.rungs[0].shape, found.target.transformer
    assert (model.init, model.mup_base_width, model.hidden_size) == ("mup", 32, 256)
    assert [model.logits_scale, model.attention_scale] == pytest.approx([32 / 256, model.head_dim**-0.5])
    assert model.init_std == base.init_std
    at_base = best_rate(ladder.rungs[0].parameters, ladder.rungs[0].tokens)
    assert found.target.optimizer.lr == pytest.approx(at_base, rel=0.01)
    assert found.values["rate"].value == pytest.approx(found.target.optimizer.lr, rel=1e-5)
    running = [trials[0].model_copy(update={"state": "running"}), *trials[1:11]]
    assert carried_values(["optimizer.lr"], running) is None


def problems(**changes: Any) -> list[str]:
    tune = record(**changes)
    space, errors = space_of(tune.space, BASE, "base.yaml", is_grid=False)
    return [str(error) for error in errors or ladder_of(tune, space)[1]]


BOTH = {"optimizer.lr": RATES, "train.global_batch_size": BATCHES}


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"ladder": {"vary": ["rate", "batch"]}}, ["ladder.vary: names batch, and space has no train.global_batch"]),
        ({"space": BOTH}, ["space: train.global_batch_size is not fitted over the rungs"]),
        (
            {"space": {"optimizer.lr": RATES, "optimizer.weight_decay": [0, 0.1]}},
            ["space: optimizer.weight_decay is not fitted over the rungs of a ladder"],
        ),
        ({"space": {"optimizer.lr": [1e-3, 2e-3, 4e-3]}}, ["space: points of 3 for each rung leave a parabola"]),
        (
            {"search": {"sampler": "tpe", "trials": 6}, "space": BOTH, "ladder": {"vary": ["rate", "batch"]}},
            ["search.trials: trials of 6 for each rung leave a parabola over rate and batch without an interval"],
        ),
        ({"objective": {"metric": "bits_per_byte"}}, ["objective: must be held_out_loss alone with a ladder"]),
        ({"ladder": {"rungs": ["gpt-tinny", shape(64), shape(96)]}}, ["ladder.rungs[0]: model.preset"]),
        (
            {"ladder": {"rungs": [{"hidden_size": 65}, {"num_layer": 3}, shape(96)], "target": "nothing"}},
            ["ladder.rungs[0]: model.", "ladder.rungs[1]: model.num_layer unknown", "ladder.target: model.preset"],
        ),
        ({"ladder": {"rungs": [shape(64), shape(64), shape(96)]}}, ["ladder.rungs: has two models of"]),
        ({"ladder": {"rungs": [shape(64), shape(96)]}}, ["ladder.rungs: has 2 sizes, and a law over them needs 3"]),
        (
            {"space": BOTH, "ladder": {"vary": ["rate", "batch"], "transfer": "mup"}},
            ["ladder.vary: is rate alone with transfer mup: by theory a batch is not carried"],
        ),
        (
            {"ladder": {"rungs": [*map(shape, (32, 64)), shape(96) | {"num_layers": 4}], "transfer": "mup"}},
            ["4 layers and the base width 2; transfer mup carries a rate over widths, not over depths"],
        ),
    ],
)  # fmt: skip
def test_a_ladder_that_can_tell_nothing_is_refused_before_it_starts(
    changes: dict[str, Any], sentences: Sequence[str]
) -> None:
    found = problems(**changes)
    for sentence in sentences:
        assert any(sentence in each for each in found), found


def test_a_preset_is_a_rung_without_the_shape_of_the_base() -> None:
    rungs = ["gpt-tiny", "llama-tiny", shape(64), shape(96)]
    ladder, space = read(ladder={"rungs": rungs, "target": {"preset": "llama-tiny", "num_layers": 8}})
    names = {rung.name: rung for rung in ladder.rungs}
    assert names["gpt-tiny"].parameters == 1_350_400
    assert names["llama-tiny"].parameters == 1_901_696
    assert ladder.target.shape.num_layers == 8
    assert names["gpt-tiny"].shape.position == "learned"
    assert space.base == BASE
