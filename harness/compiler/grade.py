"""`harness calibrate-tasks`: the setting of each graded task at which a full cache is right often, not always.

A task's dial is searched by bisection for a score near `AIM`, on half of the prompts; the setting nearest to it is
then measured on all of them and chosen when it still lies between `LOW` and `HIGH`. Prompts are drawn from the
documents put aside for calibration, under a seed of their own. Scores are stored as they are measured: repeat to go on.

Of `instructions/obey` it finds the rules that the full cache keeps in half of the prompts or more, at the shortest
length: what is not kept there is not kept in a longer prompt.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from harness.compiler.asked import GradeSpec
from harness.compiler.saved_state import SavedState
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell
from harness.errors import HarnessError
from harness.machine import git_commit, machine, versions
from harness.models.load import load_model
from harness.models.prompt import TaskTokenizer
from harness.plan.names import plan_tasks
from harness.plan.sweep import PlannedSample, plan_task, task_options
from harness.records.atomic_files import write_text
from harness.records.log_folder import now
from harness.records.spec import Sweep
from methods.registry import make_policy
from tasks.base import Grades
from tasks.graded.family import GradedTask
from tasks.graded.settings import Calibration, Graded, RuleKept, Tried
from tasks.instructions import Obey
from tasks.pool import pool_facts

LOW, HIGH = 50.0, 95.0
"""Scores of the full cache, 0-100, between which a setting qualifies."""
AIM, GOOD = 75.0, (60.0, 90.0)
"""The score that is looked for, and those near enough that the search ends."""
HOPELESS = 0.125
"""Mean score, of 1, of half of the searching prompts at which the other half is spared."""

Scores = Callable[[int, int], Sequence[float]]  # (setting, number of prompts) to their scores in [0, 1]


class Grader:
    """One folder of scores, of graded tasks on one model. Raises HarnessError for a task without a dial."""

    def __init__(self, spec: GradeSpec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        sweep = Sweep(methods=("fullkv",), **spec.model_dump(exclude={"samples"}))
        planned = plan_tasks(sweep)
        self.drawn_by = planned[0].name  # any of them: what draws from calibration's text
        self.obey = next((task for task in planned if isinstance(task, Obey)), None)
        self.tasks = [_graded(task) for task in planned if task is not self.obey]
        self.loaded = load_model(spec.model, dtype=spec.dtype, device=spec.device)
        self.options = replace(task_options(sweep, self.loaded), calibrates=True, grades=None)
        self.engine = Engine(AttachedModel(self.loaded.model))
        self.tokenizer = TaskTokenizer(self.loaded.tokenizer)
        decides = {"revision": self.loaded.spec.revision, "dtype": self.loaded.spec.dtype, "seed": spec.seed}
        self.saved = SavedState(folder, decides)

    def grade(self, task: GradedTask, length: int, near: int | None = None) -> Graded:
        """Search a task's dial at a length of prompts. near: the setting to try first, as another length chose it."""
        dial = task.kind.dial

        def scores(setting: int, count: int) -> list[float]:
            return self._scores(task, length, setting, count)

        chosen, tried = search(dial.scale, scores, self.spec.samples, near)
        return Graded(task=task.name, length=length, dial=dial.name, scale=dial.scale, tried=tried, chosen=chosen)

    def rules(self) -> list[RuleKept]:
        """How often each rule of `instructions/obey` is kept, on `samples` prompts that ask for it; empty unasked."""
        if self.obey is None:
            return []
        length, rules = min(self.spec.lengths), self.obey.rules
        limit = self.obey.asks * math.ceil(1.5 * self.spec.samples * len(rules) / self.obey.asks)
        options = replace(self.options, lengths=(length,), limit=limit)
        kept: dict[str, list[float]] = {rule: [] for rule in rules}
        for planned in plan_task(self.obey, options, self.loaded, 0)[0]:
            own = kept[planned.sample.meta["rule"]]
            if len(own) < self.spec.samples:
                own.append(self._stored(f"{self.obey.name} {length}", planned))
        found = [(rule, tried(0, scores)) for rule, scores in kept.items()]
        return [RuleKept(rule=rule, length=length, score=own.score, error=own.error, n=own.n) for rule, own in found]

    def write(self, graded: Sequence[Graded], rules: Sequence[RuleKept], command: Sequence[str]) -> Path:
        """Write the calibration, `MODEL.json`. command: as typed."""
        facts = pool_facts(self.drawn_by, self.options)
        calibration = Calibration(
            model=self.loaded.spec.name,
            model_revision=self.loaded.spec.revision,
            low=LOW,
            high=HIGH,
            seed=self.spec.seed,
            corpus=f"documents put aside for calibration ({facts['pool_sha256'][:12]})",
            tasks=tuple(graded),
            rules=tuple(rules),
            command=tuple(command),
            git_commit=git_commit(),
            made_on={**machine(), "dtype": self.loaded.spec.dtype, "versions": versions()},
            created=now(),
        )
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', calibration.model).strip('-')}.json"
        write_text(path, calibration.model_dump_json(indent=1) + "\n")
        return path

    def _scores(self, task: GradedTask, length: int, setting: int, count: int) -> list[float]:
        """The full cache's scores on the first `count` prompts of a setting."""
        stage = f"{task.name} {length} {task.kind.dial.name} {setting}"
        if (stage, f"{length}/{count - 1}") not in self.saved.found:
            grades = Grades({task.name: {length: setting}}, {})
            options = replace(self.options, lengths=(length,), limit=count, grades=grades)
            for planned in plan_task(task, options, self.loaded, 0)[0]:
                self._stored(stage, planned)
        return [self.saved.found[stage, f"{length}/{index}"] for index in range(count)]

    def _stored(self, stage: str, planned: PlannedSample) -> float:
        """A prompt's score, measured where it is not stored yet."""
        if (stage, planned.sample.id) not in self.saved.found:
            self.saved.add(stage, planned.sample.id, self._score(planned))
        score: float = self.saved.found[stage, planned.sample.id]
        return score

    def _score(self, planned: PlannedSample) -> float:
        prompt = planned.prompt(self.tokenizer, self.loaded, None)
        (outcome,) = self.engine.run(prompt, [Cell(make_policy("fullkv"), None)])
        if outcome.status != "ok":
            raise HarnessError(f"{planned.task.name} sample {planned.sample.id} failed: {outcome.error}")
        said = self.tokenizer.decode(outcome.token_ids)
        for stop in planned.sample.stop:
            said = said.split(stop)[0]
        return planned.task.score(planned.sample, said)["score"]


