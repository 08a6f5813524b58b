"""The smallest visible difference: by hand, and found as often as it says on boards drawn anew."""

import math

import numpy as np
import pytest
from scipy import stats

from harness.records.record import Record
from leaderboards.stats.bootstrap import Bootstrap
from leaderboards.stats.visible import ONE, pooled, smallest
from leaderboards.tables.sections import sections
from leaderboards.tables.visible import TITLE
from tests import null
from tests.null import Shape
from tests.pretend import cell, only

SHAPES = {"few contexts": Shape(4, 1, 1, 6, 1), "family": Shape(4, 2, 3, 20, 2), "many": Shape(6, 1, 1, 60, 1)}


def board(task: str = "ruler/vt", n: int = 20, full: float = 0.8, **changes: object) -> list[Record]:
    """Three methods at 64 on n contexts: `a` and `b` differ by 10 points on every other one, `c` is as `a` is."""
    low = [full - 0.1 * (i % 2) for i in range(n)]
    at = {"fullkv": ("full", [full] * n), "a": ("64", [full] * n), "b": ("64", low), "c": ("64", [full] * n)}
    return [r for name, (budget, own) in at.items() for r in cell(name, budget, own, task=task, **changes)]


def by_hand(errors: list[float], contexts: int) -> float:
    """Of the mean over tasks with these standard errors, each of so many contexts, by the noncentral t itself."""
    error = math.sqrt(sum(e**2 for e in errors)) / len(errors)
    freedom = sum(e**2 for e in errors) ** 2 / sum(e**4 / (contexts - 1) for e in errors)
    limit = stats.t.ppf(0.975, freedom)
    steps = np.linspace(0, 8, 8001)
    return error * float(steps[np.searchsorted(stats.nct.sf(limit, freedom, steps), 0.8)])


def test_a_task_and_its_family_by_hand() -> None:
    tasks = ("ruler/vt", "ruler/cwe", "niah/passkey")
    rows = only([r for task in tasks for r in board(task)]).visible.set_index("name")
    error = 5 / math.sqrt(19)  # half of the differences are 10 points, in two pairs of three
    assert rows.loc["ruler/vt", "one"] == pytest.approx(by_hand([error], 20), rel=0.01)
    assert rows.loc["ruler", "one"] == pytest.approx(by_hand([error] * 2, 20), rel=0.01)
    assert rows.loc["all tasks", "one"] == pytest.approx(by_hand([error] * 3, 20), rel=0.01)
    assert (rows["all"] > rows["one"]).all()  # corrected for all pairs of the table
    assert rows["kind"].tolist() == ["task"] * 3 + ["family"] * 2 + ["all"]
    ruler = dict(rows.loc["ruler"])
    assert ruler["full"] == pytest.approx(80) and ruler["full_error"] == 0
    assert [ruler[name] for name in ("n", "contexts", "pairs", "ranks")] == [40, 40, 4, "yes"]


