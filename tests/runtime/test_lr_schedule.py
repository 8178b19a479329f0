"""The schedules against torch.optim.lr_scheduler where it has the same one, and against values worked out by hand."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from trimaran.runtime.spec.sections import LrScheduleSection
from trimaran.runtime.train.lr_schedule import DECAYS, lr_at


@dataclass(frozen=True)
class Section:
    name: str = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    decay_steps: int | None = None
    step_interval: int | None = 10
    step_gamma: float = 0.5
    decay_rate: float | None = 0.9
    wsd_decay_fraction: float = 0.2


def rates(section: Section, num_steps: int, count: int, base_lr: float = 0.1) -> list[float]:
    return [lr_at(step, base_lr=base_lr, section=section, num_steps=num_steps) for step in range(count)]


def torch_rates(make: object, count: int, base_lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base_lr)
    scheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_equals_torch_cosine_annealing() -> None:
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.01), 41)
    assert rates(Section("cosine", min_lr_ratio=0.1), 40, 41) == pytest.approx(expected, rel=1e-12)


def test_linear_equals_torch_linear_lr() -> None:
    expected = torch_rates(
        lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=30), 40
    )
    assert rates(Section("linear", min_lr_ratio=0.25), 30, 40) == pytest.approx(expected, rel=1e-12)


def test_step_equals_torch_step_lr() -> None:
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=7, gamma=0.3), 40)
    assert rates(Section("step", step_interval=7, step_gamma=0.3), 40, 40) == pytest.approx(expected, rel=1e-12)


def test_exponential_equals_torch_exponential_lr() -> None:
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.97), 50)
    assert rates(Section("exponential", decay_rate=0.97), 50, 50) == pytest.approx(expected, rel=1e-12)


def test_warmup_equals_torch_linear_lr_from_one_nth() -> None:
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=1 / 8, total_iters=7), 20)
    assert rates(Section("constant", warmup_steps=8), 20, 20) == pytest.approx(expected, rel=1e-12)


def test_warmup_then_cosine_equals_torch_sequential_lr() -> None:
    def make(o: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(
            o, lambda s: (s + 1) / 5 if s < 5 else 0.1 + 0.9 * (1 + math.cos(math.pi * (s - 5) / 20)) / 2
        )

    assert rates(Section("cosine", warmup_steps=5, min_lr_ratio=0.1), 25, 25) == pytest.approx(
        torch_rates(make, 25), rel=1e-12
    )


def test_wsd_is_stable_then_falls_on_a_straight_line_by_hand() -> None:
    found = rates(Section("wsd", warmup_steps=2, min_lr_ratio=0.1, wsd_decay_fraction=1 / 3), 12, 14, base_lr=1.0)
    # the last four of the twelve steps decay: 1, 0.775, 0.55, 0.325, then 0.1
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1, 0.1])


def test_wsd_without_a_decay_phase_stays_at_the_base_rate_until_the_end() -> None:
    assert rates(Section("wsd", min_lr_ratio=0.1, wsd_decay_fraction=0.0), 5, 5, base_lr=1.0) == [1.0] * 5


def test_a_wsd_decay_of_all_steps_begins_when_the_warmup_ends() -> None:
    found = rates(Section("wsd", warmup_steps=2, wsd_decay_fraction=1.0), 6, 7, base_lr=1.0)
    assert found == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0])


def test_decay_steps_ends_the_decay_before_the_run_does() -> None:
    found = rates(Section("linear", decay_steps=4, min_lr_ratio=0.5), 100, 8, base_lr=1.0)
    assert found == pytest.approx([1, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("name", ["step", "exponential"])
def test_geometric_decays_stop_at_the_minimal_ratio(name: str) -> None:
    assert lr_at(10_000, base_lr=2.0, section=Section(name, min_lr_ratio=0.1), num_steps=20_000) == pytest.approx(0.2)


@pytest.mark.parametrize("name", sorted(DECAYS))
def test_every_schedule_warms_up_to_the_base_rate_and_never_leaves_its_bounds(name: str) -> None:
    section = Section(name, warmup_steps=10, min_lr_ratio=0.1)
    found = rates(section, 100, 130, base_lr=1.0)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert all(0.1 - 1e-12 <= rate <= 1.0 for rate in found[10:])
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(found[10:]))


@pytest.mark.parametrize("name", sorted(DECAYS))
def test_a_warmup_longer_than_the_run_still_gives_rates(name: str) -> None:
    found = rates(Section(name, warmup_steps=50, min_lr_ratio=0.1), 20, 60, base_lr=1.0)
    assert found[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert all(0.0 < rate <= 1.0 for rate in found)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cosin'.*constant, cosine, linear, step, exponential, wsd"):
        lr_at(0, base_lr=1.0, section=replace(Section(), name="cosin"), num_steps=1)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step \(-1\)"):
        lr_at(-1, base_lr=1.0, section=Section(), num_steps=1)


@pytest.mark.parametrize(("name", "missing"), [("step", "step_interval"), ("exponential", "decay_rate")])
def test_a_schedule_without_the_field_it_needs_names_it(name: str, missing: str) -> None:
    section = Section(name, step_interval=None, decay_rate=None)
    with pytest.raises(ValueError, match=rf"lr_schedule\.name {name} needs lr_schedule\.{missing}"):
        lr_at(3, base_lr=1.0, section=section, num_steps=10)


def test_the_section_of_the_run_spec_can_be_passed_as_it_is() -> None:
    section = LrScheduleSection(name="linear", min_lr_ratio=0.0)
    assert lr_at(5, base_lr=1.0, section=section, num_steps=10) == pytest.approx(0.5)
