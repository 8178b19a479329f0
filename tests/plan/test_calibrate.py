"""Calibrations: constants that made points are found again, the file is read or refused, and drift is told."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimaran.runtime.plan.calibrate.compare import drift
from trimaran.runtime.plan.calibrate.costs import between, exchange_of, rate_between_nodes
from trimaran.runtime.plan.calibrate.fitted import fit_exchanges, fit_logs, fit_rates, seconds_of
from trimaran.runtime.plan.calibrate.fitted_gpu import BLANK, fit_constants
from trimaran.runtime.plan.calibrate.processor_step import processor_step
from trimaran.runtime.plan.calibrate.record import VERSION, Exchange, Machine, Point, Rates, read_machine
from trimaran.runtime.plan.calibrate.software import fit_software
from trimaran.runtime.plan.cases import Case, Cases
from trimaran.runtime.plan.chips import chip_named
from trimaran.runtime.plan.time.constants import Constants
from trimaran.runtime.plan.time.step import product, step_time
from trimaran.runtime.spec import RunSpec, parse_spec
from trimaran.runtime.train.calibration.exchange import group_sizes, merged, to_text

PUBLISHED = Path(__file__).parent / "published"
RATES = Rates(
    ranks=2, threads=1, dtype="float32", flops=9e10, memory_rate=8e10, gemm=0.9, half_depth=6.0, hbm=0.25,
    attention=0.6, call=1e-6, host=6e-4, traffic=3.0, stage=2e-3, update=1.1, residuals={"step": 0.03},
)  # fmt: skip
KINDS = [
    ("tp", "all_reduce"), ("tp", "all_gather"), ("tp", "reduce_scatter"),
    ("dp", "all_gather"), ("dp", "reduce_scatter"), ("pp", "transfer"), ("ep", "all_to_all"),
]  # fmt: skip
PRODUCTS = ((128, 128, 128), (512, 256, 64), (512, 704, 256), (1024, 1024, 1024), (2048, 512, 32))
MODELS = ((64, 128, 512, 64, 1), (256, 704, 512, 256, 2), (512, 1408, 512, 128, 1), (256, 704, 8192, 256, 1))


def point(what: str, shape: dict[str, int], seconds: float, **changes: Any) -> Point:
    fields: dict[str, Any] = {
        "what": what, "dtype": "float32", "ranks": 2, "threads": 1, "shape": shape, "seconds": seconds,
        "cpu_seconds": seconds, "spread": 0.02, "repeats": 9,
    }  # fmt: skip
    return Point(**fields | changes)


def points_of(rates: Rates) -> list[Point]:
    """What a machine of these rates would measure."""
    found = [point("copy", {"bytes": size}, 2 * size / rate) for size, rate in ((1 << 20, 8e10), (1 << 26, 2e10))]
    shapes: list[tuple[str, dict[str, int], str]] = [
        *(("product", dict(zip("mnk", each, strict=True)), "") for each in PRODUCTS),
        *(
            ("attention", {"seq": seq, "heads": 4, "head_dim": size}, name)
            for seq in (128, 1024) for size in (64, 128) for name in ("forward", "both")
        ),
        *(("update", {"elements": count}, "") for count in (10**5, 10**7)),
    ]  # fmt: skip
    for model in MODELS:
        for layers in (1, 3):
            shape = dict(zip(("hidden", "ffn", "vocab", "seq", "microbatch"), model, strict=True))
            shapes.append(("step", {**shape, "layers": layers, "heads": model[0] // 64}, ""))
    for what, shape, operation in shapes:
        empty = point(what, shape, 1.0, operation=operation)
        found.append(point(what, shape, seconds_of(rates, empty), operation=operation))
    return found


def machine(**changes: Any) -> Machine:
    exchanges = [
        Exchange(
            axis=axis, operation=name, ranks=2, latency=1e-4, rate=2e9, cpu_latency=5e-5, cpu_rate=4e9, residual=0.02
        )
        for axis, name in KINDS
    ]
    fields: dict[str, Any] = {
        "version": VERSION, "kind": "cpu", "name": "A processor", "cores": 2, "memory_bytes": 8 << 30, "processors": 0,
        "context_bytes": 200 << 20, "versions": {"torch": "2.13.0"}, "date": "2026-11-30T12:00:00+00:00",
        "spread": 0.03, "seconds": 90.0, "rates": [RATES], "constants": [], "exchanges": exchanges,
        "points": [],
    }  # fmt: skip
    return Machine(**fields | changes)


def spec(parallel: dict[str, Any] | None = None, **train: Any) -> RunSpec:
    return parse_spec(
        {
            "model": {
                "num_layers": 4, "hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 352, "vocab_size": 1024
            },
            "parallel": parallel or {},
            "data": {"tokenizer_vocab_size": 1024},
            "optimizer": {"lr": 1e-3},
            "launcher": {"threads_per_rank": 1},
            "train": {
                "num_steps": 10, "global_batch_size": 32, "micro_batch_size": 2, "seq_len": 128, **train
            },
        }
    )  # fmt: skip


# ---------------------------------------------------------------- fits


def test_rates_that_made_points_are_found_again() -> None:
    found = fit_rates(points_of(RATES), 2, 1, "float32")
    assert found.flops * found.gemm == pytest.approx(RATES.flops * RATES.gemm, rel=0.02)
    for name in ("host", "traffic", "stage", "update"):
        assert getattr(found, name) == pytest.approx(getattr(RATES, name), rel=0.1), name
    assert found.flops * found.attention == pytest.approx(RATES.flops * RATES.attention, rel=0.02)
    assert max(found.residuals.values()) < 0.02


def test_a_kind_that_was_not_measured_is_named() -> None:
    without = [each for each in points_of(RATES) if each.what != "attention"]
    with pytest.raises(ValueError, match="nothing was measured of attention in float32 on 2 ranks of 1 threads"):
        fit_rates(without, 2, 1, "float32")


def test_exchanges_are_a_latency_and_a_rate() -> None:
    sizes = (1 << 10, 1 << 16, 1 << 20, 1 << 23)
    made = [
        point("exchange", {"bytes": size}, 1e-4 + size / 2e9, cpu_seconds=5e-5 + size / 4e9, axis="tp",
              operation="all_reduce")
        for size in sizes
    ]  # fmt: skip
    (found,) = fit_exchanges(made)
    assert (found.latency, found.rate) == pytest.approx((1e-4, 2e9), rel=0.02)
    assert (found.cpu_latency, found.cpu_rate) == pytest.approx((5e-5, 4e9), rel=0.02)


def test_exchanges_between_nodes_are_told_apart() -> None:
    def of_ranks(seconds: float, nodes: int, ranks: int = 2) -> Point:
        shape = {"bytes": 1 << 20}
        changes = {"axis": "dp", "operation": "all_gather", "nodes": nodes, "ranks": ranks, "cpu_seconds": seconds}
        return point("exchange", shape, seconds, **changes)

    # Of six ranks on two nodes three pairs exchange at once, and the one in the middle lies on both nodes.
    pairs = [of_ranks(1e-3, 1), of_ranks(9e-3, 2), of_ranks(1e-3, 1)]
    found = merged([to_text([pair]) for pair in pairs for _ in range(2)])
    assert [(each.nodes, each.seconds) for each in found] == [(1, 1e-3), (2, 9e-3)]
    within, between_nodes = fit_exchanges(found)
    assert (within.nodes, between_nodes.nodes) == (1, 2)
    assert exchange_of([between_nodes, within], "dp", "all_gather", 2) == within
    assert exchange_of([between_nodes], "dp", "all_gather", 2) is None, "a plan is of one machine"
    whole = between_nodes.model_copy(update={"ranks": 6, "rate": 1.0})
    assert rate_between_nodes([within, between_nodes, whole]) == between_nodes.rate / 2
    assert rate_between_nodes([within, whole]) is None


@pytest.mark.parametrize(
    ("nodes", "axis", "expected"),
    [
        ("aa", "dp", [(2, False)]),
        ("aabb", "tp", [(2, False), (4, False)]),
        ("aabb", "dp", [(2, False), (4, False), (2, True)]),
        ("aaaabbbb", "dp", [(2, False), (4, False), (8, False), (2, True)]),
        ("ab", "dp", [(2, False)]),
        ("aaab", "dp", [(2, False), (4, False)]),
        ("aaa", "tp", [(3, False)]),
    ],
)
def test_groups_of_two_of_a_node_and_of_all_are_measured(
    nodes: str, axis: str, expected: list[tuple[int, bool]]
) -> None:
    assert group_sizes(axis, nodes) == expected


def test_a_fit_of_logs_is_not_moved_by_an_outlier() -> None:
    sizes = np.arange(1.0, 20.0)
    seconds = 3e-3 * sizes
    seconds[4] *= 5
    (slope,) = fit_logs(lambda values: np.asarray(np.log(values[0] * sizes / seconds)), [1.0])
    assert slope == pytest.approx(3e-3, rel=0.03)


GPU = Constants(0.7, 50.0, 0.85, 0.45, 0.6, 2e-5, 0.8, 3e-4, 4e-4, 1.3, 0.3, 0.5)
H100 = chip_named("H100-SXM")


def gpu_points(constants: Constants, case: Case) -> list[Point]:
    """What a GPU of these constants would measure, by the formulas of `time.step`."""
    size = 1 << 30
    found = [point("copy", {"bytes": size}, 2 * size / (case.memory_rate * constants.hbm), cpu_seconds=0.0)]
    for each in ((1024, 1024, 1024), (4096, 4096, 256), (4096, 4096, 1024), (8192, 8192, 8192)):
        seconds = product(Cases.of([case]), constants, *(np.array([float(size)]) for size in each))
        shape = dict(zip("mnk", each, strict=True))
        found.append(point("product", shape, float(seconds[0]), dtype="bfloat16", ranks=1, cpu_seconds=0.0))
    shape = {"seq": 4096, "heads": 32, "head_dim": 128}
    seconds_of_attention = 2.0 * 4096**2 * 32 * 128 / (case.flops * constants.attention)
    found.append(
        point("attention", shape, seconds_of_attention, dtype="bfloat16", ranks=1, cpu_seconds=0.0,
              operation="forward")
    )  # fmt: skip
    for hidden, ffn in ((256, 512), (4096, 11008)):
        heads = hidden // 64
        own = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": heads, "head_dim": 64, "gated": 1.0}
        time = step_time(Cases.of([Case(**{**vars(case), **own, "seq": 2048.0})]), constants)
        layer = max(float(time.layer[0]), float(time.host[0]))
        sizes = {"hidden": hidden, "ffn": ffn, "vocab": 512, "seq": 2048, "microbatch": 1, "heads": heads}
        for layers in (1, 3):
            seconds = 0.01 + layers * layer
            found.append(
                point("step", {**sizes, "layers": layers}, seconds, dtype="bfloat16", ranks=1, cpu_seconds=0.0)
            )
    return found


def test_constants_that_made_a_gpu_s_points_are_found_again() -> None:
    case = Case(**{**BLANK, "flops": H100.flops, "processors": 132.0, "memory_rate": H100.memory_rate,
                   "link_rate": H100.link_rate})  # fmt: skip
    found = fit_constants(gpu_points(GPU, case), [], "NVIDIA H100 80GB HBM3", 132, "bfloat16")
    assert found.is_datasheet
    assert found.flops == H100.flops
    for name in ("gemm", "half_depth", "hbm", "attention", "host", "traffic"):
        assert found.constants[name] == pytest.approx(getattr(GPU, name), rel=0.05), name
        assert name in found.measured
    assert "link" not in found.measured, "one GPU tells nothing of links"


# ---------------------------------------------------------------- the step


def test_ranks_that_outnumber_the_cores_wait_for_processor_time() -> None:
    found = processor_step(spec({"dp": 4}), machine())
    assert found.seconds == pytest.approx(found.cpu_seconds / 2)
    assert found.seconds > found.makespan
    alone = processor_step(spec(), machine())
    assert alone.seconds == alone.makespan
    assert alone.seconds > 1.9 * alone.cpu_seconds / 2


@pytest.mark.parametrize(
    "parallel", [{}, {"dp": 4}, {"tp": 2}, {"pp": 2}, {"tp": 2, "sequence_parallel": True}, {"tp": 2, "pp": 2, "dp": 2}]
)
def test_the_parts_of_a_step_add_up(parallel: dict[str, Any]) -> None:
    found = processor_step(spec(parallel), machine())
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert min(found.parts.values()) >= 0


def test_each_feature_costs_what_it_adds() -> None:
    def seconds(parallel: dict[str, Any], **train: Any) -> float:
        return processor_step(spec(parallel, **train), machine()).seconds

    assert seconds({"dp": 2}, recompute="full") > 1.2 * seconds({"dp": 2})
    assert seconds({"dp": 2}, micro_batch_size=1) > seconds({"dp": 2}), "the host's time of more microbatches"
    assert seconds({"tp": 2}) > seconds({"dp": 2}), "exchanges in every layer"
    assert seconds({"pp": 2}, global_batch_size=4) > seconds({"dp": 2}, global_batch_size=4), "a bubble"


def test_what_was_not_measured_is_not_guessed() -> None:
    lone = machine(exchanges=[])
    with pytest.raises(
        ValueError, match=r"^parallel.tp is 2, and the calibration of A processor has no exchanges over tp"
    ):
        processor_step(spec({"tp": 2}), lone)
    with pytest.raises(
        ValueError, match=r"^precision.dtype is float32, and the calibration of A processor has bfloat16"
    ):
        processor_step(spec(), machine(rates=[RATES.model_copy(update={"dtype": "bfloat16"})]))
    with pytest.raises(ValueError, match=r"^a rank has 4 threads, and the calibration has ranks of at most 1"):
        between([RATES], 4)


def test_threads_between_two_measured_numbers_lie_between_their_rates() -> None:
    many = RATES.model_copy(update={"threads": 4, "flops": 4 * RATES.flops})
    assert between([RATES, many], 2).flops == pytest.approx(RATES.flops * 4 ** (1 / 3))
    assert between([RATES, many], 4) == many


# ---------------------------------------------------------------- the file


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "chip.json"
    path.write_text(machine(**changes).model_dump_json(), encoding="utf-8")
    return path


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_machine(written(tmp_path)) == machine()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"version": 7}, r"chip.json has version 7 of calibrations, and this trimaran reads 1; run trimaran calibrate"),
        ({"spread": 0.31}, r"chip.json has a spread of 31%, above 20%: the machine did other things while"),
        ({"cores": "two"}, r"chip.json is no calibration: cores: Input should be a valid integer"),
        ({"host": "me"}, r"chip.json is no calibration: host: Extra inputs are not permitted"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, changes: dict[str, Any], error: str) -> None:
    path = tmp_path / "chip.json"
    path.write_text(json.dumps({**machine().model_dump(), **changes}), encoding="utf-8")
    with pytest.raises(ValueError, match=error):
        read_machine(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "not a number", '{"version": 1}'])
def test_broken_files_are_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "chip.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"chip.json is no calibration: .*; run trimaran calibrate$"):
        read_machine(path)


def test_drift_names_what_has_become_slower() -> None:
    slow = RATES.model_copy(update={"flops": RATES.flops / 2})
    found = drift(machine(), machine(rates=[slow], versions={"torch": "2.14.0"}))
    assert "torch was 2.13.0, and is 2.14.0" in found.notes
    assert any(note.startswith("products, FLOP/s (float32, 2 x 1): 2.00 times slower") for note in found.notes)
    assert not any("copies" in note for note in found.notes)
    with pytest.raises(ValueError, match="that calibration is of a CPU, A processor, and this machine measured a GPU"):
        drift(machine(), machine(kind="gpu"))


# ---------------------------------------------------------------- software


def table(folder: Path, rows: Sequence[int]) -> Path:
    """The head and some rows of the published table."""
    lines = (PUBLISHED / "runs.csv").read_text(encoding="utf-8").splitlines()
    path = folder / "runs.csv"
    path.write_text("\n".join([lines[0], *(lines[row] for row in rows)]) + "\n", encoding="utf-8")
    return path


def rows_of(text: str, most: int) -> list[int]:
    lines = (PUBLISHED / "runs.csv").read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines) if text in line][:most]


def test_a_software_is_fitted_with_errors_inside_and_left_out(tmp_path: Path) -> None:
    found = fit_software(table(tmp_path, rows_of("internevo", 12)))
    assert found
    for each in found:
        assert each.calibration.software == "internevo"
        assert each.left_out is not None
        assert 0 <= each.in_sample[0] <= each.left_out[0]
        assert set(each.as_json()) >= {"software", "chip", "runs", "constants", "in_sample", "left_out"}


def test_too_few_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runs.csv has 2 runs of internevo on A100-80GB in .* needs at least 3"):
        fit_software(table(tmp_path, rows_of("internevo", 2)))
    with pytest.raises(ValueError, match="has no run with a layout and seconds"):
        fit_software(table(tmp_path, []))


def test_a_corrupt_cell_is_named_by_line_and_column(tmp_path: Path) -> None:
    path = table(tmp_path, rows_of("internevo", 4))
    lines = path.read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("hidden")
    cells = lines[2].split(",")
    cells[column] = "wide"
    path.write_text("\n".join([*lines[:2], ",".join(cells), *lines[3:]]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"runs.csv: line 3, column hidden: 'wide' is no number"):
        fit_software(path)
