"""What a session of tests starts and compiles, counted over all its processes, and the bounds of the counts.

Every process of the session appends lines to files of one folder, which an environment variable names; the session's
end adds them up. Without that variable, as when a file of tests is run by hand, nothing is written.
"""

import json
import os
from collections import Counter
from pathlib import Path

FOLDER = "TRIMARAN_TEST_COUNTS"
"""The environment variable that names the folder."""
BOUNDS = {
    "cold start": 15,
    "kernel compiled": 123,
    "parity step": 860,
    "slurm process": 31,
}
"""The most of each kind that the whole suite may count."""


def record(kind: str, detail: str, count: int = 1) -> None:
    """Count something of a kind; `detail` says which, for the reader of a count that is too high."""
    folder = os.environ.get(FOLDER)
    if folder:
        line = json.dumps({"kind": kind, "detail": detail, "count": count})
        with (Path(folder) / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def recorded(folder: Path) -> dict[str, Counter[str]]:
    """Return what was counted: kind -> detail -> number."""
    found: dict[str, Counter[str]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            found.setdefault(entry["kind"], Counter())[entry["detail"]] += entry["count"]
    return found


def over_bounds(found: dict[str, Counter[str]]) -> list[str]:
    """Return a sentence for each kind that was counted more often than its bound."""
    totals = {kind: details.total() for kind, details in found.items()}
    return [
        f"{totals[kind]} of {kind}, over {BOUNDS[kind]} (tests/counting.py): "
        + ", ".join(f"{detail} {count}" for detail, count in found[kind].most_common(8))
        for kind in BOUNDS
        if totals.get(kind, 0) > BOUNDS[kind]
    ]
