"""Sections of the page beside the ranking: charts, best by task, rivals, memory searches, compiled tables, needles."""

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from harness.boards.compiled_tables import table_maps_of
from harness.errors import HarnessError
from harness.records.boundary_folder import BoundaryStore
from harness.records.record import Record
from harness.records.spec import MethodSpec
from leaderboards.pages.charts import Chart, charts, methods_of
from leaderboards.pages.heats import TableMap, shaded_tables
from leaderboards.pages.page import Extras, to_html
from leaderboards.pages.parts import Search, best_by_task, boundary_pictures, find_searches, table_parts
from leaderboards.pages.ranking import memory
from leaderboards.pages.samples import kept_map
from leaderboards.pages.svg import INKS, SVG
from leaderboards.stats.aggregate import Table, aggregate
from leaderboards.tables.visible import TITLE
from methods.compilerkv.policy import folder_of
from methods.compilerkv.tables import load_tables
from tests.leaderboards.pages.test_page import page, pretend, section, words
from tests.leaderboards.stats.test_pareto import timed
from tests.leaderboards.tables.test_boundary import HOSTILE, MANIFEST, searches, stored
from tests.leaderboards.tables.test_boundary import record as search
from tests.pretend import cell, manifest, only, record

PACKAGED = "smollm2-135m"


def best(table: Table) -> str:
    return words(section("best", best_by_task(table)))


def boundaries(*searches: Search) -> str:
    return section("boundaries", boundary_pictures(searches))


def table_maps(*maps: TableMap) -> str:
    return section("table_maps", shaded_tables(maps))


def with_extras(extras: Extras) -> str:
    return to_html(aggregate(pretend()), pretend(), title="x", extras=extras)


def test_the_best_of_a_task_is_named_with_those_that_share_it() -> None:
    records = [r for r in pretend(("a", "b", "c")) if r.method != "b"]
    records += [r.model_copy(update={"method": "b"}) for r in records if r.method == "a"]
    text = best(only(records))
    assert "budget 64, 16.0 % of bytes" in text
    assert "niah/kamradt95.075.0 a and 1 more75.0 a and 1 more" in text  # fullkv alone: no name


def test_a_cell_over_its_bytes_is_not_the_best_of_a_task() -> None:
    text = best(only([r.model_copy(update={"over_budget": r.method == "snapkv"}) for r in pretend()]))
    assert "snapkv" not in text and "h2o" not in text  # the one left at each budget needs no name
    assert "95.055.055.0" in text
    assert best_by_task(only([record("snapkv", "64", "0", None)])) == {}


def test_rivals_are_shown_with_a_subject_alone() -> None:
    records = pretend(n=24)
    plain, told = only(records), only(records, subject="snapkv")
    assert table_parts(0, plain, records, several=False)["rivals"] == {}
    parts = table_parts(0, told, records, several=False)
    assert list(parts["rivals"]) == ["snapkv against the strongest other method of each family: score, 0-100"]
    smallest = [f"Smallest cache that keeps {floor} % of fullkv, in % of its bytes" for floor in (95, 99)]
    wanted = ["Score by task", TITLE, "Ranks and best others", *smallest, "Tail failures", "NIAH by depth"]
    assert list(parts["more"])[:7] == wanted
    html = to_html([told], records, title="x")
    assert html.count('id="rivals"') == 1 == html.count('href="#rivals"')


def test_memory_is_physical_unless_a_row_says_otherwise() -> None:
    records = pretend()
    tables = aggregate(records)
    rows = tables[0].rows
    assert memory({}) == "physical"
    assert 'id="f-memory"' not in to_html(tables, records, title="x")
    rows["memory"] = ["simulated" if method == "h2o" else "physical" for method in rows["method"]]
    html = to_html(tables, records, title="x")
    assert 'id="f-memory"' in html and html.count('data-memory="simulated"') == 2
    assert "<button type=button>Memory</button>" in html


