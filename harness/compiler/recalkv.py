"""`harness compile recalkv`: the bases that ReCalKV's latents of keys and values are cut from, and what ranks follow.

Source: https://arxiv.org/abs/2505.24357 and https://github.com/XIANGLONGYAN/ReCalKV at ea548d5. With W [M, E] what
makes the M = g * D keys of a group of heads (or the values of all heads), X the layer's calibration inputs and S S^T =
X^T X, its low-rank form comes from W S = U Sigma V^T: L = U Sigma^(1/2), R = Sigma^(1/2) V^T S^-1. Then L R = U U^T W,
so the first r columns of U are all that rank r needs, and its latents are U^T of the keys themselves, each but for a
factor.

Keys: groups of `GROUP` heads at most that are most alike by linear CKA of their whitened weights
(svd_linear.py:295-450 there). Values: all heads of a layer are one group, as in its released path
(decomposition.py:602-613). Its calibration of values alternates L = argmin |X R^T L^T - X W^T| and R = L^+ W from that
same start. L has the span of U after the first step and R = U^T W up to a factor after the second: the start is where
it ends, of all inputs it is the best of its rank, and it is nested in r. What is left to gain is better inputs: these
are all the prompt's, where the authors' are sums over 8 texts (1051-1055). So one basis serves every rank, keys and
values alike.

Fisher information: the root of the mean square gradient of the text's loss on the weights that make keys and values
(rank_search.py:82-87), here a mean for each KV head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.compiler.stage import Workbench
from harness.engine.transformers_seam import ATTENTION
from harness.errors import HarnessError
from methods.base import Needs

GROUP = 4
FISHER_PROMPTS = 32
REPORTED = (0.25, 0.5, 0.75)
"""Shares of the full rank whose error is reported."""
CLOSE = 0.05
"""Of the largest key: how far half precision may take one from what its projection gives."""


def compile_constants(bench: Workbench, steps: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the constants of `methods.recalkv` and a report of errors on held-out inputs.

    steps: prompts whose gradients are taken, 32 at most when left out. Raises HarnessError for a model whose keys are
    no linear map of a layer's input and RoPE.
    """
    modules = projections(bench)
    count = min(len(bench.training), FISHER_PROMPTS if steps is None else steps)
    moments, fisher = gathered(bench, modules, bench.training, count)
    held_out, _ = gathered(bench, modules, bench.validation, 0)
    heads = bench.shapes.kv_heads
    size = next(own for own in range(min(GROUP, heads), 0, -1) if heads % own == 0)
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("key_order", "key_bases", "value_bases", "key_bias", "value_bias")
    }
    errors: dict[str, list[Tensor]] = {"keys": [], "values": []}
    for module, moment, other in zip(modules, moments, held_out, strict=True):
        factor = whitener(moment)
        key, value = (own.weight.detach().double().cpu() for own in (module.k_proj, module.v_proj))
        similarity = cka((key @ factor).view(heads, -1, factor.shape[1]))
        order = torch.tensor(grouped(similarity, size))  # [n, g]
        grouped_keys = key.view(heads, -1, key.shape[1])[order].flatten(1, 2)  # [n, g * D, E]
        bases = {"key": basis(grouped_keys @ factor), "value": basis((value @ factor).unsqueeze(0))}
        found["key_order"].append(order.flatten())
        found["key_bases"].append(bases["key"].half())
        found["value_bases"].append(bases["value"][0].half())
        for name, bias in (("key_bias", bias_of(module.k_proj)), ("value_bias", bias_of(module.v_proj))):
            found[name].append(bias)
        for name, weight in (("key", grouped_keys), ("value", value.unsqueeze(0))):
            plain = torch.linalg.svd(weight, full_matrices=True).U
            errors[f"{name}s"].append(torch.stack([lost(own, weight, other) for own in (plain, bases[name])]))
    tensors = {name: torch.stack(own) for name, own in found.items()} | {"fisher": fisher}
    report = {
        "group": size,
        "inputs": int(sum(len(bench.prompts[at].ids) for at in bench.training)),
        "fisher_prompts": count,
        "held_out_error": {name: reported(torch.stack(own)) for name, own in errors.items()},
    }
    return tensors, report


def projections(bench: Workbench) -> list[Any]:
    """Return the attention modules that policies see the layers of, in their order.

    Raises HarnessError where keys are not `k_proj` of the input under RoPE, or values not `v_proj`: at position 0 RoPE
    turns nothing.
    """
    model = bench.engine.model
    modules = [model.attention[i] for i in model.compressible]
    name = f"recalkv needs keys that are k_proj of a layer's input under RoPE; {type(modules[0]).__name__}"
    maps = [getattr(module, f"{own}_proj", None) for module in modules for own in ("k", "v")]
    if not all(isinstance(own, nn.Linear) for own in maps) or len(set(modules)) < len(modules):
        raise HarnessError(f"{name} has no such map of its own in every layer; it cannot be compiled")
    view = bench.engine.prefill(bench.prompts[0].ids[:8], Needs(window=1, hidden_states=True)).view
    for layer in view.layers:
        assert layer.source is not None
        own: Any = layer.source.module
        hidden = layer.source.hidden[:, :1]
        for kind, seen in (("k", layer.kv.keys), ("v", layer.kv.values)):
            made = getattr(own, f"{kind}_proj")(hidden).view(seen.shape[1], -1).float()
            if float((made - seen[0, :, 0].float()).abs().max()) > CLOSE * float(made.abs().max()):
                raise HarnessError(f"{name} does more to them, such as a norm; it cannot be compiled")
    return modules


