"""Somebody at the page: a profile of the browser, its tabs, and what the browser complained of."""

import re
import time
from dataclasses import dataclass, field
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser as PlaywrightBrowser
from playwright.sync_api import BrowserContext, Locator, Page, Playwright, sync_playwright

from tests.launchers.serve.page.site import Site

CHROMIUM = "/usr/bin/chromium"
WAIT_MS = 60_000
"""How long a step of a test may wait, on a machine that is busy with other tests."""
_STATUS = re.compile(r"Failed to load resource: (the server responded with a status of|net::ERR)")


@dataclass
class Browser:
    """A browser and the driver that it is steered by."""

    playwright: Playwright
    chromium: PlaywrightBrowser

    def close(self) -> None:
        """End both."""
        self.chromium.close()
        self.playwright.stop()


def start_browser() -> Browser:
    """Start Chromium without a window."""
    playwright = sync_playwright().start()
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
    return Browser(playwright, chromium)


@dataclass
class Visit:
    """A fresh profile: nothing stored, nothing shared with other visits."""

    browser: Browser
    site: Site
    complaints: list[str] = field(default_factory=list)
    context: BrowserContext | None = None

    def tab(self, width: int = 1000, height: int = 700, scheme: str = "light", script: str = "") -> "Tab":
        """Open the page in a tab and wait until it is ready; `script` runs before the page's own."""
        if self.context is None:
            options: Any = {"color_scheme": scheme, "reduced_motion": "reduce"}
            self.context = self.browser.chromium.new_context(viewport={"width": width, "height": height}, **options)
            self.context.set_default_timeout(WAIT_MS)
            self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("console", lambda message: self.note(message.type, message.text))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.note_request(request.url))
        if script:
            page.add_init_script(script)
        tab = Tab(page, self.site)
        tab.load()
        return tab

    def note(self, kind: str, text: str) -> None:
        """Keep what the console shows, but for statuses, which a test asks for."""
        if kind in ("error", "warning") and not _STATUS.match(text):
            self.complaints.append(f"console: {text}")

    def note_request(self, url: str) -> None:
        """Keep a request that is not for the page's own server."""
        if not url.startswith((self.site.url, "data:image/svg+xml,", "blob:" + self.site.url)):
            self.complaints.append(f"request: {url}")

    def check(self) -> None:
        """Fail where a script failed, the policy was broken, or anything went to another server."""
        assert not self.complaints, "\n".join(self.complaints)

    def close(self) -> None:
        """Close all tabs and forget the profile."""
        if self.context is not None:
            self.context.close()


class Tab:
    """A tab with the page.

    Attributes:
        page: the tab as playwright knows it.
    """

    def __init__(self, page: Page, site: Site) -> None:
        self.page = page
        self.site = site

    def load(self) -> None:
        """Open the page, or load it again."""
        self.page.goto(self.site.url)
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def send(self, text: str) -> None:
        """Type a message and press Enter."""
        self.page.locator("#prompt").fill(text)
        self.page.locator("#prompt").press("Enter")

    def ask(self, text: str, *answer: Any) -> None:
        """Send a message and wait for the end of its answer."""
        if answer:
            self.site.answers.append(list(answer))
        count = self.page.locator(".from-assistant").count()
        self.send(text)
        self.page.locator(".from-assistant[aria-busy=false]").nth(count).wait_for()

    def see(self, text: str) -> Locator:
        """Wait until a text is seen; return its element."""
        found = self.page.get_by_text(text).filter(visible=True).first
        found.wait_for()
        return found

    def click(self, name: str, within: str = "body") -> None:
        """Click the last visible button of that name."""
        self.page.locator(within).get_by_role("button", name=name, exact=True).filter(visible=True).last.click()

    def texts(self) -> list[str]:
        """Return the texts of the messages."""
        return self.page.locator(".message .text").all_inner_texts()

    def titles(self) -> list[str]:
        """Return the titles in the list."""
        return self.page.locator("#list button").all_inner_texts()

    def until(self, expression: str, arg: Any = None) -> None:
        """Wait until an expression of JavaScript is true; playwright's own way to wait breaks the page's policy."""
        deadline_s = time.monotonic() + WAIT_MS / 1000
        while not self.page.evaluate(expression, arg):
            assert time.monotonic() < deadline_s, f"never true: {expression} {arg or ''}"
            self.page.wait_for_timeout(10)

    def wait_titles(self, *titles: str) -> None:
        """Wait until the list has exactly these titles."""
        shown = "[...document.querySelectorAll('#list button')].map(each => each.innerText)"
        self.until(f"titles => JSON.stringify({shown}) === JSON.stringify(titles)", list(titles))

    def violations(self, *rules: str) -> list[str]:
        """Return what axe-core finds wrong with the page as it is shown now, by some of its rules or by all."""
        found = Axe().run(self.page, options={"runOnly": list(rules)} if rules else None).response["violations"]
        return [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]

    def scrolls_sideways(self) -> bool:
        """Whether the page, or the conversation in it, is wider than what is seen."""
        return bool(
            self.page.evaluate(
                "[document.documentElement, document.getElementById('scroll')].some(e => e.scrollWidth > e.clientWidth)"
            )
        )
