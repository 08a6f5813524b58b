"""Charts of the page: every point carries its own words, and what is drawn is what the table says."""

import re
from collections.abc import Sequence
from xml.etree import ElementTree as ET

import pytest

from harness.records.record import Record
from leaderboards.pages.charts import Chart, charts, methods_of
from leaderboards.pages.svg import INKS, SVG
from leaderboards.stats.aggregate import aggregate
from tests.leaderboards.pages.test_page import page, section
from tests.leaderboards.stats.test_pareto import timed
from tests.pretend import cell, only

RECORDS = [
    *timed("fullkv", "full", [0.9] * 12, [0.04] * 12, 400),
    *timed("good", "64", [0.6] * 12, [0.02] * 12, 100),
    *timed("good", "128", [0.7] * 12, [0.03] * 12, 200),
    *timed("bad", "64", [0.5] * 12, [0.01] * 12, 100),
]


def drawn(records: Sequence[Record]) -> list[Chart]:
    found = charts(only(records), salt="a")
    assert found is not None
    return list(found.charts)


def points(svg: str, series: int) -> list[tuple[float, float, str]]:
    """(x, y, words) of each marker of a series, in user units, y downward."""
    group = f"{{{SVG}}}g"
    lines = [line for line in ET.fromstring(svg).iter(group) if line.get("data-s") == str(series)]
    marked = [point for line in lines for point in line.iter(group) if point.get("class") == "point"]
    uses = [(point.find(f"{{{SVG}}}use"), point.findtext(f"{{{SVG}}}title", "")) for point in marked]
    return [(float(use.attrib["x"]), float(use.attrib["y"]), words) for use, words in uses if use is not None]


def test_points_carry_their_own_words() -> None:
    assert methods_of(aggregate(RECORDS)[0]) == ["bad", "good"]
    svg = drawn(RECORDS)[0].svg
    (x64, y64, small), (x128, y128, large) = points(svg, 1)
    assert small == "good at 64: score 60.0 (60.0 to 60.0), KV 25.0 %, TPOT 20.00 ms"
    assert large.startswith("good at 128: score 70.0")
    assert x64 < x128 and y64 > y128
    ((x, y, bad),) = points(svg, 0)
    assert bad.startswith("bad at 64") and x == x64 and y > y64
    painted = set(re.findall(r'(?:fill|stroke)="(#\w+)"', svg))
    assert painted and painted <= set(INKS)  # colours that a dark page can change


def test_time_per_token_is_drawn_where_it_was_measured() -> None:
    found = drawn(RECORDS)
    assert [chart.title for chart in found][2:] == ["Score against time per token"]
    assert ["good", "64", "20.00", "60.0", "60.0", "60.0"] in found[2].table.to_numpy().tolist()
    assert points(found[2].svg, 0)[0][0] < points(found[2].svg, 1)[0][0]
    assert "<button type=button>TPOT ms</button>" in page(RECORDS)
    unmeasured = [r.model_copy(update={"measured": None}) for r in RECORDS]
    assert len(drawn(unmeasured)) == 2
    full_alone = [*RECORDS[:12], *unmeasured[12:]]
    assert points(drawn(full_alone)[2].svg, 0) == []


def test_a_chart_has_a_name_a_description_and_no_inline_style() -> None:
    for chart in drawn(RECORDS):
        root = ET.fromstring(chart.svg)
        ids = [root.get("aria-labelledby"), root.get("aria-describedby")]
        assert root.get("role") == "img" and [child.get("id") for child in root[:2]] == ids
        assert root[0].text == chart.title and root[1].text == chart.about
        assert not any("style" in element.attrib or element.tag.endswith("style") for element in root.iter())
        assert len(chart.table) == 4


@pytest.mark.parametrize("name", ["$\\frac{1$", "<b>x</b>", "a_b^c"])
def test_odd_names_are_plain_text(name: str) -> None:
    records = [*cell(name, name, [0.5] * 12), *cell("h2o", name, [0.4] * 12)]
    chart = drawn(records)[1]
    assert name in [e.text for e in ET.fromstring(chart.svg).iter(f"{{{SVG}}}text")]
    assert "<b>" not in chart.svg + section("charts", charts(only(records), salt="a"))
