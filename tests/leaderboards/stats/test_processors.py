"""The same sweep on two processors: never one table, and how far its rows move."""

from typing import Any

from harness.records.record import Record
from leaderboards.pages.page import to_html
from leaderboards.stats.aggregate import aggregate
from leaderboards.stats.processors import Moved
from leaderboards.tables.board import to_markdown, to_terminal
from leaderboards.tables.verdicts import standing
from tests.pretend import cell, manifest


def on(name: str, a: list[float], b: list[float], **changes: Any) -> list[Record]:
    more: dict[str, Any] = {"accelerator": name, "run_id": name, "prompt_sha256": "p", **changes}
    return [r for label, own in (("a", a), ("b", b)) for r in cell(label, "64", own, nll=1 + sum(own), **more)]


def test_each_table_says_which_row_moves_most_on_the_prompts_that_both_have() -> None:
    records = on("Xeon", [1.0, 0.5, 0.0], [0.5, 0.5]) + on("EPYC", [1.0, 0.0], [0.5, 0.5])
    epyc, xeon = aggregate(records)
    assert [(other.processor, other.score) for other in xeon.elsewhere] == [("EPYC", Moved("a", "64", 75, 50, 2))]
    assert [(other.processor, other.score) for other in epyc.elsewhere] == [("Xeon", Moved("a", "64", 50, 75, 2))]
    line = (
        "the same sweep on EPYC, never mixed with this: the mean score of a row moves by up to 25.0 (a at 64: 75.0 "
        "here, 50.0 there, n 2), the mean NLL of a row moves by up to 0.500 (a at 64: 2.500 here, 2.000 there, n 2)"
    )
    assert line in standing(xeon)
    for page in (to_markdown([epyc, xeon], title="x"), to_html([epyc, xeon], records, title="x")):
        assert line in page and "float32 on EPYC" in page and "float32 on Xeon" in page
    assert "the same sweep on EPYC" in to_terminal([epyc, xeon])


def test_a_task_weighs_as_much_as_any_other_one() -> None:
    xeon, epyc = (
        [*on(name, [score] * 4, [0.0], task="t"), *on(name, [1.0], [0.0], task="u")]
        for name, score in (("Xeon", 1.0), ("EPYC", 0.5))
    )
    assert aggregate(xeon + epyc)[1].elsewhere[0].score == Moved("a", "64", 100, 75, 5)


def test_other_prompts_and_settings_are_not_compared() -> None:
    xeon = on("Xeon", [1.0], [1.0])
    assert aggregate(xeon)[0].elsewhere == ()
    assert aggregate(xeon + on("EPYC", [0.0], [0.0], seed=1))[0].elsewhere == ()
    (other,) = aggregate(xeon + on("EPYC", [0.0], [0.0], prompt_sha256="q"))[0].elsewhere
    assert other.score is None and other.nll is None
    told = [manifest(max_tokens=n) for n in (512, 1024)]
    split = [r for m, name in zip(told, "XE", strict=True) for r in on(name, [1.0], [], run_id=m.run_id)]
    assert [t.elsewhere for t in aggregate(split, manifests=told)] == [(), ()]


def test_runs_that_were_timed_on_two_processors_are_one_sweep() -> None:
    told = [manifest(measured_on=f"cpu, {name}, 2 threads") for name in "XE"]
    scores = zip(told, "XE", (1.0, 0.0), strict=True)
    records = [r for m, name, score in scores for r in on(name, [score], [], run_id=m.run_id)]
    e, x = aggregate(records, manifests=told)
    assert e.axes.settings != x.axes.settings
    assert e.elsewhere[0].score == Moved("a", "64", 0, 100, 1)
