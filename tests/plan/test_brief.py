"""The plan that a run starts with: its three lines, what it can't say, and the cheapest change that fits."""

from pathlib import Path
from typing import Any

import pytest

from tests.plan.test_calibrate import machine, spec
from trimaran.launchers.data.run_plan import gpu_name, place_of, tell_plan, with_plan
from trimaran.launchers.report.page import write_report
from trimaran.runtime.plan.brief import (
    FILE,
    MEASURED,
    Brief,
    Place,
    brief_of,
    checkpoint_bytes,
    first_change_that_fits,
    lines_of,
    peak_of_run,
    read_brief,
    table_of,
    text_of,
    warning_of,
)
from trimaran.runtime.plan.calibrate.record import ChipConstants
from trimaran.runtime.plan.chips import chip_named, peak_of
from trimaran.runtime.plan.forecast import Setting, plan
from trimaran.runtime.plan.on_machine import check_kind, chip_of, plan_on
from trimaran.runtime.spec import RunSpec, parse_spec

UNKNOWN = Place("this machine", None, None, why_no_time="this CPU is not calibrated")


def changed(base: RunSpec, **fields: Any) -> RunSpec:
    content = base.model_dump(mode="json")
    for field, value in fields.items():
        section, name = field.split("__")
        content[section][name] = value
    return parse_spec(content)


def held(base: RunSpec) -> float:
    brief = brief_of(base, UNKNOWN)
    return sum(brief.memory[brief.fullest].values())


# ---------------------------------------------------------------- lines


def test_an_unknown_machine_s_plan_says_what_it_can_not_say() -> None:
    lines = lines_of(spec(), brief_of(spec(), UNKNOWN))
    assert len(lines) == 3
    assert lines[0].startswith("plan: a rank holds ")
    assert lines[0].endswith("; what Python and libraries take is not counted)")
    assert lines[1] == "plan: the time of a step is not planned: this CPU is not calibrated"
    assert lines[2].startswith("plan: a checkpoint has ")


def test_a_calibrated_machine_s_plan_has_time_and_band() -> None:
    place = place_of(spec({"dp": 2}), machine())
    assert place.rank_bytes == (8 << 30) / 2, "two ranks share its memory"
    lines = lines_of(spec({"dp": 2}), brief_of(spec({"dp": 2}), place))
    assert " of 4.00 GiB on A processor (parameters " in lines[0]
    assert "± 3%), " in lines[1]
    assert "tokens/s; 10 steps take" in lines[1]


def test_what_a_calibration_lacks_is_said_and_stops_no_run() -> None:
    place = place_of(spec({"tp": 2}), machine(exchanges=[]))
    assert place.seconds is None
    assert place.why_no_time.startswith("parallel.tp is 2, and the calibration of A processor has no exchanges")


def test_a_peak_that_is_not_this_machine_s_is_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = changed(spec(), precision__dtype="bfloat16")
    on_gpus, on_cpus = changed(own, launcher__device="cuda"), changed(own, launcher__device="cpu")

    def said(of: RunSpec, here: str | None, chip: str) -> str:
        monkeypatch.setattr("trimaran.launchers.data.run_plan.gpu_name", lambda: here)
        tell_plan(of, tmp_path, chip_named(chip))
        return "".join(line for line in capsys.readouterr().err.splitlines() if "--chip" in line)

    share = "--chip A100-40GB: MFU is a share of A100-40GB's 312 TFLOP/s bfloat16, and this machine's GPU is "
    assert said(on_gpus, "Some GPU", "A100-40GB") == f"{share}Some GPU, whose peak isn't known"
    assert said(on_gpus, "NVIDIA H200", "A100-40GB") == f"{share}NVIDIA H200"
    assert (
        said(on_gpus, "NVIDIA H200", "H200") == said(on_gpus, None, "H200") == said(on_cpus, "Some GPU", "H200") == ""
    )


