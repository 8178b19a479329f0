"""The search: every layout that it returns obeys the spec's rules, fits, and is no slower than what it is ahead of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimaran.runtime.plan.chips import chip_named
from trimaran.runtime.plan.forecast import Setting, plan
from trimaran.runtime.plan.search.search import FIELDS, Search, layouts_of, search
from trimaran.runtime.spec import RunSpec, load_spec, parse_spec

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


def test_what_is_fixed_stays() -> None:
    fixed: dict[str, Any] = {"tp": 8, "recompute": "full"}
    for each in search(falcon(), SETTING, gpus=384, headroom=0.05, fixed=fixed, most=1).found:
        assert (each.layout.tp, each.layout.recompute) == (8, "full")


def test_layouts_fill_the_gpus_and_the_batch() -> None:
    layouts = list(layouts_of(falcon(), 96, 8, {}))
    assert len(layouts) == len(set(layouts)) > 1000
    for layout in layouts:
        assert layout.tp * layout.pp * layout.dp == 96
        assert 1152 % (layout.microbatch * layout.dp) == 0


def test_nothing_that_fits_names_the_closest_and_what_is_missing() -> None:
    small = replace(SETTING, chip=chip_named("RTX-4090"))
    with pytest.raises(ValueError, match=r"^no layout fits RTX-4090: the closest, tp .* needs \d+\.\d GiB more; give"):
        search(falcon(), small, gpus=8, headroom=0.05, fixed={}, most=5)


def test_no_layout_at_all_names_the_rules() -> None:
    with pytest.raises(ValueError, match=r"^no layout of 384 GPUs: tp x pp x dp must be 384, tp must divide the heads"):
        search(falcon(), SETTING, gpus=384, headroom=0.05, fixed={"tp": 7}, most=5)
