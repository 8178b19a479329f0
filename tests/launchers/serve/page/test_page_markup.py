"""What models, titles and imported files hold becomes text, lists and tables on the page of serve, and never script."""

import json
import re
from typing import Any

from tests.launchers.serve.page.site import Gate, Site
from tests.launchers.serve.page.visit import Tab, Visit

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<svg/onload=alert(1)><a xlink:href=javascript:alert(1)>x</a></svg>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<style>@import 'http://evil.example/x';</style>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](<javascript:alert(1)>)",
    "[x](\x01javascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:msgbox(1))",
    "[x](//evil.example/relative)",
    "[x](blob:http://127.0.0.1/1)",
    "![x](http://evil.example/picture.png)",
    "![x](javascript:alert(1))",
    "<javascript:alert(1)>",
    '[x](http://a.example/" onmouseover="alert(1))',
    "[a [b](javascript:alert(1)) c](http://a.example)",
    "[![x](javascript:alert(1))](javascript:alert(2))",
    "```<img src=x onerror=alert(1)>\n</code></pre><script>alert(1)</script>\n```",
    "| <img src=x onerror=alert(1)> | [x](javascript:alert(1)) |\n|---|---|\n| <svg onload=alert(1)> | `<b>` |",
    "# <img src=x onerror=alert(1)>",
    "> - <img src=x onerror=alert(1)>",
    "**<b onclick=alert(1)>x</b>**",
    "&lt;img src=x onerror=alert(1)&gt;",
    "__proto__ [constructor](http://a.example) constructor",
    "\u202e<img src=x onerror=alert(1)>\u2066",
)
CITED: dict[str, Any] = {
    "choices": [{"index": 0, "delta": {}, "finish_reason": None}],
    "trimaran": {"citations": [{"n": 1, "title": HOSTILE[0], "lines": HOSTILE[1], "text": HOSTILE[2] + HOSTILE[5]}]},
}
ALLOWED_TAGS = {
    "A", "BLOCKQUOTE", "BR", "BUTTON", "CITE", "CODE", "DEL", "DETAILS", "DIV", "EM", "FIGCAPTION", "FIGURE", "H2",
    "H3", "H4", "H5", "H6", "HR", "LI", "OL", "P", "PRE", "SPAN", "STRONG", "SUMMARY", "TABLE", "TBODY", "TD", "TH",
    "THEAD", "TR", "UL", "ARTICLE", "FOOTER", "SECTION",
}  # fmt: skip


def check_elements(tab: Tab) -> None:
    """Look at every element that came of messages: its name, its attributes and where its links lead."""
    found = tab.page.evaluate(
        """[...document.querySelectorAll('#messages *, #list *, #title *')].map(e =>
        [e.tagName, [...e.attributes].map(a => [a.name, a.value])])"""
    )
    assert found
    for tag, attributes in found:
        assert tag in ALLOWED_TAGS, tag
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcdoc", "style", "action", "formaction"), (tag, name)
            if name == "href":
                assert re.match(r"https?://|mailto:|#source-", value), value
    for link in tab.page.locator("#messages a:not(.mark)").all():
        assert link.get_attribute("rel") == "noopener noreferrer"