def search(
    scale: Sequence[int], scores: Scores, samples: int, near: int | None = None
) -> tuple[int | None, tuple[Tried, ...]]:
    """Search a dial, easiest setting first, by bisection; return the setting that qualified, if any, and all tried.

    near: the setting to begin with, and to go on from step by step.

    Of the settings that qualify on half of the prompts the one nearest to `AIM`, the harder of two, is measured on all;
    where it then does not, the next nearest is.
    """
    found: dict[int, Tried] = {}
    low, high = 0, len(scale) - 1
    middle = (low + high) // 2 if near is None else scale.index(near)
    while low <= high:
        setting, count = scale[middle], samples // 2
        if fmean(scores(setting, count // 2)) <= HOPELESS:
            count //= 2
        found[middle] = tried(setting, scores(setting, count))
        if qualifies(found[middle]) and GOOD[0] <= found[middle].score <= GOOD[1]:
            break
        easy = found[middle].score >= AIM
        low, high = (middle + 1, high) if easy else (low, middle - 1)
        middle = (low + high) // 2 if near is None else low if easy else high
    nearest = sorted(found, key=lambda at: (abs(found[at].score - AIM), -at))
    chosen = None
    for at in nearest:
        if qualifies(found[at]):
            found[at] = tried(scale[at], scores(scale[at], samples))
            if qualifies(found[at]):
                chosen = scale[at]
                break
    return chosen, tuple(found[at] for at in sorted(found))


def qualifies(one: Tried) -> bool:
    """Whether a setting's score is within `LOW` and `HIGH`, and not the same on every prompt, which tells nothing."""
    return LOW <= one.score <= HIGH and one.error > 0


def tried(setting: int, scores: Sequence[float]) -> Tried:
    """A setting with the mean of its scores and the standard error, in points."""
    error = 100 * stdev(scores) / math.sqrt(len(scores))
    return Tried(setting=setting, score=round(100 * fmean(scores), 2), error=round(error, 2), n=len(scores))


def _graded(task: object) -> GradedTask:
    if not isinstance(task, GradedTask):
        name = getattr(task, "name", task)
        raise HarnessError(f"task {name} has nothing to calibrate; tasks that have: --tasks graded,instructions/obey")
    return task
