"""Boards of equal methods: how often is any of them told apart? And which differences are found? `make null`.

A pretend board has T tasks of G contexts with S samples each, K methods at B budgets, a score of 0 or 100 and an NLL
per sample. Its methods are equal: at a task all have the same chance of 100, many of them near 0 or 1, and the same
distribution of NLL, which is skewed. In three of ten contexts all answer alike. A method's draws at two budgets, and
its score and NLL, are correlated by one half. Samples of one context share a method's draw with probability
sqrt(icc) each, so `icc` is the intraclass correlation of its paired differences to any other method, in both measures.
The full cache has the task's own chance, so tasks are left out of the ranks as on a real board.

A false claim is any pair of equal methods that is told apart, at any budget, in either measure: without one nobody is
first alone, and no rank interval misses. Boards see one set of redraws, as two boards of the same tasks do.

Other boards. `half`: half of the methods are better by 30 points and .6 nats; claims among equals are false ones.
`unlike`: every other method has the mean of the rest as its score and NLL on every sample, give or take a little, so
that differences are as skewed as they can be; means of few skewed values are no Student's t.

Rules. `new`: that of `leaderboards.stats.ranks`. `holm`: the step-down of each budget and measure by itself at the
level that Holm leaves it. `old`: by itself at 5 %, and every sample its own context, as boards were ranked before.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from leaderboards.stats.bootstrap import LEVEL, Array, Drawn, Indexes, Mask, joint_counts
from leaderboards.stats.eligible import LOWEST
from leaderboards.stats.ranks import Contrasts, contrasts, first_limit, least_seen, step_down
from tests.measured import keep

CHANCES = (0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
"""Of a 100, by task, in turn from the last; those below `LOWEST` are left out by the full cache, mostly."""
SPREAD = 0.7
"""Of the logarithm of an NLL."""
ALIKE = 0.3
"""Share of the contexts in which all methods answer alike."""
RULES = ("old", "holm", "new")
KINDS = (("equal", 0.0), ("equal", 0.05), ("equal", 0.2), ("half", 0.2), ("unlike", 0.2))


class Shape(NamedTuple):
    """A board. methods with a budget; contexts of each task; samples of each context."""

    methods: int
    budgets: int
    tasks: int
    contexts: int
    samples: int


class Scores(NamedTuple):
    """Values of one pretend board. of: measure to [T, G, S, B, K]; full: [T], score of the full cache."""

    of: dict[str, Array]
    full: Array


BOARDS = {
    "quick": Shape(6, 2, 4, 20, 2),
    "retrieval": Shape(7, 4, 14, 20, 2),
    "baselines": Shape(16, 2, 7, 20, 2),
    "longbench-8k": Shape(6, 3, 9, 20, 2),
    "compilerkv": Shape(18, 4, 9, 20, 2),
    "streaming": Shape(4, 1, 1, 20, 4),
}
"""The published boards with the fewest contexts that rank: as many methods, budgets and tasks as they have."""


def chances(tasks: int) -> Array:
    """[T]: of a 100 at each task."""
    if tasks == 1:
        return np.array([0.5])
    few = np.linspace(0.9, 0.1, tasks)
    return few if tasks < len(CHANCES) else np.array([CHANCES[-1 - i % len(CHANCES)] for i in range(tasks)])


def pretend(
    shape: Shape, icc: float, generator: np.random.Generator, *, gaps: Sequence[float] = (0, 0), better: int = 1
) -> Scores:
    """One board. gaps: by measure (score, NLL), what the first `better` methods have more than the others."""
    k, b, t, g, s = shape
    units = _normal(generator, (t, g, s + 1, b, k))  # the last unit of a context is what its samples share
    shared = generator.random((t, g, s, 1, k)) < math.sqrt(icc)
    own, other = (np.where(shared, one[:, :, -1:], one[:, :, :-1]) for one in units)
    alike = generator.random((t, g)) < ALIKE
    own[alike] = own[alike][..., :1]
    score = 100.0 * (special.ndtr(own) < chances(t)[:, None, None, None, None])
    nll = np.exp(SPREAD * other)
    score[..., :better] += gaps[0]
    nll[..., :better] += gaps[1]
    full = 100.0 * (generator.random((t, g * s)) < chances(t)[:, None]).mean(axis=1)
    return Scores({"score": score, "nll": nll}, full)


def unlike(shape: Shape, icc: float, generator: np.random.Generator) -> Scores:
    """One board on which every other method always has its mean, give or take 5 points and .1 nats."""
    made = pretend(shape, icc, generator)
    means = {
        "score": (100 * chances(shape.tasks)[:, None, None, None, None], 5.0),
        "nll": (math.exp(SPREAD**2 / 2), 0.1),
    }
    for measure, (mean, spread) in means.items():
        calm = made.of[measure][..., 1::2]
        calm[:] = mean + generator.normal(0, spread, calm.shape)
    return made


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Of score and NLL, normal deviates; those of two budgets, and of score and NLL, are correlated by one half."""
    drawn = generator.standard_normal((3, *shape))
    of_method = generator.standard_normal((3, *shape[:-2], 1, shape[-1]))
    first, second, both = math.sqrt(0.5) * (drawn + of_method)
    return math.sqrt(0.5) * (both + first), math.sqrt(0.5) * (both + second)


