"""Rows of a run: written once, read back whole after a crash, shown on a screen; hardware numbers behind the MFU."""

import io
import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from trimaran.runtime.train.hardware import describe_machine, mfu
from trimaran.runtime.train.metrics import MetricsLogger, perplexity_of, read_metrics


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def log_step(logger: MetricsLogger, step: int, **changed: Any) -> None:
    values: dict[str, Any] = {"loss": 5.0 - step / 10, "lr": 3e-4, "grad_norm": 1.25, "tokens_seen": step * 1024}
    logger.log(step=step, **{**values, "tokens_per_second": 12345.6, "step_time_ms": 82.9, **changed})


def open_logger(folder: Path, stream: io.StringIO | None = None, **options: Any) -> MetricsLogger:
    return MetricsLogger(
        folder, **{"num_steps": 10, "tensorboard": False, "stream": stream or io.StringIO(), **options}
    )


def steps_in(folder: Path) -> list[int | float | None]:
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


def test_a_row_has_the_fields_of_the_contract_and_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    loss = 0.1 + 0.2
    with open_logger(tmp_path) as logger:
        log_step(logger, 1, loss=loss, mfu=0.41)
        log_step(logger, 2, grad_norm=None)
        logger.log_evaluation(step=2, held_out_loss=2.0)
    first, second, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    assert list(first) == ["step", "loss", "lr", "grad_norm", "tokens_seen", "tokens_per_second", "step_time_ms", "mfu"]
    assert first["loss"] == loss
    assert first["mfu"] == 0.41
    assert second["mfu"] is None
    assert second["grad_norm"] is None
    assert evaluation == {"step": 2, "held_out_loss": 2.0, "held_out_perplexity": math.exp(2.0)}


def test_every_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        for step in (1, 2, 3):
            log_step(logger, step)
            assert steps_in(tmp_path) == list(range(1, step + 1))


