"""SimLayerKV: lazy layers, which look at the first and the latest tokens alone, keep only those; the others keep all.

Source: https://arxiv.org/abs/2410.13846 and its released code (4 first and 1024 recent tokens). A layer is the lazier,
the more of the last prompt query's attention (`window`; mean over all query heads) goes to the tokens that lazy layers
keep. The authors call a layer lazy above a threshold, found for each model (.9 for Llama 3, .8 Mistral, .85 Qwen), so
that the prompt decides the bytes.
Differences: here the budget does. The least lazy layers stay whole, as many as it pays for while every other holds
`share` of the mean budget, or the first and `recent` tokens where that is less; what is left over gives the lazy ones
more recent tokens; of the shares up to this one it lost least on calibration prompts, as a whole layer takes much from
the others. So no threshold is taken, and laziness is measured over what a lazy layer would keep. A lazy layer's
window does not slide on while decoding. kvpress's press asks for a threshold and no budget, measures one recent token
more than it keeps, and with its default threshold of 1 drops nothing; given one, it keeps the same layers whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from methods.base import KV, KVPolicy, Needs, PromptView, Sizes, at_least, at_most, spread
from methods.device import read
from methods.registry import method
from methods.streamingllm import StreamingLLM

CHOICES = {
    "sinks": (1, 4, 16),
    "recent": (64, 256, 1024),
    "window": (1, 8, 32),
    "share": (0.1, 0.25, 0.5, 0.75, 0.9),
}
CODE = "https://github.com/sail-sg/SimLayerKV at 1fb6bda"


@method("simlayerkv", paper="https://arxiv.org/abs/2410.13846", code=CODE, choices=CHOICES)
@dataclass(frozen=True)
class SimLayerKV(KVPolicy):
    """Layers whole where they look beyond the first and latest tokens, those tokens elsewhere.

    share: the part of the mean budget that a lazy layer holds at least. window: queries that tell laziness.
    """

    sinks: int = 4
    recent: int = 1024
    window: int = 1
    share: float = 0.9

    def __post_init__(self) -> None:
        at_least(self, 1, "recent", "window")
        at_least(self, 0, "sinks", "share")
        at_most(self, 1, "share")

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    def lazy_slots(self, budget: int) -> int:
        """Return what a lazy layer holds at least, at a mean budget."""
        return max(1, min(self.sinks + self.recent, int(self.share * budget)))

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        lazy = self.lazy_slots(budget)
        sinks = min(self.sinks, lazy)
        mass = []
        for layer in view.layers:
            attention = layer.finite(layer.attention(self.window).mean(dim=(0, 1, 2, 3)), "attention weights")
            latest = max(sinks, view.tokens - (lazy - sinks))
            mass.append(attention[:sinks].sum() + attention[latest:].sum())
        live = torch.stack([layer.kv.live[0, 0] for layer in view.layers])
        found, held = read([torch.stack(mass), live.float()])
        slots = slots_of_layers(found, [int(own) for own in held], lazy, min(budget, view.tokens) * len(held))
        ends = StreamingLLM(sinks=self.sinks)
        return [ends.compress_layer(layer, own) for layer, own in zip(view.layers, slots, strict=True)]

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        lazy, tokens, layers = self.lazy_slots(budget), sizes.tokens, sizes.layers
        none = budget < tokens and tokens + (layers - 1) * lazy > budget * layers
        return ("every layer is lazy: this budget pays for no whole one",) if none else ()


def slots_of_layers(mass: Sequence[float], held: Sequence[int], lazy: int, total: int) -> list[int]:
    """Return the slots of each layer, `total` in all where layers hold as many.

    mass: how lazy each is. held: the tokens that it has. lazy: what each lazy one gets at least.
    """
    slots, order = [0] * len(mass), sorted(range(len(mass)), key=lambda i: mass[i])
    for place, i in enumerate(order):
        rest = order[place + 1 :]
        if total - held[i] < len(rest) * lazy:
            latest = order[place:]
            own = spread(total, [1] * len(latest), [held[j] for j in latest])
            for j, count in zip(latest, own, strict=True):
                slots[j] = count
            break
        slots[i], total = held[i], total - held[i]
    return slots
