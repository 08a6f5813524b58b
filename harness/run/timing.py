"""`harness run --measure`: the same cell on the same prompt again, by itself, for its seconds and its peak memory.

A cell is scored on a prefill that it shares with the others of its sample, so its seconds there are no latency. To
measure it another process, on a CPU a fresh one, runs that cell alone on the sample's own prompt: batch 1, a dropped
warm-up, one round, as many tokens as the cell generated (2 at least, for there is no time per output token below that).
The first token comes from the prefill, as it does when serving. A probe that ends badly costs the record its
measurement, never its score, and is not repeated when the run is resumed.

Seconds mean nothing without the machine, so a measured run says in its spec where it was measured: it is another run
than the same one without measurements, and another one on each machine. One folder never holds both.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from harness.errors import HarnessError
from harness.plan.sweep import Group, PlannedSample
from harness.records.record import Record, by_turns
from harness.records.spec import AS, ModelSpec, Sweep
from harness.speed.target import Restarting, probe_spec

TIMEOUT_S = 1800.0  # a probe that takes longer has hung
ERROR_CHARS = 200  # characters of a probe's error in a note

Finish = Callable[[list[Record], Group], list[Record]]  # adds measurements to the records of a group


def measured_on(machine: Mapping[str, Any], model: ModelSpec) -> str:
    """Say in one line what speed depends on: device, accelerators where one is used, processor, CPU threads.

    machine: as `harness.machine.machine` gives it. Raises HarnessError for a device whose memory nothing tells.
    """
    if model.device.partition(":")[0] not in ("cpu", "cuda"):
        unknown = f"--measure: memory on device {model.device!r} cannot be measured"
        raise HarnessError(f"{unknown}; give --device cpu or cuda")
    cards = () if model.device == "cpu" else machine["accelerators"]
    return ", ".join([model.device, *cards, machine["processor"], f"{machine['torch_threads']} threads"])


@contextmanager
def measuring(sweep: Sweep, model: ModelSpec) -> Iterator[Finish]:
    """Provide what adds measurements to the records of a group; it changes nothing for a sweep that asks for none.

    model: as loaded for the scores; the probes load the same.
    """
    if not sweep.measure:
        yield lambda records, group: records
        return
    from harness.speed.client import Prober

    threads = torch.get_num_threads()
    start = partial(Prober, model=sweep.model, dtype=model.dtype, device=model.device, threads=threads)
    with ExitStack() as stack:
        opened: list[Restarting] = []

        def finish(records: list[Record], group: Group) -> list[Record]:
            if not opened:  # a run with nothing left to do starts no server
                opened.append(stack.enter_context(Restarting(start)))
            owners = [planned for planned, cells in group for _ in cells]
            pairs = zip(records, owners, strict=True)
            return [_with_measured(r, planned, sweep, prober=opened[0]) for r, planned in pairs]

        yield finish


def _with_measured(record: Record, planned: PlannedSample, sweep: Sweep, *, prober: Restarting) -> Record:
    """The record with what its cell takes by itself, or a note on why that is not known; as it is without a score."""
    if record.status != "ok":
        return record
    torch.cuda.empty_cache()  # what this process caches is memory the probe would lack
    new = len(by_turns(record.token_ids, record.turn_tokens)[0])  # of a conversation the first turn alone
    shape = {"tokens": len(planned.ids), "new_tokens": max(2, new), "seed": record.seed}
    found = record.budget.startswith(AS)  # by another method, for this prompt
    budget = str(record.budget_tokens) if found else record.budget
    spec = probe_spec(record.method, budget, sweep.set, **shape, ids=tuple(planned.ids))
    result = prober.ask(spec, timeout_s=TIMEOUT_S)
    if result.status == "ok" and result.measured is not None:
        return record.model_copy(update={"measured": result.measured})
    why = " ".join((result.error or "no measurement came back").split())[:ERROR_CHARS]
    return record.model_copy(update={"notes": (*record.notes, f"measure: {result.status} ({why})")})
