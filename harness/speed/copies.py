"""Copies of compressed prompts, so that a large batch needs few prefills.

A copy has storage of its own, so a batch of copies takes the memory and the steps of one of different prompts, but for
one thing. A layer whose heads differ in size has other sizes in every prompt, and a CPU decodes streams of equal size
together, which would flatter such a method. So every head of a copied layer of that kind gives up a few of its oldest
slots, a sixteenth at most and drawn by a seed. Codes keep their sizes.
"""

from copy import deepcopy
from dataclasses import replace

import torch

from harness.engine.compress import Compressed
from harness.engine.packed import Packed
from methods.base import KV

SHARE = 16


def copied(prompt: Compressed, seed: int) -> Compressed:
    """Return a prompt that decodes as the given one, which must not have given up its layers yet."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        layers = [_copied(layer, drawn) for layer in prompt.layers]
        return replace(prompt, layers=layers, logits=prompt.logits.clone())


def _copied(layer: Packed | KV, drawn: torch.Generator) -> Packed | KV:
    if not isinstance(layer, Packed) or layer.coded is not None or len(set(layer.sizes)) == 1:
        return deepcopy(layer)
    sizes = tuple(_fewer(size, drawn) for size in layer.sizes)
    there = [torch.arange(size) >= size - left for size, left in zip(layer.sizes, sizes, strict=True)]
    own = torch.cat(there).to(layer.keys.device)
    return replace(
        layer,
        keys=layer.keys[own],
        values=layer.values[own],
        positions=None if layer.positions is None else layer.positions[own],
        sizes=sizes,
        plain=sizes,
        side={name: x[own] for name, x in layer.side.items()},
        beside={name: x.clone() for name, x in layer.beside.items()},
    )


def _fewer(size: int, drawn: torch.Generator) -> int:
    """Slots that are left to a head; none loses its last."""
    less = int(torch.randint(max(1, size // SHARE) + 1, (), generator=drawn))
    return size - less if size > 1 else size
