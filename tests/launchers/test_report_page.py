"""The report and the comparison in a browser: for everybody at 400 and 1440 pixels, dark and light; values and zoom."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launchers.serve.page.visit import WAIT_MS, Browser
from tests.launchers.test_report import HOSTILE, make_run, make_whole_run
from trimaran.launchers.report import write_report
from trimaran.launchers.report.comparison import write_comparison

SMALLEST = """Math.min(...[...document.querySelectorAll("main *:not(script)")]
  .filter(e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
  .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
INK = """figure => { const c = figure.querySelector("canvas");
  const data = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  let count = 0; for (let i = 3; i < data.length; i += 4) count += data[i] > 0; return count }"""

# keeps the texts that reach over an edge of their canvas
CUT = """window.cut = []; const draw = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const turned = this.getTransform(), width = this.measureText(text).width;
  const left = turned.transformPoint({ x, y }).x - ({ right: width, center: width / 2 }[this.textAlign] || 0);
  if (this.canvas.isConnected && !turned.b && (left < 0 || left + width > this.canvas.width)) window.cut.push(text);
  return draw.apply(this, arguments) }"""


@contextmanager
def opened(browser: Browser, file: Path) -> Iterator:
    """A tab with a page from the disk; leaving it fails where a script failed or anything was asked of a server."""
    complaints: list[str] = []
    context = browser.chromium.new_context(viewport={"width": 1440, "height": 900}, device_scale_factor=2)
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: complaints.append(request.url) if request.url != file.as_uri() else None)
    page.add_init_script(CUT)
    try:
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        yield page
    finally:
        context.close()
    assert not complaints, "\n".join(complaints)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of a whole run with hostile names, and its comparison with a short one."""
    folder = tmp_path_factory.mktemp("pages")
    whole = make_whole_run(folder / "<img src=x onerror=alert(1)>")
    with (whole / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "</script><script>alert(1)</script>/acc": 0.5}\n')
    (whole / "sample.txt").write_text(HOSTILE)
    short = make_run(folder / "short", num_steps=8, lost=(3,))
    with (short / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 2e20, "lr": 1e-30}\n')
    return {"report": write_report(whole), "comparison": write_comparison([whole, short], folder / "compared.html")}


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_nothing_is_in_the_way_of_anybody(
    name: str, pages: dict[str, Path], browser: Browser, browser_thread: ThreadPoolExecutor
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    def look() -> None:
        with opened(browser, pages[name]) as page:
            page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
            for width in (1440, 400):
                page.set_viewport_size({"width": width, "height": 900})
                for scheme in ("light", "dark"):
                    page.emulate_media(color_scheme=scheme)
                    found = Axe().run(page).response["violations"]
                    assert [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]] == []
                    root = "document.documentElement"
                    assert not page.evaluate(f"{root}.scrollWidth > {root}.clientWidth"), f"{width} pixels are too few"
                    assert page.evaluate(SMALLEST) >= 11
                    assert all(page.eval_on_selector_all("figure.chart", f"all => all.map({INK})")), "a chart is empty"
                    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
                    assert (int(dark.removeprefix("rgb(").split(",")[0]) < 50) == (scheme == "dark")
                    widths = page.eval_on_selector_all("canvas", "all => all.map(each => each.clientWidth)")
                    assert max(widths) <= width
            assert page.evaluate("window.cut") == [], "labels are cut"

    browser_thread.submit(look).result()


def test_values_zoom_and_axes_by_mouse_and_by_keys(
    pages: dict[str, Path], browser: Browser, browser_thread: ThreadPoolExecutor
) -> None:
    def look() -> None:
        with opened(browser, pages["report"]) as page:
            figure = page.locator("#loss")
            area, told = figure.locator(".u-over"), figure.locator(".readout")
            area.scroll_into_view_if_needed()
            box = area.bounding_box()
            right, middle = box["x"] + box["width"] - 2, box["y"] + box["height"] / 2

            def at_the_right() -> str:
                page.mouse.move(right - 3, middle)
                page.mouse.move(right, middle)
                return told.inner_text()

            assert at_the_right() == "step 60: training 2.14936, training, smoothed 2.14936, held-out 2.5"
            page.mouse.move(box["x"] + 3, middle)
            page.mouse.down()
            page.mouse.move(box["x"] + box["width"] / 2, middle, steps=4)
            page.mouse.up()
            assert re.match(r"step 3[01]: training 2.6", at_the_right()), "the left half is shown"
            assert told.inner_text().endswith("held-out 2.5 (at 40)")
            page.mouse.dblclick(right, middle)
            assert at_the_right().startswith("step 60: ")
            page.get_by_label("x axis").first.select_option("by tokens")
            assert at_the_right().startswith("tokens 3,000,000: ")
            ink = figure.evaluate(INK)
            figure.get_by_role("button", name="Logarithmic x axis").click()
            figure.get_by_role("button", name="Logarithmic y axis").click()
            assert figure.evaluate(INK) != ink, "the axes have other lines"
            assert re.match(r"tokens (2,9|3,0)\d0,000: ", at_the_right()), "the last steps lie close on this axis"
            figure.get_by_role("button", name="Show training", exact=True).click()
            assert "training 2" not in at_the_right()
            chart = figure.get_by_role("application")
            chart.focus()
            for key in ("Home", "ArrowRight"):
                page.keyboard.press(key)
            assert told.inner_text().startswith("tokens 100,000: ")
            assert told.get_attribute("aria-live") == "polite"
            for key in ("+", "+", "End"):
                page.keyboard.press(key)
            page.keyboard.press("0")
            timeline = page.locator("#timeline-measured")
            timeline.get_by_role("application").focus()
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowRight")
            expected = "rank 1: forward of microbatch 0, 1 ms, from 1.2 to 2.2 ms"
            assert timeline.locator(".readout").inner_text() == expected
            page.get_by_role("button", name="Dark or light").click()
            page.emulate_media(media="print")
            assert page.locator(".tools").first.is_hidden()

    browser_thread.submit(look).result()
