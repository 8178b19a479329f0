"""report.html of a twin: what was measured, in one self-contained page that says that it imitates."""

from html import escape

from trimaran.runtime.pages.charts import Look, Series, plot
from trimaran.runtime.pages.html import document, grid, section, table
from trimaran.runtime.twin.record import TwinRecord
from trimaran.runtime.twin.report.record import TwinReport


def render(report: TwinReport, record: TwinRecord) -> str:
    """Return the page."""
    who = f"{report.character} of {report.author}" if report.character else report.author
    headline = (
        f"A model that imitates {escape(who)}; it is not {escape(report.character or report.author)}, and what it says "
        "was never said or written by anyone unless a quote is marked as verbatim."
    )
    return document(f"The twin of {who}", headline, [
        _losses(report), _ways(report), _memory(report), _dialogues(report), _sources(record), _settings(report),
    ])  # fmt: skip


def _losses(report: TwinReport) -> str:
    """Bits a character over the checkpoints, the base first."""
    points = [*([] if report.base is None else [report.base]), *report.steps]
    others = [(each.step, each.others) for each in points if each.others is not None]
    lines = [
        Series([(each.step, each.author) for each in points], "the author's held-out text", "blue", "-", dots=True),
        Series(others, "texts of others", "orange", "-", dots=True),
    ]
    before = (None, None) if report.base is None else (report.base.author, report.base.others)
    rows = []
    for each in points:
        name = "base" if each is report.base else f"step {each.step}"
        own = ("", "") if each.others is None else (f"{each.others:.4f}", _change(each.others, before[1]))
        rows.append((name, f"{each.author:.4f}", _change(each.author, before[0]), *own))
    words = f"Step {report.chosen} is measured below: {report.why}. The texts of others are {report.others}."
    return section(
        "Bits a character",
        f'<p class="soft">{escape(words)}</p>',
        plot("bits", Look("step", "bits a character"), lines),
        grid(("", "the author, held out", "", "others", ""), rows),
    )


def _change(value: float, before: float | None) -> str:
    return "" if before is None else f"{value / before - 1:+.1%}"


def _ways(report: TwinReport) -> str:
    names = list(report.ways)
    rows = [
        ("answers in the author's style", *(each.style.shown for each in report.ways.values())),
        ("Delta to the author", *(each.delta_author.shown for each in report.ways.values())),
        ("Delta to others", *(each.delta_others.shown for each in report.ways.values())),
        ("answers with a citation", *(each.cited.shown for each in report.ways.values())),
        ("citations whose sentence rests on the passage", *(each.supported.shown for each in report.ways.values())),
        ("citations that the model invented, taken out", *(str(each.invalid) for each in report.ways.values())),
        ("quotes, of them verbatim", *(f"{each.quotes}, {each.verbatim}" for each in report.ways.values())),
        ("questions about absent topics that are refused", *(each.refused.shown for each in report.ways.values())),
    ]
    held_out = "" if report.held_out_delta is None else (
        f" Delta of the author's own held-out text is {report.held_out_delta:.3g}: answers can't be expected nearer."
    )  # fmt: skip
    words = (
        f"Accuracy of the style classifier on held-out pieces: {report.classifier.shown}.{held_out} The index finds "
        f"the passage of a masked sentence among five in {report.recall.shown} of {report.recall.count}, in "
        f"{report.milliseconds:.2g} ms. In parentheses: 95% intervals."
    )
    return section("Answers", f'<p class="soft">{escape(words)}</p>', grid(("", *names), rows))


def _memory(report: TwinReport) -> str:
    rows = [
        (model, which, found.verbatim.shown, found.copied.shown, ", ".join(map(str, found.longest)))
        for model, of_model in report.memory.items()
        for which, found in of_model.items()
    ]
    words = (
        "Each model goes on greedily from the first 50 tokens of passages. Verbatim: at least 50 tokens that are the "
        "text's. The longest runs are of the continuation, anywhere in the training texts, 8 tokens and more."
    )
    names = ("model", "prefixes of", "verbatim", "tokens copied, on average", "longest runs")
    return section("What it repeats", f'<p class="soft">{escape(words)}</p>', grid(names, rows))


def _dialogues(report: TwinReport) -> str:
    shown = []
    for turns in report.dialogues:
        said = "".join(
            f"<p><strong>{escape(question)}</strong></p><pre>{escape(answer)}</pre>" for question, answer in turns
        )
        shown.append(f"<details><summary>{escape(turns[0][0])}</summary>{said}</details>")
    return section("Dialogues", *shown)


def _sources(record: TwinRecord) -> str:
    rows = [(each.title or each.file, f"{each.author or record.author}; {each.file}") for each in record.works]
    held_out = f"<p>Held out of training and index: {escape(', '.join(record.held_out) or 'nothing')}.</p>"
    return section("Texts", table(rows), held_out)


def _settings(report: TwinReport) -> str:
    return section("Settings", table([(name, str(value)) for name, value in report.settings.items()]))
