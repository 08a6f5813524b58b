"""Compiles MatryoshkaKV's constants: bases by PCA, bases trained from them, and the order in which ranks fall.

Source: https://arxiv.org/abs/2410.14731 and its code (The-kamisato/MatryoshkaKV-cache 25b5f13). PCA of keys after RoPE
and of values, of every layer and head (eigenvalues_decomposition.py:74-131). Training: the bases stay orthogonal by a
Cayley map, the value means are free, every step draws a rank for every layer and head, keys and values apart, uniform
over eighths of the head; .25 KL from the frozen model plus .75 cross entropy (trainer.py:443-464). Ranks: those whose
fall changes the last hidden states least fall, three quarters of all a round (cal_adaptive_rate.py).

Differences: per KV head, not repeated to query heads. The prompt is prefilled by the full cache, as in a run, and what
follows it reads its latents. Trained is a turn of the PCA's basis, U = U0 (I - A/2)^-1 (I + A/2) from A = 0, which
needs no inverse map of U0; key means stay, as a change of one alters no softmax. Every step has two draws of ranks,
the second the first one's mirror. The order of falls is found on calibration prompts, not on the task's, with the
trained bases, and serves those of PCA too; ranks fall by eighths down to one.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from time import monotonic
from typing import Any, Self

import torch
from torch import Tensor

from harness.compiler.projected import LEVELS, SEEN, Bases, Projected, losses
from harness.compiler.ranks import ladder, levels_at
from harness.compiler.rollouts import Rollout
from harness.compiler.stage import Workbench
from harness.errors import HarnessError

MOMENTS = ("key_mean", "value_mean", "key_covariance", "value_covariance")
STEPS = 60
RATE = 3e-3
WARM_UP = 0.05
"""Share of the steps that the rate rises in; then it falls as a cosine."""
CLIP = 1.0
KL, CE = 0.25, 0.75
WINDOW = 128
"""Tokens of a step, at most half of what it is cut from: those before them are the prompt."""
SHARES = (0.25, 0.5, 0.75)
"""Mean ranks that are reported, of D*."""
HELD_OUT = 6
"""Windows that losses are reported on."""


def compile_constants(bench: Workbench, steps: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the constants and what is known of them. steps: of the training, 0 for PCA alone.

    Every stage is stored in the bench's folder once it is done. Raises HarnessError for heads without eighths, and for
    layers of several shapes.
    """
    found = stage(bench, "moments", lambda: dict(zip(MOMENTS, moments(bench, bench.training), strict=True)))
    energies, columns = zip(*(decomposed(found[name]) for name in MOMENTS[2:]), strict=True)
    kinds = {"pca": Bases(*columns, *(found[name].float() for name in MOMENTS[:2]))}
    report: dict[str, Any] = {"seconds": {"pca": found["seconds"]}}
    tensors = dict(zip(("key_energy", "value_energy"), energies, strict=True))
    if steps != 0:
        training = trained(bench, Training(kinds["pca"], STEPS if steps is None else steps))
        kinds["trained"] = training.bases().detached()
        report["seconds"]["training"] = round(training.seconds)
        report["training"] = {"steps": training.steps, "losses": training.curve()}
    last = [*kinds.values()][-1]
    falls = stage(bench, "ranks", lambda: {"order": ladder(bench, last)})
    report["seconds"]["ranks"] = falls["seconds"]
    tensors["order"] = falls["order"].to(torch.int16)
    for kind, bases in kinds.items():
        report[kind] = stage(bench, f"{kind}_held_out", partial(held_out, bench, bases, falls["order"]))
        half = {"keys": bases.keys.half(), "values": bases.values.half()}
        half |= {"key_mean": bases.key_mean, "value_mean": bases.value_mean}
        tensors |= {f"{kind}_{name}": own for name, own in half.items()}
    return {name: own.cpu().contiguous() for name, own in tensors.items()}, report


