"""Greedy steps of a batch in which nothing waits for the host, for measuring how fast they are.

Tokens, positions and lengths stay on the device until all steps are done. On a GPU one step is captured as a CUDA graph
and replayed, where every layer's cache can be (`DecodingLayer.replays`) and the model asks the host nothing: of 32
layers' kernels, launched one by one, a small batch would measure the launches. Capturing has run on no card yet; tests
replay what a step recorded on a CPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from harness.engine.clock import StepClock
from harness.engine.decode import Decoding

WARM = 2  # steps before a capture: they compile kernels, and say what its first replays have to pick
Step = Callable[[], None]


class Stepped(NamedTuple):
    """Tokens of each row, the first one included; seconds of every step; whether the steps were replays of a graph."""

    tokens: list[list[int]]
    step_s: list[float]
    replayed: bool


def greedy_steps(decoding: Decoding, count: int, *, graph: Callable[[Step], Step] | None = None) -> Stepped:
    """Feed each row its likeliest first token, pick the next one, feed that, `count` times; end-of-text is ignored.

    graph: captures a step, which it need not run, and gives what repeats it; the CUDA graph of a GPU
    when left out. Steps that cannot be captured, or pick other tokens when they are, run one by one.
    """
    if graph is None and decoding.model.device.type == "cuda":
        graph = cuda_graph
    assert decoding.first is not None
    first = decoding.first.max(dim=-1).indices  # [R]
    steps = _Steps(decoding, first, count)
    spent = None if graph is None else steps.replay(graph)
    step_s = spent or steps.time(steps.step)
    for cache in decoding.caches:
        cache.check()
    return Stepped(torch.cat([first.unsqueeze(1), steps.told[:, :count]], dim=1).tolist(), step_s, bool(spent))


def cuda_graph(step: Step) -> Step:
    """Capture a step on the GPU."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class _Steps:
    """A step whose inputs and outputs are tensors that stay where they are.

    ids: [R, 1], the tokens to feed. at: [1, 1], their position. done: [1], steps so far. told: [R, N], what was picked.
    """

    def __init__(self, decoding: Decoding, first: Tensor, count: int) -> None:
        self.decoding, self.first, self.count, self.start = decoding, first, count, decoding.position
        self.ids, self.at = first.unsqueeze(1).clone(), torch.full((1, 1), self.start, device=first.device)
        self.done = torch.zeros(1, dtype=torch.int64, device=first.device)
        self.told = first.new_zeros(len(first), max(count, WARM))

    def step(self) -> None:
        """Feed a token to each row and pick the next one."""
        model, caches, position = self.decoding.model, self.decoding.caches, self.decoding.position
        states = self.decoding.states
        logits = model.forward(self.ids, caches, position=position, states=states, at=self.at, keep=1)
        self.ids.copy_(logits[:, -1].float().max(dim=-1).indices.unsqueeze(1))
        self.told.index_copy_(1, self.done, self.ids)
        self.done += 1
        self.at += 1

    def time(self, step: Step) -> list[float]:
        """Seconds of each of `count` steps."""
        clock = StepClock(self.decoding.model.device)
        clock.tick()
        for _ in range(self.count):
            step()
            clock.tick()
        return clock.seconds()

    def replay(self, graph: Callable[[Step], Step]) -> list[float] | None:
        """Seconds of each of `count` replays; None, and all as it was before, where steps cannot be replayed."""
        caches, end = self.decoding.caches, self.start + self.count
        fixed = all(cache.replays for cache in caches) and not self.decoding.states.tensors
        if self.count < WARM or end > self.decoding.model.reach or not fixed:
            return None
        marks = [cache.mark() for cache in caches]
        for _ in range(WARM):
            self.step()
        wanted = self.told[:, :WARM].clone()
        self._back(marks)
        for cache in caches:
            cache.reserve(self.count)
        try:
            again = graph(self.step)
        except RuntimeError:  # as of a model that asks the host: nothing of the step has run
            self._back(marks)
            return None
        self._place(self.start)

        def step() -> None:
            again()
            self._place(self.decoding.position + 1)

        spent = self.time(step)
        if torch.equal(self.told[:, :WARM], wanted):
            return spent
        self._back(marks)  # something that changes from step to step was captured as it was in the first one
        return None

    def _place(self, position: int) -> None:
        for cache in self.decoding.caches:
            cache.position = position

    def _back(self, marks: list[int]) -> None:
        for cache, mark in zip(self.decoding.caches, marks, strict=True):
            cache.rewind(mark)
        self.ids.copy_(self.first.unsqueeze(1))
        self.at.fill_(self.start)
        self.done.zero_()
