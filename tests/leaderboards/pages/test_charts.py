"""Charts of the page: every point carries its own words, and what is drawn is what the table says."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

from leaderboards.pages.charts import Chart, charts, methods_of
from leaderboards.pages.page import to_html
from leaderboards.pages.svg import INKS, SVG
from leaderboards.stats.aggregate import Table, aggregate
from tests.leaderboards.pages.test_page import section
from tests.leaderboards.stats.test_pareto import timed
from tests.pretend import cell

FLAT = [0.01] * 12
RECORDS = [
    *timed("fullkv", "full", [0.9] * 12, [0.04] * 12, 400),
    *timed("good", "64", [0.6] * 12, [0.02] * 12, 100),
    *timed("good", "128", [0.7] * 12, [0.03] * 12, 200),
    *timed("bad", "64", [0.5] * 12, FLAT, 100),
]


def drawn(table: Table) -> list[Chart]:
    found = charts(table, salt="a")
    assert found is not None
    return list(found.charts)


def points(svg: str, series: int) -> list[tuple[float, float, str]]:
    """(x, y, words) of each marker of a series, in user units, y downward."""
    found = []
    for group in ET.fromstring(svg).iter(f"{{{SVG}}}g"):
        if group.get("data-s") == str(series):
            for point in group.iter(f"{{{SVG}}}g"):
                use = point.find(f"{{{SVG}}}use")
                if point.get("class") == "point" and use is not None:
                    found.append(
                        (float(use.attrib["x"]), float(use.attrib["y"]), point.findtext(f"{{{SVG}}}title", ""))
                    )
    return found


def test_points_carry_their_own_words() -> None:
    table = aggregate(RECORDS)[0]
    assert methods_of(table) == ["bad", "good"]
    svg = drawn(table)[0].svg
    (x64, y64, small), (x128, y128, large) = points(svg, 1)
    assert small == "good at 64: score 60.0 (60.0 to 60.0), KV 25.0 %, TPOT 20.00 ms"
    assert large.startswith("good at 128: score 70.0")
    assert x64 < x128 and y64 > y128
    ((x, y, bad),) = points(svg, 0)
    assert bad.startswith("bad at 64") and x == x64 and y > y64


def test_time_per_token_is_drawn_where_it_was_measured() -> None:
    found = drawn(aggregate(RECORDS)[0])
    assert [chart.title for chart in found][2:] == ["Score against time per token"]
    assert ("good", "64", "20.00", "60.0", "60.0", "60.0") in found[2].values.rows
    assert points(found[2].svg, 0)[0][0] < points(found[2].svg, 1)[0][0]
    html = to_html(aggregate(RECORDS), RECORDS, title="x")
    assert "<button type=button>TPOT ms</button>" in html
    unmeasured = [r.model_copy(update={"measured": None}) for r in RECORDS]
    assert len(drawn(aggregate(unmeasured)[0])) == 2


def test_a_measured_uncompressed_cache_alone_draws() -> None:
    records = [r if r.budget == "full" else r.model_copy(update={"measured": None}) for r in RECORDS]
    assert points(drawn(aggregate(records)[0])[2].svg, 0) == []


def test_a_chart_has_a_name_a_description_and_no_inline_style() -> None:
    for chart in drawn(aggregate(RECORDS)[0]):
        root = ET.fromstring(chart.svg)
        ids = [root.get("aria-labelledby"), root.get("aria-describedby")]
        assert root.get("role") == "img" and [child.get("id") for child in root[:2]] == ids
        assert root[0].text == chart.title and root[1].text == chart.about
        assert not any("style" in element.attrib or element.tag.endswith("style") for element in root.iter())
        assert len(chart.values.rows) == 4


def test_colours_can_be_changed_by_a_dark_page() -> None:
    svg = drawn(aggregate(RECORDS)[0])[0].svg
    painted = set(re.findall(r'(?:fill|stroke)="(#\w+)"', svg))
    assert painted and painted <= set(INKS)


@pytest.mark.parametrize("name", ["$\\frac{1$", "<b>x</b>", "a_b^c"])
def test_odd_names_are_plain_text(name: str) -> None:
    table = aggregate([*cell(name, name, [0.5] * 12), *cell("h2o", name, [0.4] * 12)])[0]
    chart = drawn(table)[1]
    assert name in [e.text for e in ET.fromstring(chart.svg).iter(f"{{{SVG}}}text")]
    assert "<b>" not in chart.svg + section("charts", charts(table, salt="a"))
