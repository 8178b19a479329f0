"""Visits of the page in the session's browser, which has a thread of its own.

Playwright's blocking API keeps an event loop running in its thread. In pytest's own thread that loop would be in the
way of every other test that runs one, so the tests of this folder run in the browser's thread.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.launchers.serve.page.site import Site
from tests.launchers.serve.page.visit import Browser, Visit


@pytest.fixture(scope="session")
def running_site() -> Iterator[Site]:
    """The server, started once."""
    with Site().running() as site:
        yield site


@pytest.fixture
def site(running_site: Site) -> Site:
    """The server with nothing set."""
    running_site.reset()
    return running_site


@pytest.fixture
def visit(browser: Browser, site: Site, browser_thread: ThreadPoolExecutor) -> Iterator[Visit]:
    """Somebody who opens the page, with a fresh profile of the browser."""
    visit = Visit(browser, site)
    yield visit
    browser_thread.submit(visit.close).result()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that visits the page in the browser's thread, then look at what the browser complained of."""
    thread = pyfuncitem.funcargs.get("browser_thread")
    visit = pyfuncitem.funcargs.get("visit")
    if not isinstance(thread, ThreadPoolExecutor) or not isinstance(visit, Visit):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in names}

    def run() -> None:
        pyfuncitem.obj(**arguments)
        visit.check()

    thread.submit(run).result()
    return True