def gathered(
    bench: Workbench, modules: Sequence[Any], prompts: Sequence[int], count: int
) -> tuple[list[Tensor], Tensor]:
    """Return each layer's X^T X [E, E] float32 over all tokens of `prompts`, and the Fisher information [L, 2, H].

    count: prompts, the first ones, whose gradients are taken: the loss is that of every token of the prompt.
    """
    weights = [getattr(module, f"{own}_proj").weight for module in modules for own in ("k", "v")]
    squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    moments = [weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32) for weight in weights[::2]]
    with bench.bar("recalkv", len(prompts), 0) as bar, _own_attention(bench), _inputs(modules, moments):
        for number, at in enumerate(prompts):
            ids = torch.tensor([list(bench.prompts[at].ids)], device=bench.loaded.model.device)
            if number < count:
                for square, grad in zip(squares, _gradients(bench.loaded.model, ids, weights), strict=True):
                    square += grad.float().square()
            else:
                with torch.no_grad():
                    bench.loaded.model.get_decoder()(input_ids=ids, use_cache=False)
            bar.update()
    roots = [(own / max(1, count)).sqrt().view(bench.shapes.kv_heads, -1).mean(dim=1) for own in squares]
    return [own.cpu() for own in moments], torch.stack(roots).view(len(modules), 2, -1).cpu()


def _gradients(model: Any, ids: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    for weight in weights:
        weight.requires_grad_(True)
    try:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss, list(weights))
    finally:
        for weight in weights:
            weight.requires_grad_(False)


@contextmanager
def _inputs(modules: Sequence[Any], moments: Sequence[Tensor]) -> Iterator[None]:
    """Add the second moments of what goes into each module's projections while the model runs inside."""

    def added(moment: Tensor) -> Any:
        def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            hidden = given[0].detach().flatten(0, -2).float()
            moment.addmm_(hidden.T, hidden)

        return note

    hooks = [m.k_proj.register_forward_pre_hook(added(own)) for m, own in zip(modules, moments, strict=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _own_attention(bench: Workbench) -> Iterator[None]:
    """The model with attention that gradients flow through."""
    model = bench.loaded.model
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION)


def whitener(moment: Tensor) -> Tensor:
    """Return S [E, E] float64 with S S^T = `moment`: eigenvectors times the roots of their values, as the authors'."""
    values, vectors = torch.linalg.eigh(moment.double())
    found: Tensor = vectors * values.clamp(min=0).sqrt()
    return found.flip(1)


def basis(whitened: Tensor) -> Tensor:
    """Return U [..., M, M] of W S [..., M, E]: what keeps most of the outputs in its first r columns, for every r."""
    found: Tensor = torch.linalg.eigh(whitened @ whitened.transpose(-1, -2)).eigenvectors
    return found.flip(-1)


def cka(whitened: Tensor) -> Tensor:
    """Return the linear CKA of every two heads' W S [H, D, E], means over E taken off: [H, H], 1 on the diagonal."""
    centred = whitened - whitened.mean(dim=2, keepdim=True)
    products = torch.einsum("ade,bfe->abdf", centred, centred).square().sum(dim=(2, 3))  # HSIC but for (E - 1)^2
    own = products.diagonal().sqrt()
    return products / (own[:, None] * own[None, :])


def grouped(similarity: Tensor, size: int) -> list[list[int]]:
    """Return groups of `size` heads: pairs from the most alike on found a group or join the group of one of them.

    As svd_linear.py:391-450: a pair that makes a group too large gives its second head to another one in the end.
    """
    heads = len(similarity)
    groups: list[list[int]] = [[] for _ in range(heads // size)]
    pairs = [(i, j) for i in range(heads) for j in range(i + 1, heads)]
    of: dict[int, list[int]] = {}
    for i, j in sorted(pairs, key=lambda pair: -float(similarity[pair])):
        free = [head for head in (i, j) if head not in of]
        own = of.get(i) or of.get(j) or next(group for group in groups if len(group) < size)
        if free and len(own) < size:  # a pair may make it one too many
            own += free
            of.update(dict.fromkeys(free, own))
    left = [head for head in range(heads) if head not in of]
    for head in [*reversed(left), *(group.pop() for group in groups if len(group) > size)]:
        next(group for group in groups if len(group) < size).append(head)
    return groups


def bias_of(linear: nn.Linear) -> Tensor:
    """Return the bias of a projection, float32; zeros where it has none."""
    none = torch.zeros(linear.out_features)
    return none if linear.bias is None else linear.bias.detach().float().cpu()


def lost(bases: Tensor, weight: Tensor, moment: Tensor) -> Tensor:
    """Return the relative square error of the outputs at each reported share of the rank: [shares] float64.

    bases: [n, M, M]. weight: [n, M, E]. moment: of the inputs.
    """
    kept = torch.einsum("nmr,nme,ef,nfr->nr", bases, weight, moment.double(), weight.transpose(1, 2) @ bases)
    size = kept.shape[1]
    return torch.stack([1 - kept[:, : round(share * size)].sum() / kept.sum() for share in REPORTED])


def reported(errors: Tensor) -> dict[str, dict[str, float]]:
    """Return the mean over layers of errors [L, 2, shares], by share."""
    means = errors.mean(dim=0).tolist()
    return {str(share): {"svd": means[0][i], "whitened": means[1][i]} for i, share in enumerate(REPORTED)}
