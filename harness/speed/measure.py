"""Measure one method by itself, in this process, which on a CPU should be a fresh one.

Memory is that of the first round, the cold one: what a warm-up frees would stay in the heap and hide what comes after.
A short prompt goes first, so that weights and code are resident before; then freed heap is given back. During that
round large blocks are mapped by themselves and the heap has no holes, so the peak is of what lives and not of what the
heap has not yet returned. The rounds that follow it are timed with the heap as it would be; the first one's seconds
count only where the warm-up is off. On a GPU the memory is its allocator's, which counts all that itself.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from harness.engine.compress import Compressed
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.records.measured import Measured, ProbeSpec, Spread
from harness.records.record import READ
from harness.speed import memory_limit
from harness.speed.copies import copied
from harness.speed.dims import check_layers
from harness.speed.gpu import state_of
from harness.speed.one_method import Isolated
from harness.speed.predicted_memory import predict
from methods.base import Budget, KVPolicy, PolicyError

MAPPED_FROM = 2**17  # while memory is measured: what is freed leaves the resident set at once
MAPPED_FROM_TIMED = 2**25  # while time is measured: glibc's own upper bound, which it reaches after a few forwards


class Round(NamedTuple):
    """One pass over all prompts of a probe."""

    phases: list[tuple[float, float, float, float]]
    """Seconds of prefill, observation, compression, and until the first token, of each prompt."""
    step_s: list[float]
    """Seconds of each decode step of the whole batch."""
    kv_bytes: tuple[int, ...]
    """Live bytes of each layer of the first prompt."""
    replayed: bool
    """Whether steps were replays of a CUDA graph."""


def measure(
    model: AttachedModel, policy: KVPolicy, spec: ProbeSpec, *, vocabulary: Sequence[int] | None = None
) -> Measured:
    """Run a probe of a policy, as made for the model, and return its seconds and its memory.

    vocabulary: token ids that prompts are drawn from; None for all. Raises HarnessError for a budget that is missing or
    cannot be read, ids of another length and an unknown device; PolicyError for what the policy refuses.
    """
    check_layers(model.config)
    budget, prompts = _budget(policy, spec), draw_prompts(spec, vocabulary or range(model.vocab))
    runner = Isolated(model, policy, budget, chunk=spec.chunk)
    _warm(model, policy, prompts[0].tolist())
    if on_cpu := model.device.type == "cpu":
        memory_limit.fill_holes()
        memory_limit.map_from(MAPPED_FROM)
    meter = memory_limit.Meter(model.device)
    first = run_round(runner, prompts, spec)
    peak, reserved = meter.peak(), meter.reserved()
    timed = [] if spec.warm_up else [first]
    if on_cpu:
        memory_limit.map_from(MAPPED_FROM_TIMED)
    timed += [run_round(runner, prompts, spec) for _ in range(spec.rounds - len(timed))]
    gpu = state_of(model.device)
    prefill, observe, compress, ttft = zip(*(phase for found in timed for phase in found.phases), strict=True)
    tpot = Spread.of([seconds for found in timed for seconds in found.step_s])
    return Measured(
        **spec.model_dump(include={"tokens", "batch", "new_tokens", "rounds"}),
        prefill_s=Spread.of(prefill),
        observe_s=Spread.of(observe),
        compress_s=Spread.of(compress),
        ttft_s=Spread.of(ttft),
        tpot_s=tpot,
        tokens_per_s=spec.batch / tpot.median,
        kv_bytes=first.kv_bytes,
        model_bytes=meter.before,
        peak_bytes=peak,
        predicted_bytes=predict(model.config, model.dtype.itemsize, policy, spec, budget, cuda=not on_cpu),
        memory=meter.kind,
        reserved_bytes=reserved,
        gpu=gpu,
        replayed=None if on_cpu else all(found.replayed for found in timed),
    )


def _budget(policy: KVPolicy, spec: ProbeSpec) -> int | None:
    """Slots per layer and KV head, None for a policy that is given none."""
    if not policy.budgeted:
        return None
    if spec.budget is None:
        raise HarnessError(f"method {spec.method} needs a budget; give tokens (128) or a fraction (0.25)")
    try:
        return Budget.parse(spec.budget.removeprefix(READ)).resolve(spec.tokens)
    except PolicyError as error:
        raise HarnessError(str(error)) from None


def draw_prompts(spec: ProbeSpec, vocabulary: Sequence[int]) -> Tensor:
    """Draw the token ids of every different prompt of the batch: [P, T] int32; given ids are the first prompt.

    Raises HarnessError for ids of another length than the probe's.
    """
    if spec.ids and len(spec.ids) != spec.tokens:
        raise HarnessError(f"a probe of {spec.tokens} tokens was given {len(spec.ids)} ids; give as many or none")
    generator, known = torch.Generator().manual_seed(spec.seed), torch.tensor(vocabulary, dtype=torch.int32)
    count = min(spec.batch, spec.distinct or spec.batch)
    drawn = known[torch.randint(len(known), (count, spec.tokens), generator=generator)]
    if spec.ids:
        drawn[0] = torch.tensor(spec.ids)
    return drawn


def run_round(runner: Isolated, prompts: Tensor, spec: ProbeSpec) -> Round:
    """Prefill and compress the prompts one at a time, and decode them together, with copies up to the batch.

    The last prompt is prefilled beside the caches of all others, as it would be without copies.
    """
    done, phases = list[Compressed](), []
    for number, ids in enumerate(prompts, start=1):
        if number == len(prompts):
            done += [copied(done[i % (number - 1)], seed=i) for i in range(spec.batch - number)]
        done.append(prompt := runner.prefill(ids.tolist()))
        start = time.perf_counter()
        int(prompt.logits.argmax())  # waits for a GPU
        seconds = (prompt.prefill_s, prompt.observe_s, prompt.compress_s)
        phases.append((*seconds, sum(seconds) + time.perf_counter() - start))
    kv_bytes = tuple(done[0].layer_bytes)
    decoded = runner.decode(done, spec.new_tokens)
    return Round(phases, decoded.step_s, kv_bytes, decoded.replayed)


def _warm(model: AttachedModel, policy: KVPolicy, ids: list[int]) -> None:
    """Run the start of a prompt, so that weights and code are resident and kernels chosen."""
    short = ids[: min(64, len(ids) - 1)]
    runner = Isolated(model, policy, max(1, len(short) // 2) if policy.budgeted else None)
    with suppress(PolicyError):  # so short a prompt may be refused
        runner.decode([runner.prefill(short)], 2)
