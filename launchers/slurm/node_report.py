"""The result of a preflight: facts about every node, and the nodes that should not be used. Imports no torch."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trimaran.runtime.files import read_json, write_text

_FILE = "preflight.json"
_FEWEST_TO_COMPARE = 3
_SLOWEST = 0.5  # of the median speed: ranks wait for each other, so one such node halves the speed of all
_CLEARLY_SLOW = 0.2  # of the other node's speed: if two nodes differ less, either may be the unusual one
_CLOCK_S = 5.0  # a larger difference makes time stamps of files and logs misleading, and certificates fail


@dataclass(frozen=True)
class NodeFacts:
    """Facts that a preflight task found on its node.

    Args:
        versions: of Python and the packages.
        gflops: of a float32 matrix product, on the slowest GPU where there are GPUs.
        free_gib: disk of the run folder.
        clock_s: seconds that this node's clock is ahead of the first node's.
        problem: what could not be done at all, "" for nothing.
        of_gpus: GFLOP/s of each GPU that the run may use.
        gpu_faults: why its GPUs should not be used, "" for nothing.
    """

    node: str
    versions: Mapping[str, str]
    gflops: float
    free_gib: float
    clock_s: float
    problem: str = ""
    of_gpus: Sequence[float] = ()
    gpu_faults: str = ""

    @staticmethod
    def parse(text: str) -> "NodeFacts":
        """Read what `asdict` and JSON made."""
        return NodeFacts(**json.loads(text))


@dataclass(frozen=True)
class NodeReport:
    """The nodes that a job can't use; kept in the run folder over the job's restarts.

    Args:
        refused: node -> the reason, of the last time that nodes were refused or lost.
        excluded: all nodes refused or lost so far.
        attempts: how often nodes were refused or lost since the run's last new checkpoint.
        step: of the run's last checkpoint at that time.
    """

    refused: Mapping[str, str] = field(default_factory=dict)
    excluded: Sequence[str] = ()
    attempts: int = 0
    step: int = 0

    @staticmethod
    def read(folder: Path) -> "NodeReport":
        """Read the report of a run folder; an empty one where there is none."""
        try:
            return NodeReport(**read_json(folder / "logs" / _FILE))
        except FileNotFoundError:
            return NodeReport()

    @staticmethod
    def forget(folder: Path) -> None:
        """Delete the report, so that a new job begins with all nodes."""
        (folder / "logs" / _FILE).unlink(missing_ok=True)

    def after(self, refused: Mapping[str, str], step: int) -> "NodeReport":
        """Return the report after more nodes were refused, with the step of the run's last checkpoint."""
        before = self.attempts if step == self.step else 0
        return NodeReport(dict(refused), sorted({*self.excluded, *refused}), before + 1, step)

    def write(self, folder: Path) -> None:
        """Write the report into a run folder."""
        file = folder / "logs" / _FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(asdict(self), indent=1))


def refused_nodes(facts: Sequence[NodeFacts], min_free_gib: float) -> dict[str, str]:
    """Return the nodes that should not be used, each with the reason.

    Args:
        facts: of every node, the first node first.
    """
    reasons: dict[str, list[str]] = {}
    for each in facts:
        found = [fault for fault in (each.problem, each.gpu_faults) if fault]
        if not each.problem and each.free_gib < min_free_gib:
            found.append(
                f"{each.free_gib:.1f} GiB free in the run folder, slurm.preflight_min_free_gib is {min_free_gib:g}"
            )
        if abs(each.clock_s) > _CLOCK_S:
            found.append(f"its clock is {each.clock_s:+.0f} s off that of {facts[0].node}")
        reasons[each.node] = found
    sound = [each for each in facts if not each.problem and not each.gpu_faults]
    for node, reason in [*_slow(sound), *_odd_versions(sound)]:
        reasons[node].append(reason)
    return {node: "; ".join(found) for node, found in reasons.items() if found}


def _slow(facts: Sequence[NodeFacts]) -> list[tuple[str, str]]:
    if len(facts) < 2:
        return []
    best = max(each.gflops for each in facts)
    usual = statistics.median(each.gflops for each in facts) if len(facts) >= _FEWEST_TO_COMPARE else best
    least = usual * (_SLOWEST if len(facts) >= _FEWEST_TO_COMPARE else _CLEARLY_SLOW)
    return [
        (
            each.node,
            f"a matrix product at {each.gflops:.0f} GFLOP/s{_slowest_gpu(each)}, where nodes usually make {usual:.0f}",
        )
        for each in facts
        if each.gflops < least
    ]


def _slowest_gpu(facts: NodeFacts) -> str:
    return f" on GPU {facts.of_gpus.index(facts.gflops)}" if len(facts.of_gpus) > 1 else ""


def _odd_versions(facts: Sequence[NodeFacts]) -> list[tuple[str, str]]:
    """Return the nodes whose packages differ from those of most nodes, with the difference."""
    if not facts:
        return []
    kinds: dict[str, list[NodeFacts]] = {}
    for each in facts:
        kinds.setdefault(json.dumps(each.versions, sort_keys=True), []).append(each)
    usual = max(kinds.values(), key=len)[0]
    odd = [each for each in facts if each.versions != usual.versions]
    return [
        (
            each.node,
            ", ".join(
                f"{name} {each.versions.get(name, 'missing')} where others have {version}"
                for name, version in usual.versions.items()
                if each.versions.get(name) != version
            ),
        )
        for each in odd
    ]
