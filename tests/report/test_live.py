"""The page of a run that is going: served to this machine only, at an address with a token; it follows the run and keeps its place."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from helpers.report_sources import make_dictionary, make_record
from playwright.sync_api import expect, sync_playwright

from trl_sae_audit import AuditError
from trl_sae_audit.report import write_report
from trl_sae_audit.report.live import LiveServer


def fetch(address: str, **headers: str) -> tuple[int, str]:
    try:
        with urlopen(Request(address, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def test_only_the_address_with_the_token_shows_the_page() -> None:
    with LiveServer() as server, LiveServer() as other:
        assert fetch(server.address)[1].count("No figures yet") == 2
        server.show("a page ü".encode(), 7)
        assert fetch(server.address) == (200, "a page ü")
        assert fetch(server.address + "version") == (200, "7")
        root = f"http://127.0.0.1:{server.port}/"
        token = server.address.removeprefix(root)
        assert other.address.split("/")[3] != token.strip("/")
        for wrong in (root, root + "x" * len(token) + "/", root + "version", server.address[:-2] + "/",
                      server.address + "../", server.address + "manifest.json", root + "%C3%BC/"):  # fmt: skip
            assert fetch(wrong) == (404, "Not found."), wrong
        assert fetch(server.address, Host="evil.example") == (404, "Not found.")
        assert fetch(server.address, Host=f"localhost:{server.port}")[0] == 200
        with socket.socket() as listener, pytest.raises(OSError, match="refused"):
            listener.connect((socket.gethostbyname("127.0.0.2"), server.port))  # the loopback address alone
        with pytest.raises(AuditError, match="choose another --port"):
            LiveServer(server.port)


def test_the_last_page_waits_for_who_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    with LiveServer() as server:
        waited: list[float] = []
        monkeypatch.setattr("trl_sae_audit.report.live.time.sleep", waited.append)
        server.show(b"last", 1)
        server.wait_for_reader(5.0)
        assert waited == [], "nobody looks"
        fetch(server.address)
        server.show(b"last", 2)
        monkeypatch.setattr(
            "trl_sae_audit.report.live.time.sleep", lambda _: waited.append(fetch(server.address)[0])
        )
        server.wait_for_reader(60.0)
        assert waited == [200]


@pytest.mark.browser
def test_an_open_page_follows_the_run_and_keeps_its_place(tmp_path: Path, chromium: str) -> None:
    directory = make_record(tmp_path / "run", make_dictionary(200), status="running")

    def page_of(version: int) -> bytes:
        path = write_report(directory, title=f"Version {version}", reload_seconds=0.2, version=version)
        return path.read_bytes()

    with LiveServer() as server, sync_playwright() as playwright:
        server.show(page_of(1), 1)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        troubles: list[str] = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(server.address)
        page.click("#theme")
        theme = page.evaluate("document.documentElement.dataset.theme")
        page.locator("details.help summary").first.click()
        page.fill("#search", "1")
        page.click('#table button[data-sort="share"]')
        page.evaluate("scrollTo(0, 1500)")
        place = page.evaluate("scrollY")
        page.wait_for_timeout(500)
        assert page.inner_text("h1") == "Version 1"
        server.show(page_of(2), 2)
        expect(page.locator("h1")).to_have_text("Version 2")
        page.wait_for_timeout(100)
        assert abs(page.evaluate("scrollY") - place) < 2
        assert page.input_value("#search") == "1"
        assert page.get_attribute('#table th:has(button[data-sort="share"])', "aria-sort") == "descending"
        assert page.locator("details.help").first.get_attribute("open") is not None
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        page.locator("table.head a.open").first.click()
        server.show(page_of(3), 3)
        page.wait_for_timeout(500)
        assert page.inner_text("h1") == "Version 2", "not under a card that someone reads"
        page.keyboard.press("Escape")
        expect(page.locator("h1")).to_have_text("Version 3")
        browser.close()
    assert troubles == []
