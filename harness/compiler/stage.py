"""What every stage of a compilation works with: the model, its calibration prompts, their roll-outs, what is saved."""

import math
import sys
from collections.abc import Callable, Sequence, Set
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from harness.compiler.asked import CalibrationSpec
from harness.compiler.corpora import Corpus, load_corpus
from harness.compiler.prompts import calibration_samples
from harness.compiler.rollouts import Rollout
from harness.compiler.saved_state import SavedState
from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.models.load import LoadedModel, load_model
from harness.models.prompt import TaskTokenizer, answer_tokens, wrap
from methods.base import KVPolicy, Needs
from methods.compilerkv.manifest import Shapes

ROWS = 36  # of one forward
HELD_BYTES = 6 * 2**30
"""Bytes of prefilled prompts that are kept for the next stage; beyond them a prompt is prefilled again."""
NEEDS = Needs(window=64, column_sums=True, logprobs=True)
"""What a prefill observes for any stage, so that one serves all."""

CHOICE_PROMPTS = 32
"""Training prompts that a choice among candidates is made on."""


class Calibration(NamedTuple):
    """A calibration prompt as token ids, with its answer's first tokens, and where what is asked for stands."""

    id: str
    family: str
    ids: Sequence[int]
    answer: Sequence[int]
    needle: Sequence[int]


class Workbench:
    """Holds one compilation's model, prompts and roll-outs. Every fourth prompt of a family is for validation."""

    def __init__(
        self, spec: CalibrationSpec, folder: Path, *, needs: Needs = NEEDS, apart: Set[str] = frozenset()
    ) -> None:
        """needs: beside those of every stage. apart: fields of `spec` that change no stored value."""
        self.spec, self.folder, self.needs = spec, folder, NEEDS | needs
        corpora = [load_corpus(name) for name in spec.corpora]
        self.loaded = load_model(spec.model, dtype=spec.dtype, device=spec.device)
        self.engine = Engine(AttachedModel(self.loaded.model, self.loaded.wording))
        self.prompts = calibration_prompts(corpora, self.loaded, spec)
        self.corpora = {corpus.name: corpus.sha256 for corpus in corpora}
        decided = spec.model_dump(mode="json", exclude=set(apart))
        self.saved = SavedState(folder, {**decided, "revision": self.loaded.spec.revision, "corpora": self.corpora})
        self._held: dict[int, Rollout] = {}
        probe = self.engine.prefill(self.prompts[0].ids[:8], Needs(window=1)).view
        queries, keys = probe.layers[0].queries, probe.layers[0].kv.keys
        self.shapes = Shapes(layers=len(probe.layers), query_heads=queries.shape[1], kv_heads=keys.shape[1])
        families = [[i for i, prompt in enumerate(self.prompts) if prompt.family == family] for family in spec.families]
        self.validation = sorted(i for own in families for i in own[3::4])
        self.training = [i for i in range(len(self.prompts)) if i not in self.validation]

    def rollout(self, at: int) -> Rollout:
        """Return the roll-out of a prompt, which is prefilled once as far as memory goes."""
        if at not in self._held:
            prompt = self.prompts[at]
            made = Rollout(self.engine, prompt.ids, prompt.answer, self.needs)
            if (len(self._held) + 1) * made.nbytes > HELD_BYTES:
                return made
            self._held[at] = made
        return self._held[at]

    def divergences(self, at: int, candidates: Sequence[KVPolicy], budget: int) -> list[float]:
        """Return the divergence from the full cache of each candidate at a budget, on one prompt, nats a token."""
        rollout, found = self.rollout(at), list[float]()
        for start in range(0, len(candidates), ROWS):
            rows = candidates[start : start + ROWS]
            kept = [rollout.kept(policy.compress(rollout.view, budget)) for policy in rows]
            biases = [torch.cat(own) for own in zip(*kept, strict=True)]
            found += rollout.losses(rollout.logprobs(biases))[0].tolist()
        if not all(map(math.isfinite, found)):
            name = self.prompts[at].id
            raise HarnessError(f"the roll-outs of prompt {name} have losses that are no numbers; try --dtype float32")
        return found

    def measure(self, stage: str, prompts: Sequence[int], roll: Callable[[int], Any]) -> Tensor:
        """Run `roll` on the prompts that the stage lacks, store what it finds, and return all of it: [P, ...] float32.

        roll: takes a prompt's place in `prompts` of the bench and returns numbers or nested lists of them.
        """
        left = [at for at in prompts if (stage, self.prompts[at].id) not in self.saved.found]
        with self.bar(stage, len(prompts), len(prompts) - len(left)) as bar:
            for at in left:
                self.saved.add(stage, self.prompts[at].id, roll(at))
                bar.update()
        return self.found(stage, prompts)

    def compare(self, stage: str, prompts: Sequence[int], compared: Sequence[tuple[int, Sequence[KVPolicy]]]) -> Tensor:
        """Measure the divergence of C candidates at each of N budgets: [P, N, C] float32, nats a token."""

        def roll(at: int) -> list[list[float]]:
            found = [self.divergences(at, own, budget) for budget, own in compared]
            if at in self._held:
                for layer in self._held[at].view.layers:
                    layer.forget()
            return found

        return self.measure(stage, prompts, roll)

    def found(self, stage: str, prompts: Sequence[int]) -> Tensor:
        """Return what a stage found on some prompts: [P, ...] float32."""
        return torch.tensor([self.saved.found[stage, self.prompts[at].id] for at in prompts])

    def bar(self, what: str, total: int, done: int) -> Any:
        slow = 0.5 if sys.stderr.isatty() else 30.0
        return tqdm(total=total, initial=done, desc=what, unit="prompt", mininterval=slow, dynamic_ncols=True)


def calibration_prompts(corpora: Sequence[Corpus], loaded: LoadedModel, spec: CalibrationSpec) -> list[Calibration]:
    """Return the prompts of a compilation, corpora in turn. Raises HarnessError for a context shorter than them."""
    if spec.lengths[1] + spec.answer > loaded.context:
        raise HarnessError(f"--lengths {spec.lengths} exceed the model's context of {loaded.context}; lower them")
    if spec.lengths[0] <= NEEDS.window:
        advice = "raise it, or take a model with a longer context"
        before = f"no token before the observation window of {NEEDS.window}"
        raise HarnessError(f"--lengths {spec.lengths[0]} has {before}; {advice}")
    tokenizer = TaskTokenizer(loaded.tokenizer)
    count = -(-spec.prompts // len(corpora))
    sized = partial(calibration_samples, count=count, lengths=spec.lengths, families=spec.families)
    every = [sized(corpus, tokenizer, seed=spec.seed) for corpus in corpora]
    found = []
    for sample in chain.from_iterable(zip(*every, strict=True)):
        wrapped = wrap(loaded.tokenizer, sample)
        answer = answer_tokens(loaded.tokenizer, wrapped, sample.answers[0], limit=spec.answer)
        loaded.check_ids(wrapped.ids, f"calibration sample {sample.id}")
        found.append(Calibration(sample.id, sample.meta["family"], wrapped.ids, answer, wrapped.needle))
    return found[: spec.prompts]
