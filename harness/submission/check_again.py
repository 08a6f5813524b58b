"""A tenth of a submitted run's cells, generated again with its model and compared with what the run says of them.

Which ones is drawn by a seed that nobody knew when the run was packed. The methods have the parameters that the
manifest states. On the processor, package versions and threads of the run everything is the same: tokens, kept slots,
bytes, and NLL to `SAME_NLL`. Elsewhere sums are rounded otherwise and answers part: no more than `OTHER_IDS` of the
answers may be other ones, the mean NLL may move by `OTHER_NLL`, and the bytes of a cell by `OTHER_BYTES`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import ceil, isclose
from random import Random

from harness.engine.types import AsKept, Cell
from harness.errors import shown
from harness.machine import machine, versions
from harness.models.load import LoadedModel
from harness.plan.methods import policy_of
from harness.plan.sweep import PlannedCell, contexts
from harness.records.record import Key, Record, RunManifest
from harness.records.spec import MethodSpec
from harness.run.sequential import SampleRunner
from harness.submission.check_manifest import CellBudget, cells_of
from harness.submission.check_prompts import Drawn
from harness.submission.verdict import Check
from methods.base import KVPolicy, PolicyError

PART = 0.1
SAME_NLL = 1e-3
OTHER_IDS, OTHER_NLL, OTHER_BYTES = 0.5, 0.05, 0.02
PACKAGES = ("torch", "transformers", "tokenizers")


class Again:
    """Keeps the records of the cells that are drawn, runs these cells again, and says in what they differ."""

    def __init__(self, manifest: RunManifest, drawn: Drawn, load: Callable[[], LoadedModel], *, seed: int) -> None:
        self.manifest, self.load, self.notes = manifest, load, [f"all but a tenth of the cells, seed {seed}"]
        policies = {spec.label: policy for spec in manifest.spec.methods if (policy := self._policy(spec)) is not None}
        cells = [
            PlannedCell(label, text, self._cell(policies, label, budget))
            for (label, text), budget in cells_of(manifest).items()
            if label in policies and (budget in policies or not isinstance(budget, str))
        ]
        pairs = [(planned, cell) for planned in drawn.samples.values() for cell in cells]
        self.chosen = Random(seed).sample(pairs, ceil(PART * len(pairs)))
        self.keys = {(p.task.name, p.sample.id, c.method, c.budget) for p, c in self.chosen}
        self.kept: dict[Key, Record] = {}

    def _cell(self, policies: Mapping[str, KVPolicy], label: str, budget: CellBudget) -> Cell:
        if isinstance(budget, str):
            return Cell(policies[label], None, AsKept(policies[budget], budget))
        return Cell(policies[label], budget)

    def _policy(self, spec: MethodSpec) -> KVPolicy | None:
        """The method as the manifest states it; None, with a note, where it cannot be made here."""
        try:
            return policy_of(spec, self.manifest.spec.model.revision)
        except (PolicyError, TypeError, ValueError) as error:
            self.notes.append(f"cells of {spec.label}: {error}")
            return None

    def keep(self, record: Record) -> None:
        if record.key in self.keys:
            self.kept[record.key] = record

    def run(self, check: Check) -> None:
        """Run the cells again. Raises HarnessError for a model that cannot run them."""
        if not self.kept:
            check.see(["no cell can be made again: no prompt or no method of the run is known here"])
            return
        if self.manifest.spec.answered_by is not None:
            self.notes.append(
                f"no cell is run again: {self.manifest.spec.answered_by.name} answered, which is not here"
            )
            return
        runner = SampleRunner(self.manifest.spec, self.load())
        same, pairs = self._same(runner.accelerator), []
        for own, made in self._made(runner):
            pairs.append((own, made))
            check.see(differences(own, made, same=same), " ".join(own.key)[:120])
        if not same:
            self.notes.append("tokens one by one: another processor, other versions or threads than the run's")
            check.see(moved(pairs), counted=0)

    def _made(self, runner: SampleRunner) -> Iterator[tuple[Record, Record]]:
        samples = {id(planned): planned for planned, _ in self.chosen}
        for group in contexts(list(samples.values()), self.manifest.spec.query):
            wanted = [(planned, [cell for other, cell in self.chosen if other is planned]) for planned in group]
            for made in runner.records(wanted, observe=False):
                if made.key in self.kept:
                    yield self.kept[made.key], made

    def _same(self, accelerator: str) -> bool:
        here, there = versions(), self.manifest.versions
        threads = machine()["torch_threads"] == self.manifest.machine.get("torch_threads")
        packages = all(here.get(name) == there.get(name) for name in PACKAGES)
        return threads and packages and all(record.accelerator == accelerator for record in self.kept.values())


def differences(own: Record, made: Record, *, same: bool) -> Iterator[str]:
    """Say in what a record is not what its cell gives here. same: whether all of it should be the same."""
    if own.status != made.status:
        if own.status != "oom":  # memory may be short there and not here
            yield f"status {own.status}, here {made.status} ({shown(made.error)})"
        return
    for name in ("token_ids", "turn_tokens", "kept_slots", "needle_kept", "memory") if same else ():
        if getattr(own, name) != getattr(made, name):
            yield f"{name} {shown(getattr(own, name), 60)}, here {shown(getattr(made, name), 60)}"
    told = () if own.read_bytes is None else ("read_bytes",)  # not in old records
    for name in ("kv_bytes", "asked_bytes", "full_bytes", *told):
        if not isclose(getattr(own, name), getattr(made, name), rel_tol=0 if same else OTHER_BYTES):
            yield f"{name} {getattr(own, name)}, here {getattr(made, name)}"
    for name in ("nll", "nll_first") if same else ():
        ours, theirs = getattr(made, name), getattr(own, name)
        if (ours is None) != (theirs is None) or (
            ours is not None and not isclose(ours, theirs, rel_tol=SAME_NLL, abs_tol=SAME_NLL)
        ):
            yield f"{name} {theirs}, here {ours}"


def moved(pairs: Iterable[tuple[Record, Record]]) -> Iterator[str]:
    """Say what is more apart than another processor makes it."""
    ok = [(own, made) for own, made in pairs if own.status == made.status == "ok"]
    other = sum(own.token_ids != made.token_ids for own, made in ok)
    if other > max(1, OTHER_IDS * len(ok)):
        yield f"{other} of {len(ok)} answers are other ones here, another processor explains half"
    nlls = [(own.nll, made.nll) for own, made in ok if own.nll is not None and made.nll is not None]
    if nlls:
        theirs, ours = (sum(column) / len(nlls) for column in zip(*nlls, strict=True))
        if not isclose(theirs, ours, rel_tol=OTHER_NLL, abs_tol=SAME_NLL):
            yield f"a mean NLL of {theirs:.4f}, here {ours:.4f}"
