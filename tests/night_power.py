"""Nights that nobody broke, and nights that somebody did: how often does `harness nightly` fail? `make night-power`.

A pretend night has the cells of `leaderboards/boards/nightly.toml`: the full cache, and five methods at two budgets, on
four tasks of `limit` prompts each, every one a context of its own. An answer scores 0 or 100, the hardest case; its
chance is that of its task times that of its cell, and the cells of a prompt are correlated by one half. Every answer
has an NLL.

Rounding. On one processor the same code gives the same answers, so nothing moves. Another release of a library moves
some: a share `moved` of the answers is drawn anew, with the same chance, and every NLL shifts by `ROUNDING` nats.

Regressions. In the cells concerned right answers turn wrong so that the mean falls by so many points; `to 0` all of
them. Their NLL stays, so only scores can tell. Scopes: one method on one task, at both budgets; all cells on one task;
all cells on all tasks. A cell that has fewer points loses what it has.

Found: the night fails, by the rule of `leaderboards.nights.compare`, of which this is the same on arrays.
"""

import argparse
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

import leaderboards
from leaderboards.nights.compare import NightlyOptions
from leaderboards.stats.bootstrap import Array, Mask
from leaderboards.stats.paired import holm
from tests.measured import keep

TASKS = np.array([0.95, 0.9, 0.8, 0.5])
CELLS = np.array([1.0, 0.9, 0.6, 0.95, 0.7, 0.5, 0.3, 0.25, 0.15, 0.1, 0.05])
"""Chances of a 100, by task and by cell: the full cache, then each method at its larger and its smaller budget."""
ONE = np.array([1, 2])
"""The cells of the method that gets worse alone, on the first task."""
SCOPES = ("one method, one task", "all methods, one task", "all methods, all tasks")
ROUNDING = 0.01
SPREAD = 0.7
"""Of the logarithm of an NLL."""
EXACT = 12
ZERO = 100.0
"""Points of a regression to 0."""
PACKAGED = Path(leaderboards.__file__).parent / "boards" / "nightly.toml"


class Pretend(NamedTuple):
    """Two nights. before, now: measure to [T, n, C]."""

    before: dict[str, Array]
    now: dict[str, Array]


class Told(NamedTuple):
    """regressed: [comparisons] by score, then by NLL; fallen: [T, C]; worse: p [comparisons], uncorrected."""

    regressed: Mask
    fallen: Mask
    worse: Array

    @property
    def failed(self) -> bool:
        return bool(self.regressed.any() or self.fallen.any())


def options() -> NightlyOptions:
    """Of the packaged board."""
    return NightlyOptions.model_validate(tomllib.loads(PACKAGED.read_text())["nightly"])


def pretend(
    limit: int, generator: np.random.Generator, *, moved: float = 0.0, points: float = 0.0, scope: str = SCOPES[0]
) -> Pretend:
    """Two nights of `limit` prompts a task. points: that the cells of the scope lose."""
    chances = (TASKS[:, None] * CELLS)[:, None]  # [T, 1, C]
    shape = (len(TASKS), limit, len(CELLS))
    prompts = generator.standard_normal((*shape[:2], 1))

    def right() -> Array:
        return np.asarray(
            special.ndtr(np.sqrt(0.5) * (prompts + generator.standard_normal(shape))) < chances, np.float64
        )

    before = right()
    now = np.where(generator.random(shape) < moved, right(), before)
    hit = np.zeros((len(TASKS), 1, len(CELLS)), dtype=bool)
    hit[slice(None) if scope == SCOPES[2] else 0, :, ONE if scope == SCOPES[0] else slice(None)] = True
    lost = generator.random(shape) < points / 100 / chances
    now = np.where(hit & (lost | (points == ZERO)), 0.0, now)
    nll = np.exp(SPREAD * generator.standard_normal(shape))
    shift = generator.normal(0, ROUNDING, shape) if moved else np.zeros(shape)
    return Pretend({"score": 100 * before, "nll": nll}, {"score": 100 * now, "nll": nll + shift})


@lru_cache(maxsize=8)
def _signs(n: int, draws: int) -> Array:
    """[P, n]: every pattern of signs, or drawn ones."""
    if n <= EXACT:
        return np.array(np.meshgrid(*[[1.0, -1.0]] * n)).reshape(n, -1).T.astype(np.float32)
    drawn = np.random.default_rng([n, draws]).integers(0, 2, size=(draws, n))
    return (2 * drawn - 1).astype(np.float32)


