"""What every self-contained page is made of: its style, sections and tables, and the file it becomes.

A page has no address to fetch from. Its only script and style are those of this package, which a content security
policy allows by their SHA-256, and nothing else: whatever text a page shows, none of it runs. Text is escaped here.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from trimaran.runtime.files import read_text, write_text

_WEB: Final = Path(__file__).with_name("web")
_NO_SCRIPT: Final = "The charts need JavaScript; the values behind each are in its table."


def document(title: str, headline: str, parts: Iterable[str]) -> str:
    """Return a whole page.

    Args:
        title: text.
        headline: HTML below it.
        parts: HTML of the body, in order; empty ones are left out.
    """
    style = _source("page.css") + _source("uplot.min.css")
    # uPlot's licence has to go with every copy of it
    script = f"/*!\n{_source('uplot.LICENSE')}*/\n{_source('uplot.min.js')}\n{_source('charts.js')}"
    policy = (
        f"default-src 'none'; script-src {hash_source(script)}; style-src {hash_source(style)}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{escape(title)} - trimaran report</title>\n<style>{style}</style>\n</head>\n<body>\n<main>",
            f"<header><h1>{escape(title)}</h1>",
            '<button id="scheme" type="button" title="Dark or light" aria-label="Dark or light" hidden>◐</button>',
            f'</header>\n<p class="soft">{headline}</p>\n<noscript><p class="notice">{_NO_SCRIPT}</p></noscript>',
            *(part for part in parts if part),
            f"</main>\n<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def _source(name: str) -> str:
    return read_text(_WEB / name)


def hash_source(text: str) -> str:
    """Return what allows an inline script or style of this very text in a content security policy."""
    assert not re.search("</(script|style)|<!--", text, re.IGNORECASE), "an element would end early"
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def write_page(path: Path, page: str) -> Path:
    """Write a page and return its path; an older one is replaced in one rename."""
    write_text(path, page.encode("utf-8", "backslashreplace").decode())  # a file's name may not be UTF-8
    return path


def section(title: str, *parts: str) -> str:
    """Return a section of a page; `parts` are HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def folded(title: str, *parts: str) -> str:
    """Return what is shown once it is opened; `parts` are HTML."""
    return f"<details><summary>{escape(title)}</summary>\n" + "\n".join(parts) + "\n</details>"


def notice(kind: str, sentences: Iterable[str]) -> str:
    """Return a box of sentences, "" for none."""
    body = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<div class="notice {kind}">{body}</div>' if body else ""


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of two columns."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in rows)
    return f"<table>\n{body}</table>"


def grid(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns have names; a wide one scrolls by itself, by keyboard too."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    what = escape(", ".join(filter(None, names)))
    table = f'<table class="grid">\n<tr>{head}</tr>\n{body}</table>'
    return f'<div class="scroll" tabindex="0" role="group" aria-label="table of {what}">{table}</div>'