def test_the_peak_of_a_chip_that_the_user_names_is_kept_for_the_mfu(tmp_path: Path) -> None:
    """A GPU that no datasheet is known of has the one that it was calibrated to."""
    fields = {"flops": 2e14, "memory_rate": 1e12, "link_rate": 1e10, "constants": {}, "measured": [], "residuals": {}}
    measured = ChipConstants(dtype="bfloat16", is_datasheet=False, **fields)
    own = changed(spec(), precision__dtype="bfloat16")
    assert peak_of_run(tmp_path, "NVIDIA H200", "bfloat16").words == "H200's 989.5 TFLOP/s bfloat16", "without a plan"
    for chip, words in (
        (chip_named("A100-40GB"), "A100-40GB's 312 TFLOP/s bfloat16"),
        (machine(kind="gpu", constants=[measured], name="Some GPU"), "Some GPU's 200 TFLOP/s bfloat16"),
        (None, peak_of("Some GPU", "bfloat16").words),
    ):
        tell_plan(own, tmp_path, chip)
        assert peak_of_run(tmp_path, "Some GPU", "bfloat16").words == words
    with pytest.raises(ValueError, match=r"T4 has no bfloat16; set precision.dtype to float16"):
        plan(own, Setting(chip_named("T4"), None, 1e10, 1, None, None, 1.0, 1.0, 1.0, 1.0))


def test_a_published_chip_has_its_memory_and_what_softwares_have_in_common() -> None:
    place = place_of(changed(spec(), precision__dtype="bfloat16"), chip_named("A100-40GB"))
    assert place.rank_bytes == 40 * 2**30
    assert place.error is not None
    assert "what published softwares have in common" in place.name


def test_adapters_and_second_models_are_not_planned() -> None:
    content = spec().model_dump(mode="json")
    content["finetune"] = {"method": "dpo", "data": "pairs.jsonl"}
    tuned = spec().model_copy(update={"finetune": type("Finetune", (), {"adapter": None, "method": "dpo"})()})
    lines = lines_of(tuned, brief_of(tuned, UNKNOWN))
    assert (
        lines[0] == "plan: memory is not planned: it knows neither adapters nor the models beside the one that learns"
    )


def test_the_driver_tells_the_gpu_s_name(tmp_path: Path) -> None:
    assert gpu_name(tmp_path) is None
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    assert gpu_name(tmp_path) == "NVIDIA H100 80GB HBM3"