def stage(bench: Workbench, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `make` returns and the `seconds` it took, or what was stored when it was made before."""
    done = bench.saved.restore(f"matryoshka_{name}", Stage())
    if not done.found:
        start = monotonic()
        done.found = make()
        done.found["seconds"] = round(monotonic() - start)
        bench.saved.keep(f"matryoshka_{name}", done)
    return done.found


class Stage:
    """What a finished stage found: tensors and numbers by name."""

    def __init__(self) -> None:
        self.found = dict[str, Any]()

    def state(self) -> dict[str, Any]:
        return self.found

    def at(self, state: dict[str, Any]) -> Self:
        self.found = dict(state)
        return self


def moments(bench: Workbench, prompts: Sequence[int]) -> list[Tensor]:
    """Means [L, H, D*] and covariances [L, H, D*, D*] over some prompts' tokens, as `MOMENTS` names them: float64."""
    count, sums, squares = 0, list[Tensor](), list[Tensor]()
    with bench.bar("moments", len(prompts), 0) as bar:
        for at in prompts:
            view = bench.engine.prefill(bench.prompts[at].ids, SEEN).view
            own = [[kv.keys[0].double(), kv.values[0].double()] for kv in (layer.kv for layer in view.layers)]
            if len({(keys.shape, values.shape) for keys, values in own}) > 1:
                raise HarnessError("matryoshkakv needs layers of one shape; this model's have several")
            for kind in (0, 1):
                x = torch.stack([layer[kind] for layer in own])  # [L, H, T, D*]
                added = x.sum(dim=2), x.transpose(2, 3) @ x
                if len(sums) == kind:
                    sums.append(torch.zeros_like(added[0]))
                    squares.append(torch.zeros_like(added[1]))
                sums[kind] += added[0]
                squares[kind] += added[1]
            count += view.tokens
            bar.update()
    means = [own / count for own in sums]
    outer = [mean.unsqueeze(3) * mean.unsqueeze(2) for mean in means]
    return [*means, *(own / count - both for own, both in zip(squares, outer, strict=True))]


def decomposed(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., D*], falling, and their vectors as columns [..., D*, D*], float32."""
    if covariance.shape[-1] % LEVELS:
        raise HarnessError(f"matryoshkakv cuts heads to eighths; this model's have {covariance.shape[-1]} numbers")
    if not bool(covariance.isfinite().all()):
        raise HarnessError("keys or values of calibration prompts are no numbers; try --dtype float32")
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(-1).clamp(min=0).float(), vectors.flip(-1).float()


def cayley(free: Tensor) -> Tensor:
    """The rotations (I - A/2)^-1 (I + A/2) of A = X - X^T, of X [..., D, D]."""
    half = (free - free.transpose(-1, -2)) / 2
    one = torch.eye(free.shape[-1], device=free.device, dtype=free.dtype)
    turned: Tensor = torch.linalg.solve(one - half, one + half)
    return turned


class Training:
    """Turns of PCA's bases, and value means. losses: (.25 KL + .75 CE, KL, CE) of every step taken, nats a token."""

    def __init__(self, pca: Bases, steps: int) -> None:
        self.pca, self.steps, self.seconds = pca, steps, 0.0
        self.losses = list[tuple[float, float, float]]()
        self.free = [torch.zeros_like(pca.keys), torch.zeros_like(pca.values), pca.value_mean.clone()]
        for own in self.free:
            own.requires_grad_()
        self._optimizer = torch.optim.Adam(self.free, lr=RATE)

    def bases(self) -> Bases:
        keys, values, mean = self.free
        return Bases(self.pca.keys @ cayley(keys), self.pca.values @ cayley(values), self.pca.key_mean, mean)

    def state(self) -> dict[str, Any]:
        """Return everything that `at` needs to go on from here: tensors, numbers and lists."""
        free = [own.detach().clone() for own in self.free]
        return {"free": free, "losses": self.losses, "seconds": self.seconds, "optimizer": self._optimizer.state_dict()}

    def at(self, state: dict[str, Any]) -> Self:
        """Return this training as it was when `state` was taken."""
        with torch.no_grad():
            for own, stored in zip(self.free, state["free"], strict=True):
                own.copy_(stored)
        self.losses = [(one[0], one[1], one[2]) for one in state["losses"]]
        self.seconds = state["seconds"]
        self._optimizer.load_state_dict(state["optimizer"])
        return self

    def step(self, rollout: Rollout, draws: torch.Generator) -> None:
        """Take one step at ranks that `draws` gives, and at their mirror."""
        bases = self.bases()
        levels = torch.randint(1, LEVELS + 1, bases.full().shape, generator=draws).to(bases.keys.device)
        rows = torch.stack([levels, LEVELS + 1 - levels])
        divergence, nll = rollout.losses(Projected(rollout, bases).logprobs(rows, grad=True))
        found = torch.stack([KL * divergence + CE * nll, divergence, nll]).mean(dim=1)
        if not bool(found.isfinite().all()):
            raise HarnessError(f"step {len(self.losses)} has losses {found.tolist()}; try --dtype float32")
        self._optimizer.zero_grad()
        found[0].backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.free, CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = RATE * rate_at(len(self.losses), self.steps)
        self._optimizer.step()
        self.losses.append((found[0].item(), found[1].item(), found[2].item()))

    def curve(self) -> list[list[float]]:
        """Mean losses of each eighth of the steps."""
        size = math.ceil(len(self.losses) / 8)
        parts = [self.losses[start : start + size] for start in range(0, len(self.losses), size)]
        return [[round(sum(own) / len(part), 4) for own in zip(*part, strict=True)] for part in parts]


def rate_at(step: int, steps: int) -> float:
    """The rate of a step, as a share of the highest."""
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def trained(bench: Workbench, training: Training) -> Training:
    """Take all steps that are left, each on a piece of one training prompt. Its state is stored as it goes."""
    training = bench.saved.restore("matryoshka_training", training)
    for parameter in bench.loaded.model.parameters():
        parameter.requires_grad_(False)
    done = len(training.losses)
    with bench.bar("training", training.steps, done) as bar:
        for step in range(done, training.steps):
            start = monotonic()
            draws = torch.Generator().manual_seed(bench.spec.seed * 1_000_003 + step)
            training.step(piece(bench, bench.training, step), draws)
            training.seconds += monotonic() - start
            if step % 10 == 9:
                bench.saved.keep("matryoshka_training", training)
            bar.update()
    bench.saved.keep("matryoshka_training", training)
    return training


def piece(bench: Workbench, prompts: Sequence[int], step: int) -> Rollout:
    """A roll-out of a window of one of the prompts, turn about; every second is of the end, where the answer is."""
    draw = Random(f"{bench.spec.seed}/{step // len(prompts)}")
    at = draw.sample(prompts, len(prompts))[step % len(prompts)]
    ids = [*bench.prompts[at].ids, *bench.prompts[at].answer]
    end = len(ids) if step % 2 else Random(f"{bench.spec.seed}/{step}/end").randint(min(64, len(ids)), len(ids))
    window = min(WINDOW, end // 2)
    return Rollout(bench.engine, ids[: end - window], ids[end - window : end], SEEN)


def held_out(bench: Workbench, bases: Bases, order: Tensor) -> dict[str, Any]:
    """(KL, NLL) at mean ranks of `SHARES` on windows of validation prompts: as ranks fall, and all alike."""
    levels = [levels_at(bases, order, share) for share in SHARES]
    alike = [torch.full_like(bases.full(), round(share * LEVELS)) for share in SHARES]
    found = []
    with bench.bar("held out", HELD_OUT, 0) as bar:
        for at in range(HELD_OUT):
            found.append(losses(piece(bench, bench.validation, at), bases, [bases.full(), *levels, *alike]))
            bar.update()
    numbers = torch.stack(found).mean(dim=0).T.tolist()  # [1 + 2 * shares, 2]
    names = ["full", *(f"{share:g}" for share in SHARES), *(f"{share:g} alike" for share in SHARES)]
    return {name: [round(own, 4) for own in pair] for name, pair in zip(names, numbers, strict=True)}
