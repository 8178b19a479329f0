"""The check that all ranks have the same spec, code, packages and data. Imports no torch."""

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trimaran.runtime.data.tokens.shards import mapped_digest
from trimaran.runtime.files import read_bytes
from trimaran.runtime.pipeline.csv_text import write_csv
from trimaran.runtime.spec import RunSpec, dump_spec
from trimaran.runtime.train.pipeline import schedule_of

_PACKAGE = Path(__file__).parents[2]
_ROOMS = ("kernels", "models", "runtime", "launchers")
_VERSIONED = ("torch", "triton", "pydantic", "numpy", "safetensors")


class InconsistentRanksError(ValueError):
    """Ranks differ in something that must be the same; the message lists the differences by rank."""


def facts_of_rank(spec: RunSpec, data: Path | None, where: str) -> str:
    """Return, as JSON, what must be the same on every rank, and `where` this rank is.

    Args:
        data: the folder of the prepared data, read on this node; None for a task without data.
    """
    facts = {"where": where, "spec": _digest(dump_spec(spec).encode()), **versions_here()}
    if data is not None and spec.parallel.schedule_file is not None:
        facts["schedule"] = _digest(write_csv(schedule_of(spec)).encode())
    if data is not None:
        try:
            facts["data"] = mapped_digest(data)[:12]
        except (OSError, ValueError, KeyError, TypeError) as error:
            facts["data"] = f"unreadable ({getattr(error, 'strerror', None) or error}: {data})"
    return json.dumps(facts)


def versions_here() -> dict[str, str]:
    """Return the versions of this node's software that must be the same on every node."""
    return {"code": _digest_of_code(), "python": platform.python_version()} | {
        name: _version(name) for name in _VERSIONED
    }


def check_same_everywhere(texts: Sequence[str]) -> None:
    """Compare the facts of all ranks, given in rank order.

    Raises:
        InconsistentRanksError: they differ; the message has, for each fact, the ranks with each value.
    """
    facts = [json.loads(text) for text in texts]
    lines = []
    for name in facts[0]:
        values: dict[str, list[int]] = {}
        for rank, each in enumerate(facts):
            values.setdefault(each.get(name, "missing"), []).append(rank)
        if name != "where" and len(values) > 1:
            shares = [f"{value} on {_say_ranks(ranks)} ({facts[ranks[0]]['where']})" for value, ranks in values.items()]
            lines.append(f"{name}: {', '.join(shares)}")
    if lines:
        raise InconsistentRanksError(
            "the ranks must all have the same run and code, and differ in\n  " + "\n  ".join(lines)
        )


def _say_ranks(ranks: Sequence[int]) -> str:
    """Return ranks as text, neighbours as a range."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _digest_of_code() -> str:
    """Return a digest of the package's source files and their names."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        for file in sorted((_PACKAGE / room).rglob("*.py")):
            digest.update(str(file.relative_to(_PACKAGE)).encode() + b"\0" + read_bytes(file) + b"\0")
    return digest.hexdigest()[:12]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
