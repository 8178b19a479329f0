"""Two calibrations of one machine beside each other: what has become slower or faster. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from trimaran.runtime.plan.calibrate.record import Machine

NOTABLE = 0.1
"""A change beyond it is told in a sentence."""


@dataclass(frozen=True)
class Row:
    """A constant of both.

    Attributes:
        is_rate: whether more is faster.
    """

    what: str
    before: float
    now: float
    is_rate: bool

    @property
    def ratio(self) -> float:
        """Now over before."""
        return self.now / self.before


@dataclass(frozen=True)
class Drift:
    """What has changed, and what to know of it."""

    rows: list[Row]
    notes: list[str]


def drift(before: Machine, now: Machine) -> Drift:
    """Return the constants that both have.

    Raises:
        ValueError: they are of a CPU and of a GPU.
    """
    if before.kind != now.kind:
        raise ValueError(
            f"--compare: that calibration is of a {before.kind.upper()}, {before.name}, and this machine measured a "
            f"{now.kind.upper()}; give one of the same machine"
        )
    notes = []
    if before.name != now.name:
        notes.append(f"that calibration is of another machine: {before.name}, and this is {now.name}")
    notes += [
        f"{package} was {before.versions.get(package)}, and is {number}"
        for package, number in now.versions.items()
        if before.versions.get(package) != number
    ]
    first, second = dict(_values(before)), dict(_values(now))
    rows = [Row(what, value, second[what][0], is_rate) for what, (value, is_rate) in first.items() if what in second]
    for row in rows:
        slower = 1 / row.ratio if row.is_rate else row.ratio
        if slower > 1 + NOTABLE or slower < 1 / (1 + NOTABLE):
            word = "slower" if slower > 1 else "faster"
            notes.append(f"{row.what}: {max(slower, 1 / slower):.2f} times {word}")
    return Drift(rows, notes)


def _values(machine: Machine) -> Iterator[tuple[str, tuple[float, bool]]]:
    """Yield the constants by name: a value, and whether more is faster."""
    for rates in machine.rates:
        where = f"{rates.dtype}, {rates.ranks} x {rates.threads}"
        yield f"products, FLOP/s ({where})", (rates.flops * rates.gemm, True)
        yield f"attention, FLOP/s ({where})", (rates.flops * rates.attention, True)
        yield f"copies, bytes/s ({where})", (rates.memory_rate * rates.hbm, True)
        yield f"layer's host time, s ({where})", (rates.host, False)
    for chip in machine.constants:
        yield f"products, FLOP/s ({chip.dtype})", (chip.flops * chip.constants["gemm"], True)
        yield f"attention, FLOP/s ({chip.dtype})", (chip.flops * chip.constants["attention"], True)
        yield f"memory, bytes/s ({chip.dtype})", (chip.memory_rate * chip.constants["hbm"], True)
        yield f"layer's host time, s ({chip.dtype})", (chip.constants["host"], False)
    for each in machine.exchanges:
        what = f"{each.operation} over {each.ranks} {each.axis} ranks" + (
            f" of {each.nodes} nodes" if each.nodes > 1 else ""
        )
        yield f"{what}, latency, s", (each.latency, False)
        yield f"{what}, bytes/s", (each.rate, True)