@lru_cache(maxsize=8)
def _redraws(tasks: int, clusters: int, resamples: int) -> Array:
    """[T, R, G]: the redraws of every task, the same for all boards."""
    return np.stack([joint_counts(0, f"t{i}", clusters, resamples) for i in range(tasks)]).astype(np.float64)


def drawn_of(values: Array, *, resamples: int) -> Drawn:
    """As `Bootstrap.joint` makes it of values [T, G, S, C], whose contexts are all of one size."""
    tasks, groups, _, cells = values.shape
    means = values.mean(axis=2)  # [T, G, C]
    redrawn = _redraws(tasks, groups, resamples) @ means / groups
    names = tuple(f"t{i}" for i in range(tasks))
    return Drawn(names, tuple(range(cells)), means.mean(axis=1), redrawn, np.full(tasks, float(groups)))


@lru_cache(maxsize=32)
def _pairs(methods: int, budgets: int) -> tuple[Indexes, Indexes]:
    """Ordered pairs of cells of one budget; cells are numbered by (budget, method)."""
    found = [
        (b * methods + i, b * methods + j)
        for b in range(budgets)
        for i in range(methods)
        for j in range(methods)
        if i != j
    ]
    first, second = np.array(found).T
    return first, second


def board_contrasts(scores: Scores, shape: Shape, *, resamples: int, alone: bool = False) -> list[Contrasts]:
    """Of score and NLL the contrasts of all ordered pairs, by budget. alone: every sample is its own context."""
    ranks = {"score": scores.full >= LOWEST, "nll": np.ones(shape.tasks, dtype=bool)}
    found = []
    for measure, values in scores.of.items():
        kept = values[ranks[measure]].reshape(-1, *values.shape[1:3], shape.budgets * shape.methods)
        if not len(kept):
            continue
        if alone:
            kept = kept.reshape(len(kept), -1, 1, kept.shape[-1])
        found.append(contrasts(drawn_of(kept, resamples=resamples), *_pairs(shape.methods, shape.budgets)))
    return found


def joined(found: Sequence[Contrasts]) -> tuple[Array, Array]:
    """Statistics [P] and draws [R, P] of all measures."""
    return np.concatenate([one.statistics for one in found]), np.concatenate([one.draws for one in found], axis=1)


def told_apart(found: Sequence[Contrasts], rule: str, budgets: int, *, level: float = LEVEL) -> Mask:
    """[P]: which of the pairs of all measures are told apart by a rule."""
    statistics, draws = joined(found)
    if rule == "new":
        return step_down(statistics, draws, level=level)
    parts = np.array_split(np.arange(len(statistics)), budgets * len(found))
    told, left = np.zeros(len(statistics), dtype=bool), list(range(len(parts)))
    while left:
        share = len(left) if rule == "holm" else 1
        own = {i: step_down(statistics[parts[i]], draws[:, parts[i]], level=1 - (1 - level) / share) for i in left}
        for i in left:
            told[parts[i]] = own[i]
        gone = [i for i in left if own[i].any() and rule == "holm"]
        left = [i for i in left if i not in gone] if gone else []
    return told