def test_searches_are_found_beside_runs_and_drawn_with_their_values(tmp_path: Path) -> None:
    stored(tmp_path / "limit", searches())
    with BoundaryStore(tmp_path / "begun", MANIFEST):
        pass
    (tmp_path / "run").mkdir()
    (found,) = find_searches([tmp_path, tmp_path / "limit", tmp_path / "run"])
    assert found == (MANIFEST, searches())
    html = boundaries(found, found)
    ids = [part.split('"')[0] for part in html.split(' id="')[1:]]
    assert ids and len(ids) == len(set(ids))  # two folders share no id
    svg = ET.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    assert svg.get("role") == "img" and "largest context" in (svg[1].text or "")
    assert not any("style" in element.attrib for element in svg.iter())
    assert "<caption>Boundary under 512 MiB: tiny (float32, cpu)</caption>" in html
    assert 'id="frontier"' not in page(pretend())


def test_markup_in_a_search_or_a_table_stays_text() -> None:
    html = boundaries((MANIFEST, [search(HOSTILE, "64", 512)])) + table_maps(TableMap("<b>", "<i>", [[1.0]]))
    assert not {"<script", "<b>", "<i>"} & {html[i : i + 7].partition(" ")[0] for i in range(len(html))}
    assert "&lt;script&gt;" in html and "&lt;b&gt;" in html


def test_tables_are_shaded_by_their_largest_value() -> None:
    html = table_maps(TableMap("t", "64", [[1.0, 2.0], [0.0, 4.0]]), TableMap("t", "128", [[2.0, 2.0], [2.0, 2.0]]))
    assert html.count("<h3>") == 1 and "Shades from 0 to 4.0" in html
    assert '<td class="h10" title="layer 1, head 1">4.0</td>' in html
    assert '<td class="h0" title="layer 1, head 0">0.0</td>' in html and html.count('class="h5"') == 5


@pytest.mark.parametrize("values", [[[1.0], [1.0, 2.0]], [[float("nan")]], [[-1.0]], [], [1.0]])
def test_what_is_no_table_is_refused(values: list[list[float]]) -> None:
    with pytest.raises(HarnessError, match="is no matrix"):
        shaded_tables([TableMap("t", "64", values)])


def compiled(label: str, **params: str) -> MethodSpec:
    digest = load_tables(folder_of(PACKAGED)).manifest.tensors_sha256
    own = {"form": "compiled", "tables": PACKAGED, "budgets": "compiled", "tables_sha256": digest, **params}
    return MethodSpec(label=label, name="compilerkv", params=own)


def test_tables_of_the_runs_methods_are_brought_as_they_are() -> None:
    methods = (
        *(compiled("compilerkv"), compiled("compilerkv@window")),
        compiled("compilerkv@uniform", budgets="uniform"),
        compiled("compilerkv@paper", form="published"),
        MethodSpec(label="snapkv", name="snapkv"),
    )
    maps, remarks = table_maps_of([manifest(methods=methods), manifest(methods=methods[:1])])
    tables = load_tables(folder_of(PACKAGED))
    assert remarks == [] and [one.budget for one in maps] == [str(b) for b in tables.manifest.budgets]
    assert {one.name.partition(", ")[2] for one in maps} == {"slots of compilerkv, compilerkv@window"}
    assert maps[1].values == tables.budget[1].tolist()
    assert "Compiled tables" in with_extras(Extras(maps=maps))


@pytest.mark.parametrize("changed", [{"tables_sha256": "0" * 64}, {"tables": "no/such/tables"}])
def test_tables_that_are_not_here_are_a_remark(changed: dict[str, str]) -> None:
    maps, remarks = table_maps_of([manifest(methods=(compiled("a", **changed), compiled("b", **changed)))])
    assert maps == [] and len(remarks) == 1
    assert "of a, b are not on this machine" in remarks[0] and "no/such" not in remarks[0]
    assert remarks[0] in with_extras(Extras(remarks=remarks))


def test_a_kept_map_reaches_its_ends_only_with_none_or_all() -> None:
    one = record("h2o", "64", "0", 1.0, needle_tokens=40, needle_kept=((0, 1, 20), (39, 40, 4)))
    assert kept_map(one) == "015.9a1"


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