def flips(parts: Array, *, draws: int) -> tuple[Array, Array]:
    """[M], [M]: p of sums as high as those of parts [n, M], and the least that it could be; as `paired.flip_p`."""
    moved = np.count_nonzero(parts, axis=0)
    sizes = np.abs(parts)
    least = np.maximum(2.0**-moved, np.where(moved > EXACT, 1 / (draws + 1), 0.0))
    largest = sizes.max(axis=0)
    equal = ((sizes == 0) | (np.abs(sizes - largest) < 1e-9 * largest)).all(axis=0)
    ups = np.count_nonzero(parts > 0, axis=0)
    worse = np.where(ups > 0, special.bdtrc(ups - 1, np.maximum(moved, 1), 0.5), 1.0)
    least[equal] = 2.0 ** -moved[equal]
    if not equal.all():
        signs, some = _signs(len(parts), draws), parts[:, ~equal].astype(np.float32)
        total, extra = some.sum(axis=0), len(parts) > EXACT
        near = 1e-5 * np.abs(some).sum(axis=0)
        high = np.count_nonzero(signs @ some >= total - near, axis=0)
        worse[~equal] = (high + extra) / (len(signs) + extra)
    return worse, least


def judge(pair: Pretend, rule: NightlyOptions, *, draws: int) -> Told:
    """Whether tonight fails. Comparisons by measure: cells by task, all cells by task, cells over tasks, all of all."""
    worse, least, losses = [], [], []
    for measure, sign, floor in (("score", -1.0, rule.score_points), ("nll", 1.0, rule.nll_nats)):
        loss = (sign * (pair.now[measure] - pair.before[measure])).round(9)
        loss = np.concatenate([loss, loss.mean(axis=2, keepdims=True)], axis=2)  # [T, n, C + 1]
        for parts in (*loss, loss.reshape(-1, loss.shape[2])):
            p, lowest = flips(parts, draws=draws)
            worse.append(p)
            least.append(lowest)
            losses.append(parts.mean(axis=0) > floor)
    p = np.concatenate(worse)
    corrected, _ = holm(p, np.concatenate(least), rule.alpha)
    before, now = pair.before["score"], pair.now["score"]
    error = before.std(axis=1, ddof=1) / np.sqrt(before.shape[1])
    fallen = (before.mean(axis=1) > 2 * error) & ~now.any(axis=1)
    return Told((corrected <= rule.alpha) & np.concatenate(losses), fallen, p)


def nights(limit: int, *, count: int, seed: int = 0, **how: object) -> Iterator[Pretend]:
    """So many pairs of nights."""
    generator = np.random.default_rng([seed, limit])
    return (pretend(limit, generator, **how) for _ in range(count))  # type: ignore[arg-type]


def failed(limit: int, *, count: int, draws: int = 4096, **how: object) -> float:
    """Share of the nights that fail."""
    rule = options()
    return sum(judge(pair, rule, draws=draws).failed for pair in nights(limit, count=count, **how)) / count


def needed(points: float, scope: str, *, moved: float, count: int, limits: tuple[int, ...]) -> int | None:
    """The fewest prompts a task with which a regression is found in four of five nights; None if none of the limits."""
    found = (n for n in limits if failed(n, count=count, moved=moved, points=points, scope=scope) >= 0.8)
    return next(found, None)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nights", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="file of `tests/measured.py` to keep the rows in")
    asked = parser.parse_args()

    def keep_row(name: str, values: list[float] | list[int | None]) -> None:
        if asked.keep is not None:
            keep(asked.keep, "make night-power", {name: {"values": values, "nights": asked.nights}})

    print("Nights that fail, in %. moved: share of the answers that another release of a library draws anew.")
    print("scope | moved | prompts a task | nothing | 3 points | 5 points | 10 points | to 0")
    for scope in SCOPES:
        for moved in (0.0, 0.1, 0.3):
            for limit in (8, 20, 50):
                shares = [
                    failed(limit, count=asked.nights, moved=moved, points=points, scope=scope)
                    for points in (0, 3, 5, 10, ZERO)
                ]
                print(scope, moved, limit, *(f"{100 * share:.1f}" for share in shares), sep=" | ", flush=True)
                keep_row(f"fails {scope}, {100 * moved:.0f} %, {limit}", [100 * share for share in shares])
    print("Prompts a task with which four of five nights fail, of 8, 20, 50, 100, 200, 400")
    print("scope | moved | 3 points | 5 points | 10 points")
    limits, few = (8, 20, 50, 100, 200, 400), max(1, asked.nights // 4)
    for scope in SCOPES:
        for moved in (0.0, 0.1):
            found = [needed(points, scope, moved=moved, count=few, limits=limits) for points in (3, 5, 10)]
            print(scope, moved, *(n or "more" for n in found), sep=" | ", flush=True)
            keep_row(f"needs {scope}, {100 * moved:.0f} %", found)


if __name__ == "__main__":
    main()