# ---------------------------------------------------------------- what would fit


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"parallel__dp": 2, "zero__stage": 0}, {"zero.stage": 1}),
        ({"train__micro_batch_size": 8}, {"train.recompute": "selective"}),
        ({"train__micro_batch_size": 8, "train__recompute": "selective"}, {"train.micro_batch_size": 4}),
    ],
)
def test_the_first_change_that_fits_that_fits_is_named(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    base = changed(spec(), **fields)
    renamed = {field.replace(".", "__"): value for field, value in expected.items()}
    enough = Place("small", held(changed(base, **renamed)) + 1, None, why_no_time="none")
    assert enough.rank_bytes is not None
    assert enough.rank_bytes < held(base)
    assert first_change_that_fits(base, enough) == expected
    warning = warning_of(base, brief_of(base, enough), enough)
    ((field, value),) = expected.items()
    assert warning is not None
    assert warning.startswith("the plan doesn't fit: pipeline rank 0 lacks ")
    assert warning.endswith(f"; it would with {field}={value}")


def test_where_no_change_fits_that_is_said() -> None:
    none = Place("tiny", 1000.0, None, why_no_time="none")
    assert "no change of zero.stage, micro batch and recomputation would do: raise parallel.tp or pp" in str(
        warning_of(spec(), brief_of(spec(), none), none)
    )
    assert warning_of(spec(), brief_of(spec(), UNKNOWN), UNKNOWN) is None


# ---------------------------------------------------------------- beside what was measured


def test_planned_stands_beside_measured() -> None:
    brief = brief_of(spec({"pp": 2}), UNKNOWN)
    state = {name: brief.memory[brief.fullest][name] for name in ("parameters", "gradients", "optimizer")}
    measured = [{}, {}]
    measured[brief.fullest] = {**state, "peak": sum(state.values()) + 3 * 2**20}
    rows = {name: (planned, found) for name, planned, found in table_of(brief, measured)}
    for name in state:
        assert rows[name][0] == rows[name][1]
    assert rows["beside the state, at most"][1] == "3.00 MiB"
    assert text_of(table_of(brief)).splitlines()[0].split() == [
        "memory",
        "of",
        "the",
        "fullest",
        "rank",
        "planned",
        "measured",
    ]
    assert text_of([]) == ""


def test_a_rank_that_was_killed_is_told_with_its_planned_memory(tmp_path: Path) -> None:
    killed = "rank 1 was killed by SIGKILL (out of memory, perhaps)"
    assert with_plan(killed, tmp_path) == killed, "without a plan"
    (tmp_path / FILE).write_text(brief_of(spec(), Place("small", 2.0**20, None)).model_dump_json())
    assert with_plan(killed, tmp_path).startswith(f"{killed}; planned were ")
    assert with_plan(killed, tmp_path).endswith(" MiB of the 1.00 MiB that a rank may take")
    assert with_plan("the loss is not finite", tmp_path) == "the loss is not finite"


def test_the_report_has_a_section_of_both(tmp_path: Path) -> None:
    brief = brief_of(spec(), place_of(spec(), machine()))
    (tmp_path / FILE).write_text(brief.model_dump_json())
    (tmp_path / MEASURED).write_text(
        '{"peak_is": "allocated", "by_pipeline_rank": [{"parameters": 1048576, "peak": 5}]}'
    )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for words in ("Planned and measured", "Planned for A processor", "1.00 MiB", "products", "was allocated"):
        assert words in page
    (tmp_path / FILE).write_text(brief.model_copy(update={"memory": [{"x": 1.0}]}).model_dump_json())
    assert "unknown" in write_report(tmp_path).read_text(encoding="utf-8"), "a plan without the state"
    for broken in ('{"version": 1}', "[]", '{"memory": "<b>"}'):
        (tmp_path / FILE).write_text(broken)
        assert "plan.json" in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "plan"])
def test_a_plan_that_can_not_be_read_is_none(tmp_path: Path, text: str) -> None:
    assert read_brief(tmp_path) is None
    (tmp_path / FILE).write_text(text)
    assert read_brief(tmp_path) is None


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    brief = brief_of(spec(), UNKNOWN)
    (tmp_path / FILE).write_text(brief.model_dump_json())
    assert read_brief(tmp_path) == brief
    assert isinstance(brief, Brief)
    assert brief.checkpoint_bytes == checkpoint_bytes(spec()) == 12 * spec().transformer.num_parameters()


# ---------------------------------------------------------------- plans by a calibration


def test_a_plan_on_processors_has_no_energy_that_nobody_measured() -> None:
    found = plan_on(spec({"dp": 2}), machine())
    assert "MWh" not in found.figures
    assert found.calibration.software == "trimaran"
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert found.memory[0]["context"] == 200 << 20
    assert found.figures["MFU"] == pytest.approx(
        found.figures["tokens a second"] * spec().transformer.flops_per_token(128) / (2 * 9e10)
    )


def test_a_calibration_of_the_other_kind_is_refused() -> None:
    on_gpus, on_cpus = (changed(spec(), launcher__device=kind) for kind in ("cuda", "cpu"))
    with pytest.raises(
        ValueError, match=r"the calibration is of a CPU, A processor, and launcher.device is cuda; give"
    ):
        check_kind(on_gpus, machine())
    with pytest.raises(ValueError, match=r"the calibration is of a GPU, A processor, and launcher.device is cpu; give"):
        check_kind(on_cpus, machine(kind="gpu"))
    check_kind(on_cpus, machine())


def test_a_gpu_that_lacks_the_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision.dtype is float32, and the calibration of A processor has "):
        chip_of(machine(kind="gpu"), spec())
