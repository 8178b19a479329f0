"""The account of a corpus: what was read, and what was passed over, left out or changed, by reason, with a share."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from trimaran.models.fields import counted, printable
from trimaran.runtime.data.files import DataError


class Reason(NamedTuple):
    """Why something of the corpus is not in the tokens as its files have it.

    Args:
        name: of one of the things that are counted; `{s}` is the ending of its plural.
        whole: the total that the amount is a share of, in Account.totals.
        remedy: what to do where the share is surely an accident; "" where the reason is no loss of text.
    """

    verb: str
    name: str
    whole: str
    remedy: str = ""


_NAME_FILES = "name the files that are meant in data.source, by their names or by a glob"
REASONS: Final = {
    "hidden": Reason("passed over", "hidden file{s}", "file_bytes"),
    "twice": Reason("passed over", "file{s} named twice", "file_bytes"),
    "other_kind": Reason("passed over", "file{s} of another kind", "file_bytes", f"convert them, or {_NAME_FILES}"),
    "pickle": Reason("passed over", "pickle{s}, which can run code", "file_bytes", f"convert them, or {_NAME_FILES}"),
    "unlisted": Reason(
        "passed over", ".arrow file{s} that the folder's state.json does not list", "file_bytes", "save the folder anew"
    ),
    "special": Reason("passed over", "device{s}, pipe{s} or socket{s}", "file_bytes"),
    "empty_file": Reason("passed over", "empty file{s}", "file_bytes"),
    "no_records": Reason(
        "passed over", ".json file{s} without text in data.text_field", "file_bytes", f"set it, or {_NAME_FILES}"
    ),
    "empty": Reason("left out", "empty document{s}", "records", "take them out, or set data.text_field to the text"),
    "null": Reason("left out", "document{s} whose text is null", "records", "take them out, or set data.text_field"),
    "blank": Reason("left out", "blank line{s} between JSON lines", "records"),
    "utf16": Reason("decoded", "file{s} in UTF-16 or UTF-32", "file_bytes"),
    "crlf": Reason("removed", "carriage return{s} before a line end", "characters"),
    "not_utf8": Reason(
        "replaced",
        "byte{s} outside UTF-8",
        "characters",
        "find out which encoding the files have (`uchardet FILE` guesses it), and convert them by "
        "`iconv -f ENCODING -t UTF-8`",
    ),
    "surrogate": Reason("replaced", "half surrogate pair{s}", "characters", "write the pairs whole"),
    "nul": Reason("kept", "NUL character{s}", "characters", "take them out"),
    "unknown": Reason(
        "lost",
        "character{s} that the tokenizer can't write",
        "characters",
        "take a tokenizer that can (data.tokenizer: null trains one on the text)",
    ),
}


@dataclass(slots=True)
class Notice:
    """How often a reason was met, how much of the whole that is, and where it was met first."""

    count: int = 0
    amount: int = 0
    first: str = ""
    kinds: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Account:
    """Totals of what was found and read, and every reason met; part of the manifest.

    `totals` has files, file_bytes (also of files passed over), records (documents, also those left out), and of the
    text that was kept documents, bytes (in UTF-8), characters and units.
    """

    totals: Counter[str] = field(default_factory=Counter)
    noticed: dict[str, Notice] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """The account as a manifest holds it; `read` is the way back."""
        rows = {
            name: {"count": notice.count, "amount": notice.amount, "first": notice.first, "kinds": dict(notice.kinds)}
            for name, notice in self.noticed.items()
        }
        return {**self.totals, "noticed": rows}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Account":
        """Return the account that a manifest holds as `record`."""
        noticed = {name: Notice(**{**row, "kinds": Counter(row["kinds"])}) for name, row in record["noticed"].items()}
        return cls(Counter({name: total for name, total in record.items() if name != "noticed"}), noticed)

    def note(self, reason: str, first: str, count: int = 1, amount: int | None = None, kind: str = "") -> None:
        """Count something; `amount` of the reason's whole is `count` unless given."""
        if count:
            notice = self.noticed.setdefault(reason, Notice(first=first))
            notice.count += count
            notice.amount += count if amount is None else amount
            notice.kinds.update([kind] if kind else [])

    def share(self, reason: str) -> float:
        """Return the share of the whole that was met with a reason."""
        notice = self.noticed.get(reason, Notice())
        return min(1.0, notice.amount / max(1, self.totals[REASONS[reason].whole]))

    def check(self, most: float, reasons: Iterable[str] = REASONS) -> None:
        """Raise DataError where more than a share `most` of a whole was lost for one of the reasons."""
        for name in reasons:
            reason, notice = REASONS[name], self.noticed.get(name)
            if notice and reason.remedy and self.share(name) > most:
                raise DataError(
                    f"data.source: {self._what(name)} ({_percent(self.share(name))} of the {_WHOLES[reason.whole]}, "
                    f"first {printable(notice.first)}) would be {reason.verb}, more than data.max_lost_fraction "
                    f"({most:g}); {reason.remedy}, or raise data.max_lost_fraction if this is meant"
                )

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return (verb, what, share, first place) of every reason that was met."""
        return [
            (
                reason.verb,
                self._what(name),
                f"{_percent(self.share(name))} of the {_WHOLES[reason.whole]}",
                printable(self.noticed[name].first),
            )
            for name, reason in REASONS.items()
            if name in self.noticed
        ]

    def told(self) -> str:
        """Return everything that was met, in a sentence."""
        return ", ".join(f"{verb} {what}" for verb, what, _, _ in self.rows())

    def _what(self, name: str) -> str:
        notice = self.noticed[name]
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in notice.kinds.most_common(_SHOWN_KINDS))
        rest = ", ..." if len(notice.kinds) > _SHOWN_KINDS else ""
        what = f"{notice.count:,} {REASONS[name].name.format(s='' if notice.count == 1 else 's')}"
        return f"{what} ({kinds}{rest})" if kinds else what


_SHOWN_KINDS = 5
_WHOLES = {"file_bytes": "bytes of the files", "records": "documents", "characters": "characters"}


def _percent(share: float) -> str:
    return "< 0.01%" if 0 < share < 1e-4 else f"{100 * share:.3g}%"


def table_of(manifest: Mapping[str, Any]) -> str:
    """Return the table of a prepared corpus, for people: a line of what was read and one for every reason met."""
    found, read = Account.read(manifest["source"]["found"]), Account.read(manifest["corpus"])
    totals, splits = read.totals, manifest["splits"]
    tokens = {name: split["tokens"] for name, split in splits.items()}
    characters = max(1, sum(split["characters"] for split in splits.values()))
    rows = [
        (
            "read",
            f"{counted(totals['documents'], 'document')} in {counted(totals['files'], 'file')}",
            f"{totals['characters']:,} characters",
            "",
        ),
        *found.rows(),
        *read.rows(),
        (
            "held out",
            f"{tokens['held_out']:,} of {sum(tokens.values()):,} tokens",
            f"{_percent(splits['held_out']['characters'] / characters)} of the characters",
            f"data.held_out_fraction: {manifest['held_out_fraction']:g}",
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    return "data\n" + "\n".join(f"  {line.rstrip()}" for line in lines)
