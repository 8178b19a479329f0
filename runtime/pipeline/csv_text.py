"""Schedules as comma-separated text, one line a rank, as torch.distributed.pipelining writes and reads them."""

from trimaran.runtime.pipeline.action import parse_entry
from trimaran.runtime.pipeline.passes import add_communication, validate
from trimaran.runtime.pipeline.schedule import Schedule, placement_of_lists


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
    lists = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        entries = []
        for cell in line.split(","):
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
    if () in lists:
        raise ValueError(f"{name}, line {lists.index(()) + 1} is empty; write a line with actions for each rank")
    try:
        schedule = Schedule(placement_of_lists(lists), tuple(lists))
        validate(add_communication(schedule))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return schedule
