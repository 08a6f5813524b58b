"""Sections of the page beside the ranking: best by task, rivals, memory searches, compiled tables, kept needles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from harness.boards.compiled_tables import table_maps_of
from harness.errors import HarnessError
from harness.records.boundary_folder import BoundaryStore
from harness.records.spec import MethodSpec
from leaderboards.pages.boundary import Search, boundary_pictures, find_searches
from leaderboards.pages.maps import TableMap, shaded_tables
from leaderboards.pages.page import Extras, to_html
from leaderboards.pages.parts import TableParts, best_by_task, table_parts
from leaderboards.pages.ranking import memory
from leaderboards.pages.samples import kept_map
from leaderboards.stats.aggregate import Table, aggregate
from methods.compilerkv.policy import folder_of
from methods.compilerkv.tables import load_tables
from tests.leaderboards.pages.test_page import pretend, section, words
from tests.leaderboards.tables.test_boundary import HOSTILE, MANIFEST, searches
from tests.leaderboards.tables.test_boundary import record as search
from tests.pretend import manifest, only, record


def best(table: Table) -> str:
    return words(section("best", best_by_task(table)))


def parts_of(table: Table) -> TableParts:
    return table_parts(0, table, pretend(), several=False)


def boundaries(searches: Sequence[Search]) -> str:
    return section("boundaries", boundary_pictures(searches))


def table_maps(maps: Sequence[TableMap]) -> str:
    return section("table_maps", shaded_tables(maps))


PACKAGED = "smollm2-135m"


def test_the_best_of_a_task_is_named_with_those_that_share_it() -> None:
    records = [r for r in pretend(("a", "b", "c")) if r.method != "b"]
    records += [r.model_copy(update={"method": "b"}) for r in records if r.method == "a"]
    text = best(only(records))
    assert "budget 64, 16.0 % of bytes" in text
    assert "niah/kamradt95.075.0 a and 1 more75.0 a and 1 more" in text  # fullkv alone: no name


def test_a_cell_over_its_bytes_is_not_the_best_of_a_task() -> None:
    records = [r.model_copy(update={"over_budget": True}) if r.method == "snapkv" else r for r in pretend()]
    text = best(only(records))
    assert "snapkv" not in text and "h2o" not in text  # the one left at each budget needs no name
    assert "95.055.055.0" in text
    assert best_by_task(only([record("snapkv", "64", "0", None)])) is None


def test_rivals_are_shown_with_a_subject_alone() -> None:
    records = pretend()
    assert parts_of(only(records)).rivals == []
    told = only(records, subject="snapkv")
    rivals, more = ([table.caption for table in tables] for tables in (parts_of(told).rivals, parts_of(told).more))
    assert rivals == ["snapkv against the strongest other method of each family: score, 0-100"]
    assert more == ["Score by task", "Ranks and best others", "Tail failures", "NIAH by depth", *more[4:]]
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
    with BoundaryStore(tmp_path / "limit", MANIFEST) as store:
        for one in searches():
            store.put(one)
    with BoundaryStore(tmp_path / "begun", MANIFEST):
        pass
    (tmp_path / "run").mkdir()
    ((told, records),) = find_searches([tmp_path, tmp_path / "limit", tmp_path / "run"])
    assert told == MANIFEST and records == searches()
    html = boundaries([(told, records)])
    svg = ET.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    assert svg.get("role") == "img" and "largest context" in (svg[1].text or "")
    assert not any("style" in element.attrib for element in svg.iter())
    assert "<caption>Boundary under 512 MiB: tiny (float32, cpu)</caption>" in html
    assert 'id="frontier"' not in to_html(aggregate(pretend()), pretend(), title="x")


def test_markup_in_a_search_or_a_table_stays_text() -> None:
    html = boundaries([(MANIFEST, [search(HOSTILE, "64", 512)])]) + table_maps([TableMap("<b>", "<i>", [[1.0]])])
    assert not {"<script", "<b>", "<i>"} & {html[i : i + 7].partition(" ")[0] for i in range(len(html))}
    assert "&lt;script&gt;" in html and "&lt;b&gt;" in html


def test_two_folders_of_searches_share_no_id() -> None:
    html = boundaries([(MANIFEST, searches()), (MANIFEST, searches())])
    ids = [part.split('"')[0] for part in html.split(' id="')[1:]]
    assert ids and len(ids) == len(set(ids))


def test_tables_are_shaded_by_their_largest_value() -> None:
    html = table_maps([TableMap("t", "64", [[1.0, 2.0], [0.0, 4.0]]), TableMap("t", "128", [[2.0, 2.0], [2.0, 2.0]])])
    assert html.count("<h3>") == 1 and "Shades from 0 to 4.0" in html
    assert '<td class="h10" title="layer 1, head 1">4.0</td>' in html
    assert '<td class="h0" title="layer 1, head 0">0.0</td>' in html and html.count('class="h5"') == 5


@pytest.mark.parametrize("values", [[[1.0], [1.0, 2.0]], [[float("nan")]], [[-1.0]], [], [1.0]])
def test_what_is_no_table_is_refused(values: list[list[float]]) -> None:
    with pytest.raises(HarnessError, match="is no matrix"):
        table_maps([TableMap("t", "64", values)])


def compiled(label: str, **params: str) -> MethodSpec:
    digest = load_tables(folder_of(PACKAGED)).manifest.tensors_sha256
    own = {"form": "compiled", "tables": PACKAGED, "budgets": "compiled", "tables_sha256": digest, **params}
    return MethodSpec(label=label, name="compilerkv", params=own)


def test_tables_of_the_runs_methods_are_brought_as_they_are() -> None:
    methods = (
        compiled("compilerkv"),
        compiled("compilerkv@window"),
        compiled("compilerkv@uniform", budgets="uniform"),
        compiled("compilerkv@paper", form="published"),
        MethodSpec(label="snapkv", name="snapkv"),
    )
    maps, remarks = table_maps_of([manifest(methods=methods), manifest(methods=methods[:1])])
    tables = load_tables(folder_of(PACKAGED))
    assert remarks == [] and [one.budget for one in maps] == [str(b) for b in tables.manifest.budgets]
    assert {one.name.partition(", ")[2] for one in maps} == {"slots of compilerkv, compilerkv@window"}
    assert maps[1].values == tables.budget[1].tolist()
    assert "Compiled tables" in to_html(aggregate(pretend()), pretend(), title="x", extras=Extras(maps=maps))


@pytest.mark.parametrize("changed", [{"tables_sha256": "0" * 64}, {"tables": "no/such/tables"}])
def test_tables_that_are_not_here_are_a_remark(changed: dict[str, str]) -> None:
    maps, remarks = table_maps_of([manifest(methods=(compiled("a", **changed), compiled("b", **changed)))])
    assert maps == [] and len(remarks) == 1
    assert "of a, b are not on this machine" in remarks[0] and "no/such" not in remarks[0]
    assert remarks[0] in to_html(aggregate(pretend()), pretend(), title="x", extras=Extras(remarks=remarks))


def test_a_kept_map_reaches_its_ends_only_with_none_or_all() -> None:
    one = record("h2o", "64", "0", 1.0, needle_tokens=40, needle_kept=((0, 1, 20), (39, 40, 4)))
    assert kept_map(one) == "015.9a1"
