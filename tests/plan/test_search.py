"""The search: every layout that it returns obeys the spec's rules, fits, and is no slower than what it is ahead of."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from trimaran.runtime.pipeline.schedules import SCHEDULES, ScheduleName, build_schedule
from trimaran.runtime.pipeline.simulate import Costs, simulate
from trimaran.runtime.plan.chips import chip_named
from trimaran.runtime.plan.forecast import Setting, plan
from trimaran.runtime.plan.memory.ranks import memory_of
from trimaran.runtime.plan.search.estimate import cases_of, estimated_bytes
from trimaran.runtime.plan.search.fewest import counts_up_to, fullest_bytes
from trimaran.runtime.plan.search.layouts import FIELDS, layouts_of, spec_of
from trimaran.runtime.plan.search.search import Search, search
from trimaran.runtime.spec import RunSpec, SpecError, load_spec, parse_spec

FALCON = Path(__file__).parents[2] / "examples" / "falcon-40b.yaml"
SETTING = Setting(chip_named("A100-40GB"), None, 50e9 / 8, 8, None, None, 1.1, 50_700.0, 300.0, 1e10)


def falcon() -> RunSpec:
    return load_spec(FALCON, ["train.global_batch_size=1152"])


@pytest.fixture(scope="module")
def found() -> Search:
    return search(falcon(), SETTING, gpus=384, headroom=0.05, fixed={}, most=3)


def test_what_is_found_obeys_the_rules_fits_and_is_ordered(found: Search) -> None:
    seconds = [each.plan.seconds for each in found.found]
    assert len(seconds) == 3
    assert seconds == sorted(seconds)
    assert found.tried > found.fitting > 1000
    for each in found.found:
        assert parse_spec(each.spec.model_dump(mode="json")) == each.spec
        assert each.spec.world_size == 384
        assert each.plan.total(each.plan.fullest) <= 0.95 * SETTING.chip.memory_bytes
        assert plan(each.spec, SETTING).seconds == each.plan.seconds
        for path, name in FIELDS.items():
            section, _, field = path.partition(".")
            assert getattr(getattr(each.spec, section), field) == getattr(each.layout, name)


def test_the_fastest_is_not_slower_than_the_published_layout(found: Search) -> None:
    """TP 8 x PP 4 x DP 12, which its authors ran."""
    assert found.found[0].plan.seconds <= plan(falcon(), SETTING).seconds
    assert found.found[0].lost == ""
    assert all(each.lost for each in found.found if each.plan.seconds > 1.005 * found.found[0].plan.seconds)


def test_every_neighbour_of_the_fastest_lost_by_something(found: Search) -> None:
    best, room = found.found[0], 0.95 * SETTING.chip.memory_bytes
    verdicts = {each.layout: verdict for each, verdict in found.beside}
    assert len(verdicts) == len(found.beside) > 8
    assert best.layout not in verdicts
    kinds = set()
    for each, verdict in found.beside:
        kinds.add(verdict.split(":")[0] if each.plan is None else verdict.split()[1])
        if each.plan is not None:
            assert each.plan.seconds >= best.plan.seconds
        elif each.spec is not None:
            assert plan(each.spec, SETTING).total(plan(each.spec, SETTING).fullest) > room
    assert {"memory", "traffic", "arithmetic"} <= kinds
    changed = {word for each, _ in found.beside for word in each.change.split(", ")}
    assert {"zero.stage", "recompute", "micro_batch_size", "virtual_stages"} <= {word.split()[0] for word in changed}


def test_the_largest_microbatch_fits_and_the_next_one_does_not(found: Search) -> None:
    best, room = found.found[0], 0.95 * SETTING.chip.memory_bytes
    sizes = [each for each in range(1, 1152 // best.layout.dp + 1) if 1152 // best.layout.dp % each == 0]
    assert best.layout.microbatch <= found.largest_microbatch in sizes
    fits = replace(best.layout, microbatch=found.largest_microbatch)
    assert fullest_bytes(spec_of(falcon(), fits)) <= room
    above = [each for each in sizes if each > found.largest_microbatch]
    for microbatch in above:
        try:
            own = spec_of(falcon(), replace(best.layout, microbatch=microbatch))
        except SpecError:
            continue
        assert fullest_bytes(own) > room
        break


def test_the_fewest_gpus_hold_the_run_and_no_fewer_do(found: Search) -> None:
    """By trying every layout of fewer, one by one."""
    room = 0.95 * SETTING.chip.memory_bytes
    assert fullest_bytes(spec_of(falcon(), found.fewest)) <= room
    fewer = [each for each in counts_up_to(384, 8) if each < found.fewest.gpus]
    assert fewer[-1] >= found.fewest.gpus - 8
    smallest = {"microbatch": 1, "recompute": "full", "zero": 3}
    for layout in layouts_of(falcon(), fewer[-1], 8, smallest):
        assert fullest_bytes(spec_of(falcon(), layout)) > room


def test_what_is_fixed_stays() -> None:
    fixed: dict[str, Any] = {"tp": 8, "recompute": "full"}
    for each in search(falcon(), SETTING, gpus=384, headroom=0.05, fixed=fixed, most=3).found:
        assert (each.layout.tp, each.layout.recompute) == (8, "full")


def test_layouts_fill_the_gpus_and_the_batch() -> None:
    layouts = list(layouts_of(falcon(), 96, 8, {}))
    assert len(layouts) == len(set(layouts)) > 1000
    for layout in layouts:
        assert layout.tp * layout.pp * layout.dp == 96
        assert 1152 % (layout.microbatch * layout.dp) == 0
    assert {each.zero for each in layouts if each.pp > 1} == {0, 1, 2, 3}


def test_a_spec_of_several_nodes_is_searched_too() -> None:
    spec = load_spec(FALCON, ["train.global_batch_size=1152", "launcher.nodes=48"])
    fixed: dict[str, Any] = {"tp": 8, "recompute": "none"}
    best = search(spec, SETTING, gpus=96, headroom=0.05, fixed=fixed, most=1).found[0]
    assert best.spec.launcher.nodes == 12


def test_nothing_that_fits_names_the_closest_what_is_missing_and_what_would_fit() -> None:
    small = replace(SETTING, chip=chip_named("RTX-4090"))
    pattern = (
        r"^no layout fits 8 RTX-4090: the closest, tp \d+ pp .*, lacks \d+\.\d GiB; "
        r"what would fit: (\d+) GPUs \(tp .*\), or 8 \S+$"
    )
    with pytest.raises(ValueError, match=pattern) as caught:
        search(falcon(), small, gpus=8, headroom=0.05, fixed={}, most=5)
    more = int(str(caught.value).split("what would fit: ")[1].split(" GPUs")[0])
    assert search(falcon(), small, gpus=more, headroom=0.05, fixed={}, most=1).found
    chip = chip_named(str(caught.value).rsplit(" ", 1)[1])
    assert search(falcon(), replace(small, chip=chip), gpus=8, headroom=0.05, fixed={}, most=1).found


@pytest.mark.parametrize(
    ("gpus", "fixed", "rule"),
    [
        (384, {"tp": 7}, r"tp \(7\) x pp \(1\) must divide the GPUs \(384\)"),
        (384, {"tp": 3}, r"tp \(3\) must divide num_heads \(128\), and num_kv_heads \(8\) or be divided"),
        (384, {"tp": 2, "pp": 2, "dp": 2}, r"tp \(2\) x pp \(2\) x dp \(2\) must be the GPUs \(384\)"),
        (384, {"pp": 64}, r"pp \(64\) must be at most num_layers \(60\)|must divide the GPUs"),
        (384, {"microbatch": 1000}, r"micro_batch_size \(1000\) x dp \(\d+\) must divide global_batch_size \(1152\)"),
        (384, {"pp": 4, "virtual_stages": 50}, r"pp \(4\) x virtual_stages \(50\) must be at most num_layers \(60\)"),
        (384, {"schedule": "zbv", "virtual_stages": 3}, r"schedule zbv takes virtual_stages 2, not 3"),
        (
            384,
            {"pp": 8, "dp": 6, "schedule": "dualpipev", "microbatch": 16},
            "schedule dualpipev needs 16 microbatches",
        ),
    ],
)
def test_an_empty_search_names_the_rule_that_emptied_it(gpus: int, fixed: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^no layout of {gpus} GPUs is left: ({rule})"):
        search(falcon(), SETTING, gpus=gpus, headroom=0.05, fixed=fixed, most=5)


def test_a_rule_of_the_spec_that_every_layout_breaks_is_named() -> None:
    with pytest.raises(ValueError, match=r"^every layout of 384 GPUs breaks a rule: parallel\.ep: .*num_experts is 0"):
        search(falcon(), SETTING, gpus=384, headroom=0.05, fixed={"ep": 2}, most=5)


@pytest.mark.parametrize("preset", ["falcon-40b", "mixtral-8x7b"])
def test_an_estimate_never_rules_out_what_fits(preset: str) -> None:
    """It is at most 30% above the exact count, which is the slack that the search gives it."""
    spec = load_spec(FALCON, ["train.global_batch_size=1152", f"model.preset={preset}", "model.vocab_size=65024"])
    layouts = list(layouts_of(spec, 64, 8, {}))[:: 13 * 17]
    estimates = estimated_bytes(cases_of(spec, SETTING, layouts), "bfloat16")
    ratios = []
    for layout, estimate in zip(layouts, estimates, strict=True):
        try:
            ratios.append(float(estimate) / fullest_bytes(spec_of(spec, layout)))
        except SpecError:
            continue
    assert len(ratios) > 25
    assert max(ratios) < 1.3
    assert 0.75 < sorted(ratios)[len(ratios) // 2] < 1.1


def test_gpipe_holds_every_microbatch() -> None:
    """Its peak is not that of fewer microbatches."""
    few, many = (
        memory_of(load_spec(FALCON, ["parallel.schedule=gpipe", f"train.global_batch_size={12 * count}"]))[0]
        for count in (8, 80)
    )
    assert many["activations"] == pytest.approx(10 * few["activations"])


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_step_of_few_microbatches_stands_for_one_of_many(name: str) -> None:
    """Each further microbatch takes as long as the slowest rank's work; the peak is the same, but GPipe's."""
    row, ranks = SCHEDULES[cast(ScheduleName, name)], 4
    virtual = row.virtual_stages or 3
    forward = [1.0 + 0.4 * (stage == ranks * virtual - 1) - 0.1 * (stage == 0) for stage in range(ranks * virtual)]
    costs = Costs.of_stages(forward, [2 * each for each in forward], forward)
    work = [0.0] * ranks
    for stage, rank in enumerate(row.placement(ranks, virtual)):
        work[rank] += 3 * forward[stage]
    short, long = (simulate(build_schedule(name, ranks, m, virtual, costs), costs) for m in (2 * ranks, 6 * ranks))
    assert short.makespan + 4 * ranks * max(work) == pytest.approx(long.makespan)
    assert (short.peak_held == long.peak_held) == (name != "gpipe")