def test_hostile_answers_titles_and_citations_execute_nothing(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    tab.ask(HOSTILE[0], "\n\n".join(HOSTILE) + "\n\nSee [1].", CITED)
    check_elements(tab)
    assert tab.texts()[0] == HOSTILE[0]
    assert tab.page.locator("#title").inner_text() == HOSTILE[0]
    assert HOSTILE[1] in tab.texts()[1], "it is shown as it was written"
    tab.page.get_by_role("button", name="Source 1").click()
    tab.see(HOSTILE[2] + HOSTILE[5])
    tab.click("More")
    tab.click("Rename")
    tab.page.keyboard.type("</button><img src=x onerror=alert(1)>")
    tab.page.keyboard.press("Enter")
    tab.wait_titles("</button><img src=x onerror=alert(1)>")
    tab.load()
    check_elements(tab)


def test_halves_of_tags_and_links_are_no_script_at_any_moment(visit: Visit, site: Site) -> None:
    """Every piece is shown before the next one comes: the page looks at all halves, not only at the whole."""
    tab = visit.tab()
    watch = """() => { window.wrong = []; new MutationObserver(() => {
        for (const e of document.querySelectorAll('#messages *'))
          if (['IMG', 'SCRIPT', 'SVG', 'IFRAME', 'STYLE', 'OBJECT'].includes(e.tagName.toUpperCase()) ||
              /^(?!https?:|mailto:|#source-)/.test(e.getAttribute('href') ?? 'http:') ||
              [...e.attributes].some(a => a.name.startsWith('on'))) window.wrong.push(e.outerHTML);
      }).observe(document.getElementById('messages'), {childList: true, subtree: true, attributes: true}); }"""
    tab.page.evaluate(watch)
    pieces: list[object] = []
    gates = []
    for text in (HOSTILE[0], HOSTILE[5], HOSTILE[11], HOSTILE[2], HOSTILE[15]):
        for half in (text[: len(text) // 2], text[len(text) // 2 : -1], text[-1] + "\n\n"):
            gates.append(Gate())
            pieces += [half, gates[-1]]
    site.answers = [pieces]
    tab.send("halves")
    shown = ""
    for piece, gate in zip(pieces[::2], gates, strict=True):
        shown += str(piece)
        wanted = re.sub(r"\s", "", shown).replace(re.sub(r"\s", "", HOSTILE[15]), "x")
        tab.until(
            "wanted => document.querySelector('.from-assistant .text')?.textContent.replace(/\\s/g, '') === wanted",
            wanted,
        )
        gate.open()
    tab.page.locator("#send").wait_for()
    assert tab.page.evaluate("window.wrong") == []
    check_elements(tab)


def test_one_character_at_a_time_gives_what_the_whole_gives(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    text = MARKDOWN + "\n\n" + "\n\n".join(HOSTILE)
    tab.ask("whole", text)
    tab.ask("in pieces", *text)
    whole, pieces = tab.page.locator(".from-assistant .text").evaluate_all("all => all.map(e => e.innerHTML)")
    assert pieces == whole


def test_an_imported_file_executes_nothing(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    messages = [{"role": "user", "text": text} for text in HOSTILE]
    citations = CITED["trimaran"]["citations"]
    answer = {"role": "assistant", "text": "\n\n".join(HOSTILE) + " [1]", "citations": citations, "error": HOSTILE[0]}
    answer |= {"model": HOSTILE[1], "finish": HOSTILE[0], "state": "failed", "onclick": "alert(1)", "__proto__": {}}
    hostile = {"title": HOSTILE[0], "isNamed": True, "system": HOSTILE[1], "messages": [*messages, answer]}
    content = json.dumps({"format": "trimaran-conversations", "version": 1, "conversations": [hostile]})
    tab.page.set_input_files("#import-file", {"name": "x", "mimeType": "text/html", "buffer": content.encode()})
    tab.wait_titles(HOSTILE[0])
    tab.click(HOSTILE[0])
    tab.page.locator(".from-assistant").wait_for()
    check_elements(tab)


def test_hostile_lengths_are_shown(visit: Visit, site: Site) -> None:
    """Reading goes on after what was searched in vain, and no deeper than some levels."""
    tab = visit.tab()
    size = 20_000
    marks = (
        "*a ", "[", "`", "> ", "_a*b", "- ", "|", "[a](", "![", "<http://", "`a``b", "**a*b", "#", "\\", "http://", "&",
        "~~", "a|b|\n", "\n> - ", "a|b\n-|",
    )  # fmt: skip
    for mark in marks:
        tab.click("New conversation")
        tab.ask("long", mark * (size // len(mark)) + " end")
        tab.page.locator(".from-assistant .text").last.get_by_text("end").last.wait_for()


MARKDOWN = """# Title

Some *slanted*, **bold**, ***both***, ~~gone~~ and `code with *marks*` text, snake_case_name and 2 * 3 * 4.
A second line of it.

## Lists

- one
- two
  - two a

    second paragraph
  - two b
- three

3. third
4. fourth

> quoted
> > deeper

| left | right | middle |
|:-----|------:|:-:|
| a \\| b | **1** | x |
| c | 2 |

```python
print("<&>")  # *no marks*
```

---

[A link](https://example.org/a_(b) "title") <https://example.org/auto> and https://example.org/bare. Then \\*none\\*.
"""


ELEMENTS = (
    ("# One ##\n### Three", '<h3 class="heading size-1">One</h3><h4 class="heading size-3">Three</h4>'),
    (
        "a *b* **c** ***d*** ~~e~~ _f_ g_h_i",
        "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <del>e</del> <em>f</em> g_h_i</p>",
    ),
    ("2 * 3 * 4 and **open", "<p>2 * 3 * 4 and **open</p>"),
    ("`a*b*` ``c`d`` \\`e\\`", "<p><code>a*b*</code> <code>c`d</code> `e`</p>"),
    ("one\ntwo", "<p>one<br>two</p>"),
    ("- a\n- b\n  - c\n\n1. d\n2. e", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>d</li><li>e</li></ol>"),
    ("7) a\n8) b", '<ol start="7"><li>a</li><li>b</li></ol>'),
    ("In\n1848. Then\n- so", "<p>In<br>1848. Then</p><ul><li>so</li></ul>"),
    ("- a\n\n  b\n- c", "<ul><li>a<p>b</p></li><li>c</li></ul>"),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("a\n\n---\n***", "<p>a</p><hr><hr>"),
    ("a &amp; b &lt;c&gt; &copy;", "<p>a &amp; b &lt;c&gt; &amp;copy;</p>"),
    ("a | b", "<p>a | b</p>"),
)


def test_markdown_gives_elements(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    for text, html in ELEMENTS:
        tab.ask("show", text)
        assert tab.page.locator(".from-assistant .text").last.inner_html() == html, text


def test_links_tables_and_code_are_what_they_say(visit: Visit, site: Site) -> None:
    tab = visit.tab()
    tab.ask("show", MARKDOWN)
    links = tab.page.locator(".text a")
    addresses = ["https://example.org/a_(b)", "https://example.org/auto", "https://example.org/bare"]
    assert [each.get_attribute("href") for each in links.all()] == addresses
    assert links.all_inner_texts() == ["A link", *addresses[1:]]
    rows = tab.page.locator("table tr").evaluate_all("rows => rows.map(row => [...row.cells].map(c => c.innerText))")
    assert rows == [["left", "right", "middle"], ["a | b", "1", "x"], ["c", "2", ""]]
    assert tab.page.locator("figure figcaption span").inner_text() == "python"
    assert tab.page.locator("figure code").inner_text() == 'print("<&>")  # *no marks*'
