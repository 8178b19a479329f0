"""The plan of a spec: memory beside what the dry step counted, time by the list that is executed, totals by formula."""

from pathlib import Path
from typing import Any

import pytest

from trimaran.models.presets import preset
from trimaran.runtime.plan.cases import Cases
from trimaran.runtime.plan.chips import chip_named
from trimaran.runtime.plan.forecast import Plan, Setting, case_of, plan, timeline
from trimaran.runtime.plan.memory.ranks import CONTEXT_BYTES
from trimaran.runtime.plan.time.calibrations import shipped
from trimaran.runtime.plan.time.step import step_time
from trimaran.runtime.spec import RunSpec, load_spec

ROOT = Path(__file__).parents[2]
FALCON = ROOT / "examples" / "falcon-40b.yaml"
GIB = 2**30


def setting(**changes: Any) -> Setting:
    fields: dict[str, Any] = {
        "chip": chip_named("A100-40GB"), "software": None, "nic_rate": 50e9 / 8, "gpus_per_node": 8, "price": 2.0,
        "watts": None, "pue": 1.1, "hours_per_failure": 50_700.0, "restart": 300.0, "write_rate": 1e10,
    }  # fmt: skip
    return Setting(**fields | changes)


def falcon(*sets: str) -> RunSpec:
    return load_spec(FALCON, list(sets))


def planned(*sets: str, **changes: Any) -> Plan:
    return plan(falcon(*sets), setting(**changes))


@pytest.mark.parametrize(
    ("stage", "counted"),
    [(1, [11.96, 10.75, 9.97, 9.69]), (2, [8.01, 7.03, 6.25, 5.74]), (3, [6.04, 5.17, 4.39, 3.66])],
)
def test_falcon_40b_s_ranks_hold_what_the_dry_step_counted(stage: int, counted: list[float]) -> None:
    """benchmarks/RESULTS.md has the dry step's GiB; the context is no tensor."""
    found = planned(f"zero.stage={stage}")
    for rank, gib in enumerate(counted):
        assert (found.total(rank) - CONTEXT_BYTES) / GIB == pytest.approx(gib, rel=0.05)
    assert found.fullest == 0
    assert found.exact


def test_the_fullest_rank_is_found_and_not_assumed() -> None:
    """A first stage of few layers holds less than the second, however many microbatches it keeps."""
    assert planned("parallel.layers_per_stage=[6, 18, 18, 18]").fullest == 1


def test_the_simulated_list_takes_what_the_closed_form_says() -> None:
    """1F1B, even stages: m x slowest + the others."""
    spec, own = falcon("parallel.layers_per_stage=[15, 15, 15, 15]"), setting()
    found = plan(spec, own)
    closed = step_time(Cases.of([case_of(spec, own)]), shipped().default.values())
    assert found.seconds == pytest.approx(float(closed.total[0]), rel=0.03)
    assert found.bubble == pytest.approx(3 / 11, abs=0.05)
    assert sum(found.parts.values()) == pytest.approx(found.seconds)


def test_many_microbatches_are_not_all_simulated() -> None:
    few, many = planned("train.global_batch_size=9600"), planned("train.global_batch_size=192000")
    per_microbatch = [each.seconds / count for each, count in ((few, 800), (many, 16_000))]
    assert per_microbatch[1] == pytest.approx(per_microbatch[0], rel=0.02)


def test_falcon_40b_s_two_months_are_planned_a_seventh_too_long() -> None:
    """1 trillion tokens on 384 A100-40GB, 1152 sequences a step. No calibration has its software (docs/planner.md)."""
    found = planned("train.global_batch_size=1152", "train.num_steps=423855")
    assert found.figures["days"] == pytest.approx(68.4, abs=0.5)


