"""What became of the records of example files: used, left out or cut, by reason, with the first place. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from trimaran.models.fields import counted, printable
from trimaran.runtime.data.files import DataError
from trimaran.runtime.finetune.data.records import Origin


class _Reason(NamedTuple):
    """Why a record is not used as it is; `remedy` is what to do where many are lost, "" where nothing is lost."""

    words: str
    remedy: str


REASONS: Final[Mapping[str, _Reason]] = {
    "empty_answer": _Reason("left out: the answer is empty", "write the answers"),
    "no_answer": _Reason("left out: no answer follows the last question", "write the answers"),
    "empty_text": _Reason("left out: the text is empty", "write the texts"),
    "equal_pair": _Reason(
        "left out: chosen and rejected are equal, so nothing can be preferred", "write two different answers"
    ),
    "too_long": _Reason(
        "left out: more tokens than train.seq_len", "raise train.seq_len, or set finetune.truncation to left or right"
    ),
    "nothing_left": _Reason(
        "left out: cut to train.seq_len, no learned token is left",
        "raise train.seq_len, or cut the other end by finetune.truncation",
    ),
    "long_prompt": _Reason("left out: the prompt leaves no room for an answer", "raise train.seq_len"),
    "surrogate": _Reason("half surrogate pairs, which are no characters, became U+FFFD", ""),
    "cut": _Reason("cut to train.seq_len", ""),
}


@dataclass(slots=True)
class ExampleAccount:
    """How many records were read, and how many of them met each reason of REASONS, with the first place."""

    records: int = 0
    used: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, reason: str, origin: Origin) -> None:
        """Count a record."""
        assert reason in REASONS, reason
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, str(origin))

    @property
    def record(self) -> dict[str, Any]:
        """The account as a manifest holds it; `read` is the way back."""
        return {"records": self.records, "used": self.used, "counts": self.counts, "first": self.first}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "ExampleAccount":
        """Return the account that a manifest holds as `record`."""
        return cls(record["records"], record["used"], dict(record["counts"]), dict(record["first"]))

    def check(self, most: float) -> None:
        """Raise DataError where more than a share `most` of the records is lost for one reason."""
        for reason, count in self.counts.items():
            words, remedy = REASONS[reason]
            if remedy and count > most * self.records:
                raise DataError(
                    f"data.source: {count:,} of {counted(self.records, 'record')} would be {words} (first "
                    f"{printable(self.first[reason])}), more than data.max_lost_fraction ({most:g}); {remedy}, or "
                    "raise data.max_lost_fraction if this is meant"
                )

    def rows(self) -> list[tuple[str, str]]:
        """Return (how many records, what became of them), for people."""
        rows = [(f"{self.used:,} of {counted(self.records, 'record')}", "used")]
        for reason in REASONS:
            if reason in self.counts:
                place = printable(self.first[reason])
                rows.append((f"{self.counts[reason]:,}", f"{REASONS[reason].words} (first {place})"))
        return rows
