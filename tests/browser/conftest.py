"""A browser, a real service with the bundled model, and the looks at every state of the page.

Without Playwright or Chromium all of these tests skip themselves. ``PAGE_SCREENSHOTS=DIR``
keeps a picture of each state, in light and dark, for a desktop and a phone.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from tests.service.conftest import wait_until
from tests.service.processes import FLUXD, ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
AXE = importlib.util.find_spec("axe_playwright_python")
DESKTOP = {"width": 1360, "height": 860}
PHONE = {"width": 390, "height": 844}
# How long the page may take on a machine that is busy with other work, in milliseconds.
PATIENCE_MS = 120_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this directory, and say why they are skipped."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.timeout(300))
            if not HAS_PLAYWRIGHT:
                item.add_marker(pytest.mark.skip(reason="playwright is not installed"))
            elif CHROMIUM is None:
                item.add_marker(pytest.mark.skip(reason="there is no Chromium on PATH"))


class Service:
    """A service of its own: its address stays the same when it is started again."""

    def __init__(self, **settings: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._settings = settings
        self._process: ServerProcess | None = None

    def start(self) -> None:
        """Begin to listen; the model is loaded meanwhile."""
        variables = {f"FLUXD_{name.upper()}": value for name, value in self._settings.items()}
        self._process = ServerProcess(
            *FLUXD, "serve", "--port", str(self.port), "--device", "cpu", **variables
        )
        self._process.url()

    def wait_until_ready(self) -> None:
        """Return once it draws."""
        wait_until(lambda: httpx2.get(f"{self.url}ready").status_code == 200)

    def stop(self, *, kill: bool = False) -> None:
        """End it, in order or at once."""
        if self._process is not None:
            self._process.signal(signal.SIGKILL if kill else signal.SIGTERM)
            self._process.status()
            self._process.__exit__()
        self._process = None


@contextmanager
def running(**settings: str) -> Iterator[Service]:
    """A service that is ready, and its end."""
    service = Service(**{"shutdown_grace_s": "0", "warm_up_sizes": "[]", **settings})
    service.start()
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.stop(kill=True)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that keeps jobs, as it is without settings."""
    with running(data_dir=str(tmp_path_factory.mktemp("data"))) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests of a module; beyond it, its loop would be in the way of others."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox wants rights that containers do not give.
        made = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield made
        made.close()


class Visit:
    """One person's browser: what is kept in it, and the windows they open."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self._context = context
        self.url = url
        self.complaints: list[str] = []

    def open(self) -> Page:
        """Open the page, and remember what the browser complains of."""
        page = self._context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._hear)
        page.goto(self.url)
        return page

    def _hear(self, message: Any) -> None:
        # What the service refuses, and that it is away, is told in the console, too.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Any]:
    """Visit a service as someone who was never there."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE_MS)
    with ExitStack() as stack:
        visits: list[Visit] = []

        def begin(url: str, size: Mapping[str, int] = DESKTOP, **options: Any) -> Visit:
            context = stack.enter_context(
                browser.new_context(viewport=dict(size), reduced_motion="reduce", **options)
            )
            visits.append(Visit(context, url))
            return visits[-1]

        yield begin
        assert [complaint for visit in visits for complaint in visit.complaints] == []


def look(page: Page, state: str) -> None:
    """Check a state for barriers, in light and dark, and keep its pictures if wanted."""
    directory = os.environ.get("PAGE_SCREENSHOTS")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        if directory:
            _shoot(page, Path(directory), state, scheme)
        if AXE is not None:
            # What depends on the colours is all that differs between the two.
            only = "" if scheme == "light" else "runOnly: ['color-contrast'],"
            assert barriers(page, only) == [], f"{state}, {scheme}"
    page.emulate_media(color_scheme="light", reduced_motion="reduce")


def _shoot(page: Page, directory: Path, state: str, scheme: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for device, size in (("phone", PHONE), ("desktop", DESKTOP)):
        page.set_viewport_size(size)
        page.wait_for_timeout(150)
        page.screenshot(path=directory / f"{state}-{device}-{scheme}.png")


def barriers(page: Page, options: str = "") -> list[str]:
    """What axe finds: everything of WCAG 2.2 A and AA, and its best practices."""
    if not page.evaluate("'axe' in window"):
        assert AXE is not None and AXE.submodule_search_locations
        (package,) = AXE.submodule_search_locations
        page.evaluate((Path(package) / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate(f"axe.run({{{options} resultTypes: ['violations']}})")
    return [
        f"{violation['id']}: {violation['help']}: {node['html']} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