def test_lengths_are_told_apart_and_the_family_has_both() -> None:
    mixed = [r.model_copy(update={"meta": {**r.meta, "length": (1024, 2048)[int(r.sample_id) // 10]}}) for r in board()]
    rows = only(mixed).visible
    assert rows[["kind", "length", "contexts"]].to_numpy().tolist() == [
        ["task", "1024", 10],
        ["task", "2048", 10],
        ["family", "", 20],
    ]
    assert rows["one"].iloc[0] == pytest.approx(by_hand([5 / 3], 10), rel=0.03)


def test_it_says_why_there_is_none() -> None:
    unnamed = [r.model_copy(update={"meta": {}}) for r in board()]
    alike = [r for r in board("ruler/cwe") if r.method != "b"]
    whys = [only(records).visible["why"].iloc[0] for records in (unnamed, board(n=2), alike)]
    assert whys[0] == "contexts have no names"
    assert whys[1] == "2 contexts, 3 are needed"
    assert whys[2] == "no two methods that lack nothing differ"
    assert only(unnamed).visible["one"].isna().all()


def test_a_method_that_lacks_samples_or_is_over_its_bytes_is_in_no_pair() -> None:
    def pairs(records: list[Record]) -> int:
        return int(only(records).visible["pairs"].iloc[0])

    lacking = [r for r in board() if (r.method, r.sample_id) != ("c", "3")]
    over = [r.model_copy(update={"over_budget": r.method == "c"}) for r in board()]
    assert (pairs(board()), pairs(lacking), pairs(over)) == (2, 1, 1)


def test_the_board_shows_it_beside_the_full_cache_and_who_ranks() -> None:
    lacking = board("ruler/cwe", full=0.15)
    frame = sections(only([*board(), *lacking]))[TITLE].set_index("task")
    assert "length" not in frame and "why none" not in frame
    assert frame.loc["ruler/cwe", "ranks"] == "the full cache has 15.0 points"
    assert frame.loc["ruler/cwe", "fullkv ± standard error"] == "15.0 ± 0.0"
    assert frame["alone"].to_dict() == {"ruler/vt": "3.4", "ruler/cwe": "3.4", "ruler (family)": "3.4"}


def _said_and_found(shape: Shape, *, count: int, lift: bool) -> tuple[float, float]:
    """What boards of equal methods say, their mean, and how often that is found on others; at most 1.

    lift: whether the better method has a higher chance of a 100, which changes its spread too; else every score rises.
    """
    bootstrap = Bootstrap(
        [f"t{t}" for t in range(shape.tasks) for _ in range(shape.contexts * shape.samples)],
        groups=[str(g) for _ in range(shape.tasks) for g in range(shape.contexts) for _ in range(shape.samples)],
    )
    known = np.full(shape.tasks, float(shape.contexts))
    said, found = [], []
    generator = np.random.default_rng(3)
    for first, second in zip(
        null.boards(shape, 0.1, count=count, seed=4), null.boards(shape, 0.1, count=count, seed=5), strict=True
    ):
        flat = first.of["score"].reshape(-1, shape.budgets, shape.methods)
        variances = np.array([pooled(bootstrap, flat.swapaxes(0, 1), rows)[0] for rows in bootstrap.rows.values()])
        gap = smallest(variances, known, ONE)
        if math.isnan(gap):  # all alike on a board of few contexts
            continue
        said.append(gap)
        scores = second.of["score"][..., 0, :2].copy()  # [T, G, S, 2]
        if lift:
            chance = null.chances(shape.tasks)[:, None, None]
            turned = generator.random(scores.shape[:-1]) < gap / 100 / (1 - chance)
            scores[..., 0] = np.where(turned, 100.0, scores[..., 0])
        else:
            scores[..., 0] += gap
        found.append(_told(scores.mean(axis=2)))
    return float(np.mean(said)), float(np.mean(found))


def _told(means: np.ndarray) -> bool:
    """Whether the first of two methods is told better, by Welch's t over tasks; means: [T, G, 2] of contexts."""
    gaps = means[..., 0] - means[..., 1]
    variances = gaps.var(axis=1, ddof=1) / gaps.shape[1]
    if not variances.sum():
        return bool(gaps.mean() > 0)
    freedom = variances.sum() ** 2 / (variances**2 / (gaps.shape[1] - 1)).sum()
    return bool(gaps.mean() / math.sqrt(variances.sum()) * len(gaps) > stats.t.ppf(0.975, freedom))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_difference_that_is_said_is_found_on_four_boards_of_five(shape: Shape) -> None:
    said, found = _said_and_found(shape, count=600, lift=False)
    assert said > 0 and found == pytest.approx(0.8, abs=0.06)


def test_it_is_found_nearly_as_often_where_chances_differ() -> None:
    said, found = _said_and_found(SHAPES["many"], count=600, lift=True)
    assert 5 < said < 30 and found == pytest.approx(0.8, abs=0.1)
