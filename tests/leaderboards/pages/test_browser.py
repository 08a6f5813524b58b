"""The page in a real headless Chromium, driven by Playwright; skipped where either is missing."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leaderboards.pages.heats import TableMap
from leaderboards.pages.page import Extras, write_page
from leaderboards.stats.aggregate import aggregate
from tests.leaderboards.pages.test_page import EVIL, crossed, planted, pretend, run
from tests.leaderboards.tables.test_boundary import MANIFEST, searches

api = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium; apt install chromium")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain page of two settings with a memory search and a table, and one with markup planted everywhere."""
    folder, limits = tmp_path_factory.mktemp("pages"), [(MANIFEST, searches())]
    records, runs = [*pretend(n=21), *pretend(n=21, query="agnostic")], [run(git_commit="abc123")]
    extras = Extras(limits, [TableMap("tables", "64", [[0.5, 1.5], [2.0, 0.0]])])
    plain = write_page(aggregate(records, manifests=runs), records, folder, "plain", manifests=runs, extras=extras)
    records, runs = planted()
    extras = Extras(limits, [TableMap(EVIL, EVIL, [[1.0]])], [EVIL])
    evil = write_page(aggregate(records, manifests=runs), records, folder, "evil", manifests=runs, extras=extras)
    records = pretend(first_token="prefill") + crossed(pretend(model="other", accelerator="EPYC"))
    tables = aggregate(records)
    for table in tables:
        table.rows["memory"] = ["simulated" if method == "h2o" else "physical" for method in table.rows["method"]]
    return {"plain": plain, "evil": evil, "various": write_page(tables, records, folder, "various", manifests=())}


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """A function that opens a page; at the end nothing was logged, thrown, asked for or popped up."""
    trouble: list[str] = []
    contexts = []

    def visit(name: str = "plain", **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: trouble.append(r.url) if not r.is_navigation_request() else None)
        page.goto(pages[name].as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert trouble == []


def visible(page: Any) -> list[str]:
    return [text.strip() for text in page.locator("#ranking tbody tr:visible th b").all_inner_texts()]


def head(page: Any, name: str) -> Any:
    return page.locator("#ranking thead th", has_text=name)


def style(where: Any, name: str) -> str:
    """A computed style of a locator's one element."""
    return str(where.evaluate(f"e => getComputedStyle(e).{name}"))


def browse(page: Any) -> None:
    """To the samples, which are filled in when a reader comes near."""
    page.locator("#browser").scroll_into_view_if_needed()
    page.locator("#pick").wait_for()


def test_a_header_sorts_by_mouse_and_by_keyboard(opened: Any) -> None:
    page = opened()
    score = head(page, "Score")
    score.locator("button").click()
    assert score.get_attribute("aria-sort") == "descending" and visible(page)[:2] == ["fullkv", "fullkv"]
    score.locator("button").focus()
    page.keyboard.press("Enter")
    assert score.get_attribute("aria-sort") == "ascending" and visible(page)[0] == "h2o"
    assert "by Score, ascending" in page.locator("#status").inner_text()


def test_filters_narrow_the_table(opened: Any) -> None:
    page = opened()
    assert len(visible(page)) == 10
    page.select_option("#f-budget", "64")
    page.select_option("#f-query", "agnostic")
    assert sorted(visible(page)) == ["h2o", "snapkv"]
    page.fill("#f-method", "SNAP")
    assert visible(page) == ["snapkv"] and "1 of 10 rows" in page.locator("#status").inner_text()


def test_a_task_shows_its_own_mean_and_hides_what_is_of_all_tasks(opened: Any) -> None:
    page = opened()
    page.select_option("#f-task", "niah/passkey")
    cell = page.locator('tr[data-method="snapkv"] .score').first
    assert cell.inner_text().strip() == "75.0" and not page.locator("#ranking td.agg").first.is_visible()
    head(page, "Score").locator("button").click()
    page.select_option("#f-task", "niah/kamradt")
    values = [float(text) for text in page.locator("#ranking .one").all_inner_texts()]
    assert values == sorted(values, reverse=True)
    page.select_option("#f-task", "")
    assert "±" in cell.inner_text()


def test_provenance_is_one_click_away_and_closes_by_escape(opened: Any) -> None:
    page = opened()
    made, links = page.locator("#made"), page.locator("#ranking tbody a")
    links.nth(1).click()
    assert made.is_visible() and "abc123" in made.inner_text() and made.evaluate("e => e.scrollTop") == 0
    page.keyboard.press("Escape")
    assert not made.is_visible()
    links.first.click()
    page.locator("#close").click()
    assert not made.is_visible()


def test_every_axis_is_a_filter_that_hides_the_rest_of_its_tables(opened: Any) -> None:
    page = opened("various")
    of_tables = page.locator("#charts .of:visible")
    assert (len(visible(page)), of_tables.count()) == (10, 2)
    for name, value in (("model", "other"), ("processor", "EPYC"), ("first_token", "prefill")):
        page.select_option(f"#f-{name}", value)
        assert (len(visible(page)), of_tables.count()) == (5, 1)
        page.select_option(f"#f-{name}", "")
    page.select_option("#f-memory", "simulated")
    assert visible(page) == ["h2o"] * 4
    page.select_option("#f-budget", "128")
    assert len(visible(page)) == 2
    assert page.locator(".verdicts li:visible .budget").all_inner_texts() == ["Budget 128"] * 2


def test_a_chosen_task_puts_its_best_first_in_each_budget(opened: Any) -> None:
    page = opened("various")
    page.select_option("#f-model", "other")
    written = ["fullkv", "snapkv", "h2o", "snapkv", "h2o"]
    assert visible(page) == written
    page.select_option("#f-task", "niah/kamradt")
    assert visible(page) == ["fullkv", "h2o", "snapkv", "h2o", "snapkv"]
    page.select_option("#f-task", "")
    assert visible(page) == written


def test_columns_that_few_ask_for_are_shown_on_request(opened: Any) -> None:
    page = opened()
    kept = head(page, "KV MiB")
    assert not kept.is_visible() and head(page, "Rank").is_visible()
    page.check("#f-more")
    assert kept.is_visible()
    column = kept.evaluate("e => e.cellIndex")
    assert page.locator("#ranking tbody tr").first.locator("th, td").nth(column).is_visible()


def test_hover_shows_a_points_values(opened: Any) -> None:
    page = opened()
    point = page.locator("svg.chart .point").first
    point.scroll_into_view_if_needed()
    words, box = point.get_attribute("data-say"), point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 6, box["y"] + box["height"] / 2)
    assert "score" in words and words in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    assert page.locator(".charts svg title").count() == 0  # no second tooltip of the browser's own


