"""One self-contained HTML page about a recipe: what came in, what every stage removed and why, and what is kept."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trimaran.models.fields import counted
from trimaran.runtime.data.engine.parts import Removed
from trimaran.runtime.data.prepare import PreparedData
from trimaran.runtime.data.recipe.curated import Curated
from trimaran.runtime.data.recipe.fate import samples
from trimaran.runtime.data.recipe.fertility import fertility
from trimaran.runtime.pages.charts import bars
from trimaran.runtime.pages.html import document, grid, notice, section, write_page

_SAMPLES = 20
_MOST_CLUSTERS = 10
_MOST_ITEMS = 100
_SHOWN_CHARACTERS = 400


def write_data_page(curated: Curated, prepared: PreparedData | None = None) -> Path:
    """Write data.html beside the manifest of a recipe; return its path.

    Args:
        prepared: the token shards, for the tokens of a byte and of a word; None where there are none yet.
    """
    manifest, root = curated.manifest, curated.root
    first, last = manifest["stages"][0], manifest["stages"][-1]
    headline = (
        f"{first['documents'].get('in', 0):,} documents in, {last['documents'].get('out', 0):,} kept · "
        f"{counted(len(manifest['sources']), 'file')} · recipe {escape(curated.folder.name)}"
    )
    parts = [
        _warnings(manifest),
        section("What is kept after each stage", _funnel(manifest["stages"])),
        section("Why documents were removed", _reasons(manifest["stages"])),
        section("By corpus and language", _groups(manifest["stages"])),
        section("What was changed inside documents", _changes(manifest["stages"])),
        section("Lengths and scores", *_histograms(first, last)),
        _clusters(manifest),
        _evaluation(manifest["evaluation_sets"]),
        _tokens(curated, prepared),
        section(f"Removed documents, up to {_SAMPLES} of each reason", *_samples(samples(root, manifest, _SAMPLES))),
    ]
    return write_page(curated.folder / "data.html", document("Data", headline, parts))


def _warnings(manifest: Mapping[str, Any]) -> str:
    strict = [
        f"the stage {stage['name']} removed {_share(stage['documents'].get('removed', 0), stage['documents']['in'])}"
        for stage in manifest["stages"]
        if stage["documents"].get("removed", 0) > 0.99 * stage["documents"].get("in", 0)
    ]
    groups = manifest["notes"].get("substring_groups", 1)
    parted = [f"substrings were compared in {groups} groups of parts, by memory: copies in two groups both stay"]
    return notice("problem", strict) + notice("", parted if groups > 1 else [])


def _funnel(stages: Sequence[Mapping[str, Any]]) -> str:
    labels = ["read", *(stage["name"] for stage in stages)]
    documents = [stages[0]["documents"].get("in", 0), *(stage["documents"].get("out", 0) for stage in stages)]
    sizes = [stages[0]["text_bytes"].get("in", 0), *(stage["text_bytes"].get("out", 0) for stage in stages)]
    return bars("documents", labels, documents) + bars(
        "megabytes of text (read: of pages with their markup)", labels, [size / 1e6 for size in sizes]
    )


def _reasons(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (stage["name"], reason, f"{count:,}", _share(count, stage["documents"]["in"]))
        for stage in stages
        for reason, count in sorted(stage["reasons"].items(), key=lambda item: -item[1])
    ]
    return grid(("stage", "reason", "documents", "of those that came"), rows) if rows else "<p>None was removed.</p>"


def _groups(stages: Sequence[Mapping[str, Any]]) -> str:
    """Return what share of each corpus and language every filter removes.

    Word lists and quality rules remove some languages and writers more than others, which only such a table shows.
    """
    rows = []
    for stage in stages:
        for group, reasons in sorted(stage["groups"].items()):
            corpus, _, language = group.partition(" ")
            total = sum(reasons.values())
            removed = Counter({reason: count for reason, count in reasons.items() if reason != "kept"})
            if removed:
                worst = ", ".join(f"{reason} {_share(count, total)}" for reason, count in removed.most_common(4))
                rows.append(
                    (stage["name"], corpus, language, f"{total:,}", _share(sum(removed.values()), total), worst)
                )
    return grid(("stage", "corpus", "language", "documents", "removed", "most by"), rows)


def _changes(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (stage["name"], name, f"{count:,}", stage.get("places", {}).get(name, ""))
        for stage in stages
        for name, count in sorted(stage["counts"].items())
    ]
    return grid(("stage", "what", "times", "first at"), rows) if rows else "<p>Nothing.</p>"


def _histograms(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    before, after = first["lengths"]["in"], last["lengths"]["out"]
    powers = sorted({int(power) for power in (*before, *after)})
    labels = [f"< {_short(2**power)}" for power in powers]
    shown = [
        bars(f"documents by bytes, {name}", labels, [of.get(str(power), 0) for power in powers])
        for name, of in (("as read", before), ("kept", after))
    ]
    for name, counts in sorted(last["scores"].items()):
        values = sorted(map(int, counts))
        shown.append(
            bars(
                f"kept documents by {name}",
                [f"{value / 100:.2f}" for value in values],
                [counts[str(value)] for value in values],
            )
        )
    return shown


def _clusters(manifest: Mapping[str, Any]) -> str:
    clusters = manifest.get("clusters", [])[:_MOST_CLUSTERS]
    if not clusters:
        return ""
    rows = [(cluster["kept"], f"{cluster['copies']:,}") for cluster in clusters]
    return section("Largest clusters of copies", grid(("kept document", "copies removed"), rows))


def _evaluation(sets: Mapping[str, Any]) -> str:
    """Return a table of the evaluation sets, and of each the items that were found."""
    if not sets:
        return ""
    rows = [
        (
            name,
            f"{row['items']:,}",
            f"{len(row['found']):,}",
            _share(len(row["found"]), row["items"]),
            f"{row['short']:,}",
        )
        for name, row in sorted(sets.items())
    ]
    names = ("set", "items", "found in the corpus", "share", "compared whole, being short")
    passages = [
        (name, f"{hit['item']:,}", hit["document"], hit["passage"])
        for name, row in sorted(sets.items())
        for hit in row["found"][:_MOST_ITEMS]
    ]
    found = grid(("set", "item", "first document that has it", "passage"), passages)
    details = f"<details><summary>{counted(len(passages), 'passage')}</summary>{found}</details>"
    return section("Evaluation items in the corpus", grid(names, rows), details if passages else "")


def _tokens(curated: Curated, prepared: PreparedData | None) -> str:
    if prepared is None:
        return ""
    splits = [
        (name, f"{split['tokens']:,}", f"{split['bytes']:,}", f"{split['tokens'] / max(1, split['bytes']):.3f}")
        for name, split in prepared.manifest["splits"].items()
    ]
    languages = [
        (
            row.language,
            f"{row.documents:,}",
            f"{row.tokens / max(1, row.words):.2f}",
            f"{row.tokens / row.num_bytes:.3f}",
        )
        for row in fertility(curated.parts, prepared.tokenizer)
    ]
    return section(
        "Tokens",
        grid(("split", "tokens", "bytes of text", "tokens per byte"), splits),
        "<p>Fertility, of a sample of each language:</p>",
        grid(("language", "documents", "tokens per word", "tokens per byte"), languages),
    )


def _samples(found: Mapping[str, Sequence[Removed]]) -> Iterable[str]:
    for reason, removed in found.items():
        rows = [(each.id, each.language, each.detail, each.excerpt[:_SHOWN_CHARACTERS]) for each in removed]
        table = grid(("document", "language", "detail", "its beginning"), rows)
        yield f"<details><summary>{escape(reason)} ({counted(len(rows), 'sample')})</summary>{table}</details>"


def _share(count: int, whole: int) -> str:
    return f"{count / max(1, whole):.2%}"


def _short(size: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size // scale} {unit}"
    return f"{size} B"
