"""Learning rate schedules: pure functions of the step, so that a resumed run needs no scheduler state.

Every schedule is ``base_lr * factor``. The first ``warmup_steps`` steps raise the factor linearly, ``(step + 1) /
warmup_steps`` (Goyal et al., "Accurate, Large Minibatch SGD", section 2.2, 2017), so that step 0 already learns and the
last warmup step trains at ``base_lr``. After that one decay function takes over. With ``t`` = steps since the end of
the warmup, ``T`` = decay steps after the warmup and ``m`` = min_lr_ratio, every factor stays in [m, 1].
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Literal, Protocol


class LrScheduleSection(Protocol):
    """The fields of the ``lr_schedule`` section of the run spec that a schedule reads."""

    @property
    def name(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def min_lr_ratio(self) -> float: ...
    @property
    def decay_steps(self) -> int | None: ...
    @property
    def step_interval(self) -> int | None: ...
    @property
    def step_gamma(self) -> float: ...
    @property
    def decay_rate(self) -> float | None: ...
    @property
    def wsd_decay_fraction(self) -> float: ...


def constant(t: int, decay_steps: int, section: LrScheduleSection) -> float:
    """Return 1: the rate stays at ``base_lr``, min_lr_ratio is not read."""
    return 1.0


def cosine(t: int, decay_steps: int, section: LrScheduleSection) -> float:
    """Return ``m + (1 - m) * (1 + cos(pi * t / T)) / 2``.

    Loshchilov and Hutter, "SGDR", equation 5, 2017, with one cycle and no restart.
    """
    return _between(section.min_lr_ratio, 0.5 * (1.0 + math.cos(math.pi * _progress(t, decay_steps))))


def linear(t: int, decay_steps: int, section: LrScheduleSection) -> float:
    """Return ``m + (1 - m) * (1 - t / T)``: linear from 1 to m (as in Devlin et al., "BERT", appendix A.2, 2019)."""
    return _between(section.min_lr_ratio, 1.0 - _progress(t, decay_steps))


def step_decay(t: int, decay_steps: int, section: LrScheduleSection) -> float:
    """Return ``max(m, step_gamma ** (t // step_interval))``: a staircase.

    He et al., "Deep Residual Learning", section 3.4, 2016.
    """
    assert section.step_interval is not None, "lr_at has checked it"
    return max(section.min_lr_ratio, section.step_gamma ** (t // section.step_interval))


def exponential(t: int, decay_steps: int, section: LrScheduleSection) -> float:
    """Return ``max(m, decay_rate ** t)``: the rate is multiplied by ``decay_rate`` at every step."""
    assert section.decay_rate is not None, "lr_at has checked it"
    return max(section.min_lr_ratio, section.decay_rate**t)


def warmup_stable_decay(t: int, decay_steps: int, section: LrScheduleSection) -> float:
    """Return 1 in the stable phase, then a straight line to m over the last ``wsd_decay_fraction`` of all steps.

    The fraction includes the warmup. Hu et al., "MiniCPM", section 4.2, equation 1, 2024: WSD = warmup, stable at
    ``base_lr``, decay by any decreasing f with 0 < f <= 1. f is linear here (Hägele et al., "Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations", section 3, 2024).
    """
    decay = min(decay_steps, wsd_decay_steps(section.wsd_decay_fraction, section.warmup_steps + decay_steps))
    return _between(section.min_lr_ratio, 1.0 - _progress(t - (decay_steps - decay), decay))


def wsd_decay_steps(fraction: float, num_steps: int) -> int:
    """Return the steps of the final decay of wsd, of `num_steps` with the warmup."""
    return round(fraction * num_steps)


Decay = Callable[[int, int, LrScheduleSection], float]
"""(steps since the warmup, decay steps after the warmup, section) -> factor in [min_lr_ratio, 1]."""

LrScheduleName = Literal["constant", "cosine", "linear", "step", "exponential", "wsd"]
DECAYS: Mapping[str, Decay] = MappingProxyType(
    {
        "constant": constant,
        "cosine": cosine,
        "linear": linear,
        "step": step_decay,
        "exponential": exponential,
        "wsd": warmup_stable_decay,
    }
)

ENDING: Final = ("cosine", "linear", "wsd")
"""The schedules that end at decay_steps; the others do not read it."""
REQUIRED_FIELDS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "step": ("step_interval", "the steps between two drops"),
        "exponential": ("decay_rate", "the factor of every step"),
    }
)
"""The field, null by default, that a schedule can't do without, and what it is."""


def lr_at(step: int, *, base_lr: float, section: LrScheduleSection, num_steps: int) -> float:
    """Return the learning rate of optimizer step ``step``.

    Args:
        step: optimizer steps finished before this one, so the first step is 0.
        base_lr: the rate at the end of the warmup (``optimizer.lr``).
        section: the ``lr_schedule`` section of the run spec. Its ``decay_steps`` counts from step 0, warmup included;
            from that step on the rate stays at its end value.
        num_steps: length of the run in steps, the end of the decay when ``section.decay_steps`` is None.

    Raises:
        ValueError: ``step`` is negative, there is no schedule of that name, or a field it needs is None.
    """
    if step < 0:
        raise ValueError(f"step ({step}) must be 0 or more; the first optimizer step is step 0")
    if section.name not in DECAYS:
        raise ValueError(f"lr_schedule.name ({section.name!r}) is not known; set it to one of {', '.join(DECAYS)}")
    required, meaning = REQUIRED_FIELDS.get(section.name, (None, ""))
    if required and getattr(section, required) is None:
        raise ValueError(f"lr_schedule.name {section.name} needs lr_schedule.{required} (null); set it to {meaning}")
    if step < section.warmup_steps:
        return base_lr * (step + 1) / section.warmup_steps
    end = num_steps if section.decay_steps is None else section.decay_steps
    return base_lr * DECAYS[section.name](step - section.warmup_steps, max(0, end - section.warmup_steps), section)


def _progress(t: int, length: int) -> float:
    """Return t / length clipped to [0, 1]; 1 for a decay of length 0."""
    if t <= 0 < length:
        return 0.0
    return min(1.0, t / length) if length > 0 else float(t >= 0)


def _between(low: float, share: float) -> float:
    """Interpolate linearly from ``low`` (share 0) to 1 (share 1)."""
    return low + (1.0 - low) * share