def boards(
    shape: Shape, icc: float, *, count: int, seed: int = 0, kind: str = "equal", **gaps: Any
) -> Iterator[Scores]:
    """So many pretend boards of a shape. kind: `equal`, `half` or `unlike`."""
    generator = np.random.default_rng([seed, *shape, round(1000 * icc)])
    if kind == "half":
        gaps = {"gaps": (30, 0.6), "better": shape.methods // 2}
    return (
        unlike(shape, icc, generator) if kind == "unlike" else pretend(shape, icc, generator, **gaps)
        for _ in range(count)
    )


def false_claims(
    shape: Shape,
    icc: float,
    rule: str = "new",
    *,
    count: int,
    resamples: int,
    level: float = LEVEL,
    kind: str = "equal",
) -> int:
    """Boards on which methods that are equal are told apart, of `count`."""
    first, second = (pair % shape.methods for pair in _pairs(shape.methods, shape.budgets))
    half = shape.methods // 2
    equal = (first < half) == (second < half) if kind == "half" else np.ones(len(first), dtype=bool)
    found = 0
    for scores in boards(shape, icc, count=count, kind=kind):
        pairs = board_contrasts(scores, shape, resamples=resamples, alone=rule == "old")
        told = told_apart(pairs, rule, shape.budgets, level=level)
        found += bool(told.reshape(len(pairs), -1)[:, equal].any())
    return found


def power(
    shape: Shape, icc: float, rule: str = "new", *, count: int, resamples: int, gaps: Sequence[float]
) -> tuple[float, float]:
    """Share of the pairs of the first method, at all budgets, in which it is told apart: in score and in NLL."""
    first = np.isin(_pairs(shape.methods, shape.budgets)[0], np.arange(shape.budgets) * shape.methods)
    shares = np.zeros(2)
    for scores in boards(shape, icc, count=count, seed=1, gaps=gaps):
        told = told_apart(board_contrasts(scores, shape, resamples=resamples), rule, shape.budgets).reshape(2, -1)
        shares += told[:, first].mean(axis=1)
    return float(shares[0] / count), float(shares[1] / count)


def least(shape: Shape, icc: float, *, count: int, resamples: int) -> tuple[float, float]:
    """The least differences that boards of this shape say they see, points and nats: their median over boards."""
    said = []
    for scores in boards(shape, icc, count=count, seed=2):
        found = board_contrasts(scores, shape, resamples=resamples)
        limit = first_limit(joined(found)[1])
        said.append([least_seen(one.errors, one.freedom, limit) for one in found])
    points, nats = np.median(said, axis=0)
    return float(points), float(nats)


def simulate(names: Sequence[str], count: int, resamples: int, keep_row: Callable[[str, dict[str, Any]], None]) -> None:
    """Print the tables; `keep_row` is given each row's name and values, as they are found."""
    times = {"count": count, "resamples": resamples}
    print("Boards with a false claim, in %. Shape: methods, budgets, tasks, contexts a task, samples a context.")
    print("board, shape, kind, icc: old, holm, new")
    for name, (kind, icc) in product(names, KINDS):
        found = {rule: false_claims(BOARDS[name], icc, rule, kind=kind, **times) / count for rule in RULES}
        print(name, tuple(BOARDS[name]), kind, icc, *(f"{100 * share:.1f}" for share in found.values()), flush=True)
        claims = {f"{rule}_percent": 100 * share for rule, share in found.items()}
        keep_row(f"claims {name}, {kind}, {icc}", claims | {"boards": count, "resamples": resamples})
    print("The differences that are said to be found with 80 %, points and nats, and how often they are: holm, new")
    for name, icc in product(names, (0.0, 0.05, 0.2)):
        gaps = least(BOARDS[name], icc, count=30, resamples=resamples)
        shares = {r: power(BOARDS[name], icc, r, gaps=gaps, count=200, resamples=resamples) for r in RULES[1:]}
        said = (f"{100 * share:.0f}" for both in shares.values() for share in both)
        print(name, icc, f"{gaps[0]:.1f} {gaps[1]:.3f}", *said, flush=True)
        percent = {f"{r}_percent": [100 * share for share in both] for r, both in shares.items()}
        keep_row(f"seen {name}, {icc}", {"points": gaps[0], "nats": gaps[1], **percent})


def main() -> None:
    """Print the tables, and keep their rows in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boards", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--shapes", default=",".join(BOARDS))
    parser.add_argument("--out", type=Path, help="file of `tests/measured.py` to keep the rows in")
    asked = parser.parse_args()

    def keep_row(name: str, values: dict[str, Any]) -> None:
        if asked.out is not None:
            keep(asked.out, "make null", {name: values})

    simulate(asked.shapes.split(","), asked.boards, asked.resamples, keep_row)


if __name__ == "__main__":
    main()
