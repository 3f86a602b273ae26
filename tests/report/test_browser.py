"""The report in a real browser: sort, search, open a card, copy a flag; on a desktop and on a phone, light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from helpers.report_sources import HOSTILE, make_dictionary, make_evidence, make_record
from playwright.sync_api import expect, sync_playwright

from trl_sae_audit import Flag, FlagSet, RunRecord
from trl_sae_audit.audit.evidence_files import write_evidence
from trl_sae_audit.outcomes import Outcome, write_outcomes
from trl_sae_audit.report import write_report

pytestmark = pytest.mark.browser

NAME = 'tiny: "#1"\u202e'
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dictionary = make_dictionary(features=200, name=NAME)
    directory = make_record(tmp_path_factory.mktemp("browser") / "plain", dictionary)
    hostile = HOSTILE + "<img src=x onerror=\"document.title='owned'\">"
    write_evidence(directory, [make_evidence(dictionary), make_evidence(dictionary, 5, hostile)])
    write_outcomes(directory, [Outcome("m", 0.5, 0.4, 0.6, 10, HOSTILE, unit="share")])
    return directory


@pytest.fixture(scope="module")
def page_path(record: Path) -> Path:
    other = make_record(record.parent / "filtered", make_dictionary(200, NAME), seed=1, strength=0.2)
    return write_report([record, other], record.parent / "page.html")


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser, page_path: Path) -> Iterator:
    """Opens the page; at the end fails if the console had an error or anything was asked of the network."""
    contexts, troubles = [], []

    def open_page(viewport: dict[str, int] = DESKTOP, scheme: str = "light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: troubles.append(request.url) if "page.html" not in request.url
                and not request.url.startswith("data:") else None)  # fmt: skip
        page.goto(page_path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def first_cells(page, column: int = 0) -> list[str]:
    return page.locator(f"#table tbody tr > :nth-child({column + 1})").all_inner_texts()


def test_sorting_by_mouse_and_keyboard(open_page, record: Path) -> None:
    page = open_page()
    features = RunRecord.load(record).features()
    for place, column in enumerate(("feature", "label")):
        assert first_cells(page, place)[:3] == list(features[column].head(3).astype(str))
    page.click('#table button[data-sort="share"]')
    assert page.get_attribute('#table th:has(button[data-sort="share"])', "aria-sort") == "descending"
    by_share = features.sort_values("share", ascending=False)["feature"].astype(str)
    assert [cell.split()[0] for cell in first_cells(page)[:5]] == list(by_share[:5])
    page.keyboard.press("Enter")  # the focus stays on the heading
    assert page.get_attribute('#table th:has(button[data-sort="share"])', "aria-sort") == "ascending"
    assert first_cells(page)[0].split()[0] == by_share.iloc[-1]
    assert page.locator("#table th[aria-sort]").count() == 1
    page.click('#table button[data-sort="feature"]')
    assert [cell.split()[0] for cell in first_cells(page)[:4]] == ["0", "1", "2", "3"]
    page.click("#later")
    assert first_cells(page)[0] == "25"
    assert page.inner_text("#page") == "2 of 8"


def test_searching(open_page) -> None:
    page = open_page()
    page.fill("#search", "flatt")
    expect(page.locator("#table tbody tr")).to_have_count(1)
    assert [first_cells(page), first_cells(page, 1)] == [["3"], ["flattery"]]
    assert page.inner_text("#found").startswith("1 of 200 features")
    page.fill("#search", "19")
    expect(page.locator("#table tbody tr")).to_have_count(11)
    page.fill("#search", "correct")  # a word that the direction raises
    expect(page.locator("#table tbody tr")).to_have_count(2)
    page.fill("#search", "no such thing")
    expect(page.locator("#table tbody tr")).to_have_count(0)
    page.fill("#search", "")
    page.check("#clear-only")
    expect(page.locator("#found")).not_to_have_text(re.compile("^200 of"))
    assert all(float(q.replace("<", "")) < 0.05 for q in first_cells(page, 4))


def test_a_card_opens_and_its_flag_is_a_flag(open_page, record: Path) -> None:
    page = open_page()
    page.locator("table.head a.open").first.focus()
    page.keyboard.press("Enter")
    assert page.inner_text("#card-h") == "flattery feature 3"
    assert page.evaluate("location.hash") == "#feature-0-3"
    page.locator("#card summary", has_text="More contexts").click()
    assert page.locator("#card .contexts li").count() == 2
    assert page.locator("#card mark").first.inner_text() == "you are right"
    assert "I say you are right so" in page.locator("#card .contexts li").first.inner_text()
    page.fill('#card [data-field="label"]', 'says: "yes" # always')
    page.fill('#card [data-field="reason"]', "it's\u2028wrong — 好")
    page.click("#copy")
    page.get_by_text("Copied.").wait_for()
    entry = page.evaluate("navigator.clipboard.readText()")
    path = record.parent / "flags.yaml"
    path.write_text("version: 1\nflags:\n" + entry, encoding="utf-8")
    described = RunRecord.load(record).dictionaries[0]
    assert list(FlagSet.load(path)) == [
        Flag(NAME, 3, 'says: "yes" # always', "it's\u2028wrong — 好", 1.0, "up", described["identity"])
    ]
    page.keyboard.press("Escape")
    assert not page.locator("#card").is_visible()
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#feature-0-3"
    assert page.evaluate("location.hash") == ""
    page.evaluate("location.hash = '#feature-0-5'")
    expect(page.locator("#card-h")).to_have_text("Feature 5")


def test_hostile_text_does_nothing(open_page) -> None:
    page = open_page()
    page.locator('table.head a[href="#feature-0-5"]').first.click()
    page.wait_for_timeout(100)
    assert "owned" not in page.title()
    assert page.locator("#card img, #card script").count() == 0
    assert "<script>" in page.inner_text("#card-body")


def test_the_map_can_be_walked_by_keyboard(open_page) -> None:
    page = open_page()
    page.focus(".map-picture")
    start = page.inner_text(".readout")
    assert re.match(r"Group A, feature \d+.*, step 1: [+−].* a step", start)
    page.keyboard.press("ArrowRight")
    assert ", step 2: " in page.inner_text(".readout")
    page.keyboard.press("ArrowDown")
    feature = re.search(r"feature (\d+)", page.inner_text(".readout"))
    assert feature is not None
    page.keyboard.press("Enter")
    assert feature[1] in page.inner_text("#card-h")
    page.keyboard.press("Escape")
    box = page.locator(".map-picture").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 2)
    assert re.match(r"Group A, .* step 48: ", page.inner_text(".readout"))


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_follows_the_theme(open_page, viewport: dict[str, int], scheme: str) -> None:
    page = open_page(viewport, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for table in ("head", "dots"):
        cut = f"[...document.querySelectorAll('table.{table}')].filter(({{parentElement: e}}) => e.scrollWidth > e.clientWidth).length"
        assert page.evaluate(cut) == 0, f"a table of class {table} is cut at its right"
    if viewport is PHONE:
        wraps = "[...document.querySelectorAll('.front th a')].every((each) => getComputedStyle(each).whiteSpace === 'normal')"
        assert page.evaluate(wraps)
        whole = "[...document.querySelectorAll('table.dots td.nowrap')].every((each) => getComputedStyle(each).whiteSpace === 'nowrap')"
        assert page.evaluate(whole)
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    assert (sum(map(int, re.findall(r"\d+", before))) < 200) == (scheme == "dark")
    page.click("#theme")
    assert page.evaluate(background) != before
    page.locator("table.head a.open").first.click()
    box = page.locator("#card").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= viewport["width"]


def test_print_has_its_marks_in_light_colours_and_no_long_lists(open_page) -> None:
    page = open_page(DESKTOP, "dark")
    page.click("#theme")  # light by choice
    page.click("#theme")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    is_open = "all => [...new Set(all.map((each) => each.open))]"
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    assert (
        page.locator("main .mark").first.evaluate("mark => getComputedStyle(mark).printColorAdjust")
        == "exact"
    )
    assert page.locator("main details.help").evaluate_all(is_open) == [True]
    assert page.locator("main details.more").evaluate_all(is_open) == [False]
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert page.evaluate(background) == dark
    assert page.locator("main details.help").evaluate_all(is_open) == [False]


def test_heads_say_what_their_columns_are_and_sort_by_them(open_page) -> None:
    page = open_page()
    head = page.locator('table.head th[data-tip="lift"] button').first
    head.focus()
    assert "1 is chance" in page.inner_text("#tip")
    assert "1 is chance" in page.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-describedby')).textContent"
    )
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()

    def lifts() -> list[float]:
        table = page.locator("table.head").first
        column = page.locator('table.head th[data-tip="lift"]').first.evaluate("head => head.cellIndex")
        return [float(text) for text in table.locator(f"tbody tr > :nth-child({column + 1})").all_inner_texts()]  # fmt: skip

    page.keyboard.press("Enter")
    assert lifts() == sorted(lifts(), reverse=True)
    assert page.locator('table.head th[data-tip="lift"]').first.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Enter")
    assert lifts() == sorted(lifts())


def test_the_contents_stay_and_fold(open_page) -> None:
    page = open_page()
    page.locator("#about").scroll_into_view_if_needed()
    assert abs(page.locator("#toc").bounding_box()["y"]) < 1
    links = page.locator("#toc a").evaluate_all("links => links.map((link) => link.hash)")
    assert [link.removeprefix("#") for link in links] == page.locator("main > section").evaluate_all(
        "sections => sections.map((section) => section.id)"
    )
    page = open_page(PHONE)
    assert not page.locator("#toc ol").is_visible()
    page.locator("#toc summary").click()
    page.locator('#toc a[href="#about"]').click()
    assert not page.locator("#toc ol").is_visible()
    assert page.locator("#about").bounding_box()["y"] < PHONE["height"]
    assert abs(page.locator("#toc").bounding_box()["y"]) < 1


@pytest.mark.parametrize(("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_axe_finds_nothing(browser, page_path: Path, viewport: dict[str, int], scheme: str) -> None:
    """Deque's axe, with everything unfolded, and with a card open."""
    context = browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(page_path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    found = [Axe().run(page)]
    page.locator("table.head a.open").first.click()
    found.append(Axe().run(page))
    context.close()
    assert all(len(each.response["passes"]) > 25 for each in found)
    assert [each.generate_report() for each in found if each.violations_count] == []


def test_colours_can_be_read() -> None:
    """WCAG 2.2: text 4.5 to 1, marks 3 to 1, on every background they stand on, light and dark."""
    style = Path(__file__).parents[2] / "trl_sae_audit" / "report" / "templates" / "report.css"
    blocks = re.findall(r":root[^{]*\{ color-scheme: (light|dark);([^}]*)\}", style.read_text())
    assert [name for name, _ in blocks] == ["light", "dark", "dark"]
    assert blocks[1][1].split() == blocks[2][1].split()
    for _, block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for name, least in {"ink": 7, "dim": 4.5, "up": 4.5, "down": 4.5, "accent": 4.5, "act": 4.5, "before": 3,
                            **{f"r{run}": 3 for run in range(6)}}.items():  # fmt: skip
            for background in ("page", "card"):
                assert contrast(colours[name], colours[background]) >= least, (name, background)
        assert contrast(colours["ink"], colours["warn"]) >= 7


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
