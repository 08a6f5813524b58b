"""Fixtures of the speed comparisons: both sides, exact prompts, races in turn, and a table of ratios at the end.

Nothing here fails on time: a ratio is printed beside its goal. Without kvpress only what compares with
no other library is collected. KVH_BENCH_OUT names the file of `tests/measured.py` that keeps the ratios.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from harness.models.assets import asset_folder
from harness.models.load import resolve_dtype
from tests.measured import keep

if TYPE_CHECKING:
    from tests.bench.sides import Ours, Text, Theirs

ALONE = {f"test_bench_{name}.py" for name in ("board", "fanout", "lm_eval", "page")}  # compare with no other library
HERE = sorted(path.name for path in Path(__file__).parent.glob("test_*.py"))
collect_ignore = [] if find_spec("kvpress") else [name for name in HERE if name not in ALONE]
collect_ignore = collect_ignore if find_spec("pytest_benchmark") else HERE

THREADS = int(os.environ.get("KVH_BENCH_THREADS", "2"))
ROUNDS = int(os.environ.get("KVH_BENCH_ROUNDS", "1000"))  # at most so many rounds of anything
DTYPES = sorted({"float32", str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")})
Goal = tuple[Literal["<=", ">="], float]
Note = tuple[str, list[float], Goal | None]


NOTES = pytest.StashKey[list[Note]]()


def line(name: str, values: list[float], goal: Goal | None) -> str:
    """One line of the final table. values: a ratio per round."""
    middle = statistics.median(values)
    told = f"{name:<58} {middle:7.2f}x  ({min(values):.2f} to {max(values):.2f}, {len(values)} rounds)"
    if goal is None:
        return told
    sign, bound = goal
    met = middle <= bound if sign == "<=" else middle >= bound
    return f"{told}  goal {sign} {bound:g}x {'met' if met else 'MISSED'}"


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture
def note(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Put a ratio into the final table."""
    notes = pytestconfig.stash.setdefault(NOTES, [])
    return lambda name, values, goal=None: notes.append((name, list(values), goal))


@pytest.fixture(scope="session", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    """float32, where both sides must agree token for token, and the type this processor is fastest in."""
    return str(request.param)


@pytest.fixture(scope="session")
def sides(dtype: str) -> tuple[Ours, Theirs]:
    """This harness and kvpress on the packaged model; skips when it was never fetched."""
    from tests.bench.sides import make_sides

    for name in ("smollm2-135m", "essays"):
        if not asset_folder(name).is_dir():
            pytest.skip(f"{name} is not in the cache; run `harness fetch {name}`")
    return make_sides(dtype)


@pytest.fixture(scope="session")
def text(sides: tuple[Ours, Theirs]) -> Callable[[int], Text]:
    """A prompt of exactly so many tokens."""
    from tests.bench.sides import make_text

    return cache(lambda tokens: make_text(sides[0].loaded.tokenizer, tokens))


@pytest.fixture
def race(benchmark: Any, note: Callable[..., None]) -> Callable[..., tuple[Any, Any]]:
    """Time both sides in turn, so that a busy machine slows both, and note the median ratio of the rounds."""

    def run(
        name: str, ours: Callable[[], Any], theirs: Callable[[], Any], *, goal: Goal | None, rounds: int
    ) -> tuple[Any, Any]:
        """What the last round of each side returned. goal: `<=` compares ours / theirs, `>=` theirs / ours."""
        seconds: list[float] = []
        last: list[Any] = []

        def turn_of_theirs() -> None:
            start = time.perf_counter()
            last[:] = [theirs()]
            seconds.append(time.perf_counter() - start)

        mine = benchmark.pedantic(ours, setup=turn_of_theirs, rounds=min(rounds, ROUNDS), iterations=1)
        faster = goal is not None and goal[0] == ">="
        pairs = zip(benchmark.stats.stats.data, seconds, strict=True)
        values = [other / own if faster else own / other for own, other in pairs]
        note(name, values, goal)
        benchmark.extra_info.update(
            threads=torch.get_num_threads(), ratio=statistics.median(values), theirs_s=statistics.median(seconds)
        )
        return mine, last[0]

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    notes = config.stash.get(NOTES, [])
    if not notes:
        return
    terminalreporter.section(f"ratios: median of the rounds, {THREADS} torch threads")
    for given in notes:
        terminalreporter.write_line(line(*given))
    if out := os.environ.get("KVH_BENCH_OUT"):
        keep(Path(out), "make bench", {name: _result(values, goal) for name, values, goal in notes})


def _result(values: list[float], goal: Goal | None) -> dict[str, Any]:
    """As it is kept: the median, all rounds, the goal as a sign and a bound, and how busy the machine is at the end."""
    kept = {"median": statistics.median(values), "rounds": values, "goal": goal}
    return {**kept, "threads": THREADS, "load": round(os.getloadavg()[0], 1)}