def test_the_keyboard_reads_the_points_from_left_to_right(opened: Any) -> None:
    page = opened()
    page.keyboard.press("Tab")
    chart = page.locator("svg.chart").nth(1)
    chart.evaluate("e => e.focus()")
    said = []
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        said.append(page.locator("#tip").inner_text().partition(":")[0])
    assert said == ["h2o at 64", "snapkv at 64", "h2o at 128", "snapkv at 128", "snapkv at 128", "h2o at 128"]
    assert "h2o at 128" in page.locator(".readout").nth(1).inner_text()
    assert chart.get_attribute("aria-label") == "Score by budget"
    page.keyboard.press("Tab")
    assert not page.locator("#tip").is_visible()


def test_the_needle_map_has_a_square_per_layer_and_head(opened: Any) -> None:
    page = opened()
    browse(page)
    kept = page.locator("#shown svg.kept").nth(1)
    squares = kept.locator("rect")
    assert squares.count() == 2 and "all of it in 0 of 2, nothing in 0" in kept.get_attribute("aria-label")
    squares.nth(1).hover()
    assert page.locator("#tip").inner_text() == "layer 0, KV head 1: about 20 % of the needle"
    assert style(squares.nth(0), "fill") != style(squares.nth(1), "fill")


def test_limits_and_maps_are_drawn_in_the_pages_colours(opened: Any) -> None:
    page = opened(color_scheme="dark")
    assert style(page.locator("#frontier svg text").first, "fill") == style(page.locator("body"), "color")
    assert style(page.locator("#frontier svg .fill-bar").first, "fill") != "rgb(0, 0, 0)"
    boxes = page.locator("#maps td[class^=h]")
    assert boxes.all_inner_texts() == ["0.5", "2.0", "1.5", "0.0"]
    assert style(boxes.nth(1), "backgroundColor") != style(boxes.nth(3), "backgroundColor")
    assert style(page.locator("details[open] .heat td[class^=h]").first, "backgroundColor") != "rgba(0, 0, 0, 0)"