def test_not_finite_numbers_stay_valid_json_and_come_back(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        log_step(logger, 1, loss=math.nan, grad_norm=math.inf)
        log_step(logger, 2, loss=-math.inf)
        logger.log_evaluation(step=2, held_out_loss=1e4)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(first["loss"] or 0)
    assert first["grad_norm"] == math.inf
    assert second["loss"] == -math.inf
    assert evaluation["held_out_perplexity"] == math.inf


def test_resuming_drops_the_rows_that_come_again(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        logger.log_evaluation(step=0, held_out_loss=6.0)
        for step in range(1, 8):
            log_step(logger, step)
            logger.log_evaluation(step=step, held_out_loss=4.0)
    with open_logger(tmp_path, resume_step=5) as logger:
        assert steps_in(tmp_path) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        log_step(logger, 6)
        logger.log_evaluation(step=6, held_out_loss=4.0)
    assert steps_in(tmp_path) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_a_fresh_start_drops_every_row_of_the_run_before(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        logger.log_evaluation(step=0, held_out_loss=6.0)
        log_step(logger, 1)
    with open_logger(tmp_path) as logger:
        logger.log_evaluation(step=0, held_out_loss=6.0)
    assert steps_in(tmp_path) == [0]


def test_a_half_written_last_line_is_dropped_on_reading_and_on_reopening(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        for step in (1, 2, 3):
            log_step(logger, step)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) - 2, whole.rindex(b"\n", 0, -1), -7):
        path.write_bytes(whole[:cut])
        assert steps_in(tmp_path) == [1, 2]
        with open_logger(tmp_path, resume_step=3) as logger:
            log_step(logger, 3)
        assert path.read_bytes() == whole


def test_a_last_row_that_only_lacks_its_newline_is_kept_apart_from_the_next(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        log_step(logger, 1)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with open_logger(tmp_path, resume_step=1) as logger:
        log_step(logger, 2)
    assert steps_in(tmp_path) == [1, 2]


def test_a_row_with_an_earlier_name_of_a_field_is_read_under_todays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5, "expert_balance": 1.25}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5, "load_balancing_loss": 1.25}]


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1.0}', '{"step": 1, "loss": "high"}', '{"step": "NaN"}'])
def test_a_broken_line_before_the_last_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 1.0}}\n{line}\n{{"step": 2, "loss": 1.0}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not a metrics row"):
        read_metrics(path)


def test_a_step_cannot_be_logged_twice(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        log_step(logger, 4)
        logger.log_evaluation(step=4, held_out_loss=1.0)
        with pytest.raises(ValueError, match=r"step \(4\) was logged before"):
            log_step(logger, 4)
        with pytest.raises(ValueError, match=r"step \(4\) was evaluated before"):
            logger.log_evaluation(step=4, held_out_loss=1.0)
    with (
        open_logger(tmp_path, resume_step=4) as logger,
        pytest.raises(ValueError, match=r"step \(3\) was logged before"),
    ):
        log_step(logger, 3)


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_reads_the_scalars_and_forgets_the_steps_a_resume_wrote_again(tmp_path: Path) -> None:
    with open_logger(tmp_path, tensorboard=True) as logger:
        for step in (1, 2, 3, 4):
            log_step(logger, step, loss=float(step), grad_norm=None)
        logger.log_evaluation(step=4, held_out_loss=0.0)
    with open_logger(tmp_path, tensorboard=True, resume_step=2) as logger:
        log_step(logger, 3, loss=30.0)
    found = tensorboard_scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert found["train/grad_norm"] == [(3, 1.25)]
    assert found["train/tokens_per_second"][0][1] == pytest.approx(12345.6)
    assert "train/mfu" not in found


def test_evaluations_reach_tensorboard_under_their_own_names(tmp_path: Path) -> None:
    with open_logger(tmp_path, tensorboard=True) as logger:
        logger.log_evaluation(step=3, held_out_loss=0.0)
        logger.log_scores(step=3, scores={"arc_easy/acc": 0.5, "arc_easy/acc_stderr": 0.25})
    assert tensorboard_scalars(tmp_path / "tensorboard") == {
        "held_out/loss": [(3, 0.0)],
        "held_out/perplexity": [(3, 1.0)],
        "evaluation/arc_easy/acc": [(3, 0.5)],
        "evaluation/arc_easy/acc_stderr": [(3, 0.25)],
    }
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {"step": 3, "arc_easy/acc": 0.5, "arc_easy/acc_stderr": 0.25}


def test_without_tensorboard_no_folder_is_made(tmp_path: Path) -> None:
    with open_logger(tmp_path) as logger:
        log_step(logger, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_pipe_gets_a_plain_line_for_the_first_step_each_interval_and_the_last(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_logger(tmp_path, stream, interval=4, peak="H200's 989.5 TFLOP/s bfloat16") as logger:
        for step in range(1, 11):
            log_step(logger, step, mfu=0.412 if step == 8 else None)
        logger.log_evaluation(step=10, held_out_loss=1.0)
    lines = stream.getvalue().splitlines()
    assert lines.pop(0).startswith("step 1/10")
    assert lines[0] == "step 4/10  loss 4.6000  lr 3.00e-04  grad norm 1.250  12,346 tokens/s  ETA 0:00:00"
    assert "  MFU 41.2% of H200's 989.5 TFLOP/s bfloat16  " in lines[1]
    assert lines[2].startswith("step 10/10")
    assert lines[3] == "step 10/10  held-out loss 1.0000  perplexity 2.72"
    assert len(lines) == 4


def test_a_long_interval_still_shows_the_first_step_and_the_one_that_ends_ten_seconds_later(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_logger(tmp_path, stream, interval=1000) as logger:
        for step in range(1, 10):
            log_step(logger, step, step_time_ms=60_000.0 if step == 1 else 3_000.0)
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["step 1/10", "step 5/10"]


def test_the_largest_peak_of_memory_is_on_the_line(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_logger(tmp_path, stream) as logger:
        log_step(logger, 1, more={"peak_memory_bytes": 3 << 29})
        log_step(logger, 2, more={"peak_memory_bytes": 3 << 30, "peak_memory_rank": 5})
    first, second = stream.getvalue().splitlines()
    assert first.endswith("  ETA 0:00:01  memory 1.50 GiB")
    assert second.endswith("  ETA 0:00:01  memory 3.00 GiB (rank 5)")


def test_the_eta_is_the_median_step_time_times_the_steps_left(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_logger(tmp_path, stream, num_steps=3 + 26 * 3600) as logger:
        for step, time_ms in enumerate((60_000.0, 1000.0, 1000.0), start=1):
            log_step(logger, step, step_time_ms=time_ms)
    assert stream.getvalue().splitlines()[-1].endswith("ETA 1d 2:00:00")


def test_a_terminal_gets_a_live_line_and_messages_above_it(tmp_path: Path) -> None:
    stream = Terminal()
    with open_logger(tmp_path, stream) as logger:
        log_step(logger, 1)
        logger.say("checkpoint [saved]")
        log_step(logger, 2)
    shown = stream.getvalue()
    assert "\x1b[?25l" in shown, "the cursor is hidden while the line is live"
    assert "\x1b[?25h" in shown, "and shown again at the end"
    assert "checkpoint [saved]" in shown, "brackets in a message are text, not markup"
    assert "step 2/10  loss 4.8000" in shown, "the last state is drawn before the line is left"


def test_importing_the_module_brings_in_neither_torch_nor_rich_nor_tensorboard() -> None:
    script = (
        "import sys, trimaran.runtime.train.metrics, trimaran.runtime.train.hardware; "
        "print(sorted({'torch', 'rich', 'tensorboard', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_writing_tensorboard_scalars_does_not_import_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from trimaran.runtime.train.metrics import MetricsLogger\n"
        "with MetricsLogger(Path(sys.argv[1]), num_steps=1) as logger:\n"
        "    logger.log_evaluation(step=0, held_out_loss=1.0)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_perplexity_is_exp_and_does_not_overflow() -> None:
    assert perplexity_of(0.0) == 1.0
    assert perplexity_of(800.0) == math.inf
    assert math.isnan(perplexity_of(math.nan))


def test_mfu_is_useful_flops_over_the_peak_of_all_devices() -> None:
    assert mfu(tokens_per_second=1e5, flops_per_token=4e10, peak=1e15, world_size=8) == pytest.approx(0.5)
    assert mfu(tokens_per_second=1e5, flops_per_token=4e10, peak=None, world_size=8) is None


def test_the_machine_is_described_without_its_name_its_user_or_a_path() -> None:
    import getpass
    import platform

    found = describe_machine(["NVIDIA H200", "NVIDIA H200"])
    assert found["accelerators"] == "2 x NVIDIA H200"
    assert describe_machine()["accelerators"] == "none"
    assert isinstance(found["cpu_cores"], int)
    assert found["cpu_cores"] >= 1
    assert found["python"] == platform.python_version()
    values = [str(value) for value in found.values()]
    assert not any(value in (platform.node(), getpass.getuser()) or value.startswith("/") for value in values)
