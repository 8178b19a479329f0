"""The page of `trimaran serve`: one self-contained HTML document, and the policy under which browsers may run it.

The sources are an HTML skeleton, style sheets and ES modules. `build_page` puts them into one document, whose only
script and style are allowed by their SHA-256: nothing else runs, whatever a model writes.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trimaran.runtime.files import read_text
from trimaran.runtime.pages.html import hash_source

MODULES: Final = (
    "dom.js", "inline.js", "markdown.js", "api.js", "records.js", "store.js", "settings.js", "message.js",
    "sidebar.js", "runs.js", "files.js", "chat.js", "main.js",
)  # fmt: skip
"""Each imports only from those before it."""
STYLES: Final = ("page.css", "text.css")
_IMPORT: Final = re.compile(r'^import \{[^}]*\} from "\./\w+\.js";\n', re.MULTILINE)
_EXPORT: Final = re.compile(r"^export (?=(?:async )?function|class|const)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Page:
    """A document and the value of the Content-Security-Policy header that it is to be served with.

    Args:
        html: UTF-8.
        csp: allows this document's script and style by hash, requests to the same origin, and nothing else.
    """

    html: bytes
    csp: str


def build_page() -> Page:
    """Return the page, made of the files beside this one.

    The modules become one: their imports of each other and `export` are cut, so that their names share one scope.

    Raises:
        OSError: a file of the package is missing.
    """
    script = "\n" + "\n".join(_EXPORT.sub("", _IMPORT.sub("", _source(name))) for name in MODULES)
    style = "\n" + "\n".join(map(_source, STYLES))
    html = _fill(_source("page.html"), "<style></style>", f"<style>{style}</style>")
    html = _fill(html, '<script type="module"></script>', f'<script type="module">{script}</script>')
    policy = (
        "default-src 'none'",
        f"script-src {hash_source(script)}",
        f"style-src {hash_source(style)}",
        "connect-src 'self'",
        "img-src data:",  # the icon, which is in the document
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # assigning markup to innerHTML is an error
        "trusted-types 'none'",
    )
    return Page(html.encode(), "; ".join(policy))


def _source(name: str) -> str:
    return read_text(Path(__file__).with_name(name))


def _fill(html: str, place: str, content: str) -> str:
    assert html.count(place) == 1, f"page.html has {place} {html.count(place)} times"
    return html.replace(place, content)
