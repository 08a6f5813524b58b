"""Which samples and cells a submitted run holds, and whether the cells of one sample are of one prompt."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field

from harness.records.record import CellKey, Record, RunManifest
from harness.submission.check_manifest import CellBudget
from methods.budget import Budget
from tasks import load_tasks

MAY_RUN_OUT = frozenset({"prose"})  # protocols that draw what there is, up to the limit


@dataclass
class _Seen:
    prompt: str
    length: object
    cells: set[CellKey] = field(default_factory=set)
    cache: tuple[int, int] | None = None
    nll_tokens: int | None = None
    oom: list[CellKey] = field(default_factory=list)
    ok: set[CellKey] = field(default_factory=set)


class Samples:
    """Takes the records of a run one by one; `cells` is what every sample has to have."""

    def __init__(self, manifest: RunManifest, cells: Mapping[CellKey, CellBudget]) -> None:
        self.manifest, self.cells = manifest, cells
        self.wanted = manifest.samples * len(cells)
        self._tasks = {task.name: task.provenance for task in manifest.spec.tasks}
        self._seen: dict[tuple[str, str], _Seen] = {}

    def problems(self, record: Record) -> Iterator[str]:
        """Say what is wrong with a record as one of this run; one with a problem is not counted as there."""
        yield from list(self._foreign(record)) or self._sample(record)

    def _foreign(self, record: Record) -> Iterator[str]:
        spec = self.manifest.spec
        wanted: dict[str, object] = {"run_id": self.manifest.run_id}
        wanted |= {"model": spec.model.name, "dtype": spec.model.dtype}
        wanted |= {"query": spec.query, "first_token": spec.first_token, "seed": spec.seed}
        for name, value in wanted.items():
            if (own := getattr(record, name)) != value:
                yield f"{name} is {ascii(own)[:80]}, the run's is {ascii(value)[:80]}"
        if record.task not in self._tasks:
            yield f"task {ascii(record.task)[:80]} is not in the spec"
        if (record.method, record.budget) not in self.cells:
            yield f"cell {ascii(f'{record.method} {record.budget}')[:80]} is not in the spec"
        generated = max(record.turn_tokens or (len(record.token_ids),))
        if spec.max_new_tokens is not None and generated > spec.max_new_tokens:
            yield f"{generated} tokens generated, the spec allows {spec.max_new_tokens}"
        if record.prediction.strip("\n" if record.turn_tokens else "") and not record.token_ids:
            yield "a prediction without tokens"
        if record.turn_tokens and sum(record.turn_tokens) != len(record.token_ids):
            yield f"turns of {ascii(record.turn_tokens)[:80]} tokens, {len(record.token_ids)} generated"

    def _sample(self, record: Record) -> Iterator[str]:
        prompt, cell = _prompt(record), (record.method, record.budget)
        seen = self._seen.setdefault((record.task, record.sample_id), _Seen(prompt, record.meta.get("length")))
        if cell in seen.cells:
            yield f"cell {ascii(' '.join(record.key))[1:-1][:120]} is there twice"
            return
        seen.cells.add(cell)
        if seen.prompt != prompt:
            yield "prompt, references or meta are not those of the sample's other cells"
        if record.status != "ok":
            seen.oom += [cell] if record.status == "oom" else []
            return
        seen.ok.add(cell)
        cache = (record.compressed_tokens, record.full_bytes)
        if (seen.cache or cache) != cache:
            yield f"{cache[0]} tokens in {cache[1]} bytes uncompressed, another cell of the sample has {seen.cache}"
        if (record.nll_tokens if seen.nll_tokens is None else seen.nll_tokens) != record.nll_tokens:
            yield f"NLL over {record.nll_tokens} tokens, another cell of the sample has {seen.nll_tokens}"
        seen.cache, seen.nll_tokens = seen.cache or cache, record.nll_tokens

    @property
    def seen(self) -> Set[tuple[str, str]]:
        """Task and id of every sample that is there."""
        return self._seen.keys()

    def across(self) -> Iterator[str]:
        """Say which cells are out of memory although the same method kept more of the same prompt, and ran."""
        for (task, sample), seen in self._seen.items():
            most: dict[str, int] = {}
            ok, oom = ([c for c in some if not isinstance(self.cells[c], str)] for some in (seen.ok, seen.oom))
            for method, text in ok if oom else ():
                most[method] = max(most.get(method, 0), _slots(self.cells[method, text], seen))
            for method, text in oom:
                if most.get(method, 0) > _slots(self.cells[method, text], seen):
                    yield f"{task} sample {sample[:60]}: {method} is out of memory at {text}, and ran at more"

    def missing(self) -> Iterator[str]:
        """Say what the run should hold and does not."""
        if len(self._seen) != self.manifest.samples:
            yield f"{len(self._seen)} samples, the manifest says {self.manifest.samples}"
        for (task, sample), seen in self._seen.items():
            lost = [" ".join(cell) for cell in self.cells if cell not in seen.cells]
            if lost:
                names = ascii(", ".join(lost))[1:-1][:120]
                yield f"{task} sample {ascii(sample)[1:-1][:60]} lacks {len(lost)} cells: {names}"
        counts = Counter(task for task, _ in self._seen)
        for name in sorted(self._tasks):
            yield from self._drawn(name, counts[name])

    def _drawn(self, name: str, count: int) -> Iterator[str]:
        """Generated tasks make a known number of samples of each length that they serve; others at most the limit.

        Asked for no limit, a task whose contexts are drawn makes as many as it has text for.
        """
        spec, task, said = self.manifest.spec, load_tasks()[name], self._tasks[name]
        drawn = spec.limit is None and str(said.get("contexts")).startswith("drawn")
        may_run_out = drawn or task.protocol in MAY_RUN_OUT
        own: dict[object, int] = defaultdict(int)
        for (other, sample), seen in self._seen.items():
            if other == name and seen.length in spec.lengths and sample.startswith(f"{seen.length}/"):
                own[seen.length] += 1
        if not count:
            yield f"no sample of {name}"
        elif sum(own.values()) == count:
            wanted = task.about.samples if spec.limit is None else spec.limit
            for length in map(int, said.get("settings", dict.fromkeys(spec.lengths))):
                few = own[length] < wanted and (not own[length] or not may_run_out)
                if few or own[length] > wanted:
                    yield f"{own[length]} samples of {name} at length {length}, {wanted} belong there"
        elif spec.limit is not None and count > spec.limit:
            yield f"{count} samples of {name}, the limit is {spec.limit}"


def _slots(budget: CellBudget, seen: _Seen) -> int:
    tokens = seen.cache[0] if seen.cache else 0
    return budget.resolve(tokens) if isinstance(budget, Budget) else tokens


def _prompt(record: Record) -> str:
    """Digest all that a record takes over from its sample."""
    facts = [record.prompt_sha256, record.prompt_tokens, record.prompt_tail, record.answers]
    facts += [record.needle_tokens, record.meta]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
