"""The tally of a stage: documents and bytes in, out and removed by reason, whole and by corpus and language.

What went in is what came out and what was removed; `check` holds that.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from trimaran.runtime.data.document import Counts, Loss

_UNKNOWN = "unknown"


@dataclass(slots=True)
class Tally:
    """What a task or a whole stage did.

    Attributes:
        documents: "in", "out" and "removed" -> documents.
        text_bytes: the same of the UTF-8 bytes of their texts ("in": as they came in, a page with its markup).
        reasons: reason -> documents removed.
        groups: "CORPUS LANGUAGE" -> reason -> documents, with "kept" for those that stay.
        counts: what readers and steps have changed or passed over inside the documents, by dotted name.
        places: where each of the readers' counts was met first.
        lengths: "in" and "out" -> power of two of the bytes of a text -> documents.
        scores: field of a document -> hundredth of its value -> documents.
    """

    documents: Counter[str] = field(default_factory=Counter)
    text_bytes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    groups: dict[str, Counter[str]] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, Counter[str]] = field(default_factory=lambda: {"in": Counter(), "out": Counter()})
    scores: dict[str, Counter[str]] = field(default_factory=dict)

    def enter(self, num_bytes: int) -> None:
        """Count a document that comes in."""
        self.documents["in"] += 1
        self.text_bytes["in"] += num_bytes
        self.lengths["in"][str(num_bytes.bit_length())] += 1

    def lose(self, loss: Loss, corpus: str) -> None:
        """Count what a reader could not read, or has passed over."""
        if loss.is_document:
            self.documents.update({"in": loss.times, "removed": loss.times})
            self.reasons[loss.reason] += loss.times
            self._group(corpus, "")[loss.reason] += loss.times
        else:
            self.counts[loss.reason] += loss.times
            self.places.setdefault(loss.reason, loss.place)

    def keep(self, num_bytes: int, corpus: str, language: str, scores: Mapping[str, Any]) -> None:
        """Count a document that stays."""
        self.documents["out"] += 1
        self.text_bytes["out"] += num_bytes
        self.lengths["out"][str(num_bytes.bit_length())] += 1
        self._group(corpus, language)["kept"] += 1
        for name, value in scores.items():
            if isinstance(value, float):
                self.scores.setdefault(name, Counter())[str(int(100 * value))] += 1

    def remove(self, num_bytes: int, corpus: str, language: str, reason: str) -> None:
        """Count a document that is removed; `num_bytes` are those it came in with."""
        self.documents["removed"] += 1
        self.text_bytes["removed"] += num_bytes
        self.reasons[reason] += 1
        self._group(corpus, language)[reason] += 1

    def _group(self, corpus: str, language: str) -> Counter[str]:
        return self.groups.setdefault(f"{corpus} {language or _UNKNOWN}", Counter())

    @property
    def record(self) -> dict[str, Any]:
        """The tally as JSON; `read` is the way back."""
        return {
            name: {key: dict(sorted(each.items())) if isinstance(each, Counter) else each for key, each in rows}
            for name, rows in ((name, sorted(getattr(self, name).items())) for name in _FIELDS)
        }

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """Return the tally of a record."""
        tally = cls()
        tally.add(record)
        return tally

    def add(self, record: Mapping[str, Any]) -> None:
        """Add another tally's record."""
        for name in _FIELDS:
            mine = getattr(self, name)
            for key, value in record[name].items():
                if isinstance(value, str):
                    mine.setdefault(key, value)
                elif isinstance(value, Mapping):
                    mine.setdefault(key, Counter()).update(value)
                else:
                    mine[key] += value

    @classmethod
    def sum(cls, records: Iterable[Mapping[str, Any]]) -> Self:
        """Return the sum of several records."""
        total = cls()
        for record in records:
            total.add(record)
        return total

    def check(self, stage: str) -> None:
        """Hold the promise that nothing is dropped unseen.

        Raises:
            AssertionError: documents are missing from the account, which is an error in this program.
        """
        seen = self.documents
        grouped = sum(each.total() for each in self.groups.values())
        assert seen["in"] == seen["out"] + seen["removed"] == grouped, f"stage {stage} lost documents: {dict(seen)}"
        assert self.reasons.total() == seen["removed"], f"stage {stage} removed without a reason: {dict(self.reasons)}"


_FIELDS = ("documents", "text_bytes", "reasons", "groups", "counts", "places", "lengths", "scores")
