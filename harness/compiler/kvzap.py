"""Probes of KVzap: from what goes into a layer's attention to the logarithm of what KVzip+ gives each token.

Source: https://arxiv.org/abs/2601.07891, kvzap/train.py and kvzap/data.py at kvpress 8bb29b9: some tokens of each
text, a ridge regression (weight 1) for each layer, and an MLP of one hidden layer by AdamW with a falling step size,
batches of 512, 15 epochs. Differences: the texts are the calibration prompts; the hidden layer has an eighth of the
model's width, as theirs of 512 has for a model of 4096; scores are those of `methods.repeat`, where queries of the
request count, too; the MLP starts at the mean scores.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from harness.compiler.stage import Workbench
from harness.errors import HarnessError
from methods.base import Needs
from methods.kvzap_probe import Probe, logits, names
from methods.repeat import WHOLE, Repeat, repeated

PLUS = Repeat(chunk=WHOLE, normed=True)
NEEDS = Needs(hidden_states=True, repeat=frozenset({PLUS}))
TOKENS, BATCH, EPOCHS, RATE, CLIP = 256, 512, 15, 5e-3, 1.0
SHRINK = 8  # hidden width: the model's over this
PROBES: tuple[Probe, ...] = ("linear", "mlp")
LEAST = 1e-30  # of a score, whose logarithm is taken

Samples = tuple[Tensor, Tensor]
"""Hidden states [L, n, E] in the model's type and logarithms of scores [L, n, H] float32, of n tokens."""


def compile_constants(bench: Workbench, steps: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the probes of a model, float16, and how well they tell held-out scores. steps: epochs of the MLP.

    Raises HarnessError for scores or probes that are not finite.
    """
    train, held = _samples(bench, bench.training, "kvzap"), _samples(bench, bench.validation, "kvzap, held out")
    constants = _ridge(*train) | _trained(*train, epochs=steps or EPOCHS, seed=bench.spec.seed)
    if not all(bool(own.isfinite().all()) for own in constants.values()):
        raise HarnessError("probes of kvzap are NaN or infinite; try --dtype float32")
    told = {probe: _correlations(constants, probe, held) for probe in PROBES}
    return constants, {
        "correlation": {probe: round(sum(own) / len(own), 4) for probe, own in told.items()},
        "correlation_of_layers": told,
        "epochs": steps or EPOCHS,
        "training_tokens": train[0].shape[1],
        "held_out_tokens": held[0].shape[1],
    }


def _samples(bench: Workbench, prompts: Sequence[int], stage: str) -> Samples:
    """Some tokens of each prompt, the same whenever it is asked for."""
    hidden, scores = list[Tensor](), list[Tensor]()
    with bench.bar(stage, len(prompts), 0) as bar:
        for at in prompts:
            own = _tokens(bench, at)
            hidden.append(own[0])
            scores.append(own[1])
            bar.update()
    return torch.cat(hidden, dim=1), torch.cat(scores, dim=1)


def _tokens(bench: Workbench, at: int) -> Samples:
    view = bench.engine.prefill(bench.prompts[at].ids, NEEDS).view
    first = repeated(view.layers[0], PLUS)
    draws = torch.Generator().manual_seed(bench.spec.seed * 1_000_003 + at)
    chosen = first.start + torch.randperm(first.end - first.start, generator=draws)[:TOKENS]
    hidden, scores = list[Tensor](), list[Tensor]()
    for layer in view.layers:
        assert layer.source is not None
        received = repeated(layer, PLUS).received.amax(dim=2)[0].cpu()  # [H, T]
        hidden.append(layer.source.hidden[0].cpu()[chosen])
        scores.append(received[:, chosen].clamp(min=LEAST).log().t())
    found = torch.stack(scores)
    if not bool(found.isfinite().all()):
        raise HarnessError(f"scores of prompt {bench.prompts[at].id} are NaN or infinite; try --dtype float32")
    return torch.stack(hidden), found


def _ridge(hidden: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """Weights [L, H, E] and biases [L, H] of a linear probe of each layer."""
    weights, biases = list[Tensor](), list[Tensor]()
    for own, wanted in zip(hidden, scores, strict=True):
        x, mean = own.double() - own.double().mean(dim=0), wanted.double().mean(dim=0)
        found = torch.linalg.solve(x.t() @ x + torch.eye(x.shape[1]), x.t() @ (wanted - mean))  # [E, H]
        weights.append(found.t())
        biases.append(mean - own.double().mean(dim=0) @ found)
    found = dict(zip(names("linear"), (torch.stack(weights), torch.stack(biases)), strict=True))
    return {name: x.half() for name, x in found.items()}


def _trained(hidden: Tensor, scores: Tensor, *, epochs: int, seed: int) -> dict[str, Tensor]:
    """Weights and biases of an MLP of each layer, trained at once; it starts at the mean score of each head."""
    (layers, tokens, width), draws = hidden.shape, torch.Generator().manual_seed(seed)
    inner, heads = max(1, width // SHRINK), scores.shape[2]

    def drawn(*shape: int, fan: int) -> Tensor:
        return (2 * torch.rand(layers, *shape, generator=draws) - 1) / math.sqrt(fan)

    own = [drawn(inner, width, fan=width), drawn(inner, fan=width), drawn(heads, inner, fan=inner), scores.mean(dim=1)]
    constants = {name: x.requires_grad_() for name, x in zip(names("mlp"), own, strict=True)}
    descent = torch.optim.AdamW(constants.values(), lr=RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(descent, epochs)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(tokens, generator=draws), BATCH):
                descent.zero_grad()
                loss = mse_loss(logits(hidden[:, rows].float(), constants, "mlp"), scores[:, rows])
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(constants.values(), CLIP)
                descent.step()
            falling.step()
    return {name: x.detach().half() for name, x in constants.items()}


def _correlations(constants: dict[str, Tensor], probe: Probe, held: Samples) -> list[float]:
    """Pearson's correlation of each layer's predicted and true scores, averaged over its KV heads."""
    hidden, scores = held
    told = logits(hidden.float(), {name: x.float() for name, x in constants.items()}, probe)
    pairs = torch.stack([told, scores]).double()  # [2, L, n, H]
    apart = pairs - pairs.mean(dim=2, keepdim=True)
    both = (apart[0] * apart[1]).sum(dim=1) / apart.norm(dim=2).prod(dim=0)
    return [round(float(own), 4) for own in both.mean(dim=1)]