def test_a_key_picks_out_its_method(opened: Any) -> None:
    page = opened()
    key = page.locator(".key", has_text="h2o").first
    key.click()
    assert key.get_attribute("aria-pressed") == "true"
    faint = page.locator(".charts").first.locator("svg [data-s].faint")
    assert {faint.nth(i).get_attribute("data-s") for i in range(faint.count())} == {"1"}
    key.click()
    assert faint.count() == 0


def test_the_sample_browser_changes_with_its_choices(opened: Any) -> None:
    page = opened()
    browse(page)
    sample, cards = page.locator("#shown dl"), page.locator("#shown .answers li")
    assert "End of the prompt\nand what is the key of 0?" in sample.inner_text()
    assert cards.count() == 3 and "budget 64" in cards.nth(1).inner_text()
    page.select_option("#answers", "128")
    assert "budget 128" in cards.nth(1).inner_text() and "needle 37.5 % cached" in cards.nth(1).inner_text()
    before = sample.inner_text()
    page.select_option("#sample", "3")
    assert sample.inner_text() != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_button(opened: Any, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    axis = page.locator("svg.chart .stroke-ink").first
    ground, stroke = style(page.locator("body"), "backgroundColor"), style(axis, "stroke")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    page.locator("#theme").click()
    assert style(page.locator("body"), "backgroundColor") != ground and style(axis, "stroke") != stroke


def test_a_narrow_screen_needs_no_sideways_scrolling(opened: Any) -> None:
    page = opened(viewport={"width": 360, "height": 740}, reduced_motion="reduce")
    assert page.locator("#ranking tbody .name").first.bounding_box()["width"] >= 96  # no column of single letters
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    size = "e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a"
    assert page.locator("svg.chart text").first.evaluate(size) >= 9
    score = page.locator("#ranking .score").first.bounding_box()
    assert score["x"] + score["width"] <= 360  # method, budget and score are there without scrolling
    assert style(page.locator("html"), "scrollBehavior") == "auto"  # as reduced motion asks for


def test_planted_markup_runs_nowhere(opened: Any) -> None:
    page = opened("evil", viewport={"width": 1280, "height": 900})
    page.locator("#ranking tbody a").first.click()
    page.keyboard.press("Escape")
    page.locator("#ranking thead button").first.click()
    browse(page)
    page.select_option("#sample", "1")
    page.locator("svg.chart").first.focus()
    page.keyboard.press("ArrowRight")
    page.select_option("#f-task", index=1)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit") is None
    assert page.locator("img, iframe, script:not([type]) ~ script").count() == 0
    assert page.locator("#shown").inner_text().count(EVIL) >= 5  # task, id, end of the prompt, reference, answers
    assert page.title().strip() != ""


def test_the_page_reads_without_its_script(opened: Any) -> None:
    page = opened(java_script_enabled=False)
    assert "is best" in page.locator(".verdicts").first.inner_text()
    assert not page.locator("#filters").is_visible() and len(visible(page)) == 10
