"""What every self-contained page is made of: its style, sections and tables, and the file it becomes.

A page has no script and no address to fetch from, which a content security policy forbids too. Text is escaped here.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from trimaran.runtime.files import naming

_STYLE = """
:root { color-scheme: light; --ink: #1b2333; --soft: #5b6577; --line: #e3e7ee; --paper: #ffffff; --wash: #f5f7fa;
        --accent: #1d4ed8 }
* { box-sizing: border-box }
body { margin: 0; background: var(--wash); color: var(--ink);
       font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 56px }
h1 { margin: 0; font-size: 27px; line-height: 1.25; overflow-wrap: anywhere }
h2 { margin: 0 0 10px; font-size: 17px }
p { margin: 0 0 10px }
.soft { color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 20px 0 }
.card, section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px }
.card { padding: 12px 16px }
.card b { display: block; font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums;
          overflow-wrap: anywhere }
.card span { display: block; color: var(--soft); font-size: 13px }
section { padding: 18px 20px; margin-top: 16px }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 0 16px }
svg { display: block; max-width: 100%; height: auto; margin: 0 auto }
svg + svg { margin-top: 14px }
table { border-collapse: collapse; width: 100% }
th, td { padding: 5px 8px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
         overflow-wrap: anywhere }
th { width: 34%; font-weight: 500; color: var(--soft) }
tr:last-child > * { border-bottom: 0 }
.grid th { width: auto }
details { margin-top: 10px }
pre { margin: 0; padding: 14px 16px; background: var(--wash); border-radius: 8px; overflow: auto; max-height: 560px;
      font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
      overflow-wrap: anywhere }
.notice { margin-top: 14px; padding: 10px 16px; border: 1px solid var(--line); border-radius: 8px; color: var(--soft) }
.problem { border-color: #f5c7a9; border-left: 4px solid #ea580c; background: #fff7f0; color: var(--ink) }
.notice p { margin: 2px 0 }
summary { cursor: pointer; font-size: 17px; font-weight: 600 }
details[open] summary { margin-bottom: 10px }
@media print { body { background: none } section, .card { break-inside: avoid } pre { max-height: none } }
"""


def document(title: str, headline: str, parts: Iterable[str]) -> str:
    """Return a whole page.

    Args:
        title: text.
        headline: HTML below it.
        parts: HTML of the body, in order; empty ones are left out.
    """
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)} - trimaran report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
            f'<h1>{escape(title)}</h1>\n<p class="soft">{headline}</p>',
            *(part for part in parts if part),
            "</main>\n</body>\n</html>\n",
        ]
    )


def write_page(path: Path, page: str) -> Path:
    """Write a page and return its path; an older one is replaced in one rename."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # a file's name may not be UTF-8
            return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def section(title: str, *parts: str) -> str:
    """Return a section of a page; `parts` are HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def notice(kind: str, sentences: Iterable[str]) -> str:
    """Return a box of sentences, "" for none."""
    body = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<div class="notice {kind}">{body}</div>' if body else ""


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of two columns."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in rows)
    return f"<table>\n{body}</table>"


def grid(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns have names."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<table class="grid">\n<tr>{head}</tr>\n{body}</table>'
