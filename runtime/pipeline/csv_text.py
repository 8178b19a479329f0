"""Schedules as comma-separated text, one line a rank, as torch.distributed.pipelining writes and reads them."""

import csv
import io

from trimaran.runtime.pipeline.action import parse_entry
from trimaran.runtime.pipeline.passes import add_communication, validate
from trimaran.runtime.pipeline.schedule import Schedule, placement_of_lists

_MOST_CHARACTERS = 64 << 20


def write_csv(schedule: Schedule) -> str:
    """Return the compute entries of each rank on a line; `read_csv` is its inverse."""
    lines = [",".join(str(entry) for entry in entries if entry.is_compute) for entries in schedule.actions]
    return "".join(f"{line}\n" for line in lines)


def read_csv(text: str, name: str) -> Schedule:
    """Return the schedule of a text, without communication; each stage lives on the rank whose line has it.

    Empty cells are waits, and mean nothing here.

    Args:
        name: of the file, for errors.

    Raises:
        ValueError: a cell is no compute action (names line and cell), or (ScheduleError) the lists can't run.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"{name} has {len(text):,} characters; a schedule has at most {_MOST_CHARACTERS:,}")
    lists = []
    for number, cells in enumerate(csv.reader(io.StringIO(text)), start=1):
        entries = []
        for cell in cells:
            if not cell.strip():
                continue
            try:
                entry = parse_entry(cell)
            except ValueError as error:
                raise ValueError(f"{name}, line {number}: {error}") from error
            if not entry.is_compute:
                raise ValueError(f"{name}, line {number}: {entry} is a transfer; list F, B, I, W and overlaps alone")
            entries.append(entry)
        lists.append(tuple(entries))
    while lists and not lists[-1]:
        lists.pop()
    try:
        schedule = Schedule(placement_of_lists(lists), tuple(lists))
        validate(add_communication(schedule))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return schedule