def test_a_parallel_block_reduces_its_stream_less_often() -> None:
    """Two branches share the forward reduction; with one norm they share that of the gradient too."""
    shapes = {"sequential": 4.0, "parallel": 3.0, "parallel_one_norm": 2.0}
    times = []
    for block, reductions in shapes.items():
        found = planned(f"model.block={block}")
        assert case_of(falcon(f"model.block={block}"), setting()).reductions == reductions
        times.append(found.parts["tensor-parallel"])
    assert times == pytest.approx([times[0], times[0] * 3 / 4, times[0] / 2])


def test_zero_2_and_3_send_with_every_microbatch() -> None:
    """Stage 2 its gradients, stage 3 its parameters too (docs/memory.md); stages 0 and 1 once a step."""
    sharded = [
        planned(f"zero.stage={stage}", "train.global_batch_size=960").parts["sharded state"] for stage in range(4)
    ]
    assert sharded[:2] == [0, 0]
    assert 0 < sharded[2] < sharded[3]


def test_selective_recomputation_costs_what_it_reads_again() -> None:
    kept, again, whole = (planned(f"train.recompute={each}") for each in ("none", "selective", "full"))
    assert kept.parts["memory-bound"] < again.parts["memory-bound"]
    assert kept.seconds < again.seconds < whole.seconds


def test_the_timeline_is_that_of_the_list_and_its_ends_are_the_pipelines() -> None:
    spec = falcon("train.global_batch_size=96")
    spans = timeline(spec, setting())
    assert {span.rank for span in spans} == {0, 1, 2, 3}
    found = planned("train.global_batch_size=96")
    tail = found.parts["data-parallel"] + found.parts["optimizer"]
    assert max(span.stop for span in spans) / 1e3 == pytest.approx(found.seconds - tail)


def test_palm_s_mfu_is_exact() -> None:
    """38.79 tokens a second and chip on TPU v4 are 46.2% (Chowdhery et al. 2022, table 3)."""
    flops = preset("palm-540b").flops_per_token(2048)
    assert 38.79 * flops / chip_named("TPUv4").flops == pytest.approx(0.462, abs=5e-4)


def test_totals_follow_from_the_step() -> None:
    found = planned()
    figures, spec = found.figures, falcon()
    hours = found.seconds * spec.train.num_steps / 3600 * 384
    assert figures["GPU-hours"] == pytest.approx(hours)
    assert figures["money"] == pytest.approx(2 * hours)
    assert figures["MWh"] == pytest.approx(hours * 400 * 1.1 / 1e6)
    assert figures["checkpoint bytes"] == 12 * spec.transformer.num_parameters()
    assert figures["MFU"] == figures["HFU"] < 1
    assert figures["days with failures"] > figures["days"]
    recomputed = planned("train.recompute=full").figures
    assert recomputed["HFU"] > recomputed["MFU"] < figures["MFU"]


def test_no_price_is_no_money() -> None:
    assert "money" not in planned(price=None).figures


def test_llama_65b_s_energy() -> None:
    """1,022,362 GPU-hours of 400 W at a PUE of 1.1 are 449 MWh (Touvron et al. 2023, table 15)."""
    assert 1_022_362 * chip_named("A100-80GB").watts * 1.1 / 1e6 == pytest.approx(449, rel=0.02)


def test_an_error_band_is_that_of_the_calibration_or_none() -> None:
    assert planned().error == shipped().default.p90
    assert planned(software="internevo").error is None, "calibrated on 8 to 512 A100-80GB"
    near = planned(software="internevo", chip=chip_named("A100-80GB"))
    assert near.error is not None
    assert near.calibration.software == "internevo"


@pytest.mark.parametrize("field", ["parallel.tp", "zero.stage"])
def test_memory_never_rises_with_tp_or_zero_stage(field: str) -> None:
    values = {"parallel.tp": (1, 2, 4, 8), "zero.stage": (0, 1, 2)}[field]
    found = [planned(f"{field}={value}") for value in values]
    totals = [each.total(each.fullest) for each in found]
    assert totals == sorted(totals, reverse=True)
