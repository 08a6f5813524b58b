"""The probes of KVzap: what they make of hidden states. Letters as in `methods.base`, and E: width of the model."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from torch.nn.functional import gelu

Probe = Literal["linear", "mlp"]
PARTS = {"linear": ("linear",), "mlp": ("up", "down")}
"""Linear maps of each probe, one after the other; every one but the last is followed by a GELU."""


def names(probe: Probe) -> list[str]:
    """Return the names of a probe's constants: [L, out, in] and [L, out] of each of its linear maps."""
    return [f"{probe}.{part}.{kind}" for part in PARTS[probe] for kind in ("weight", "bias")]


def logits(hidden: Tensor, constants: Mapping[str, Tensor], probe: Probe) -> Tensor:
    """Return the predicted logarithms of scores [L, T, H], of hidden states [L, T, E] and constants of L layers."""
    for part in PARTS[probe]:
        weight, bias = (constants[f"{probe}.{part}.{kind}"] for kind in ("weight", "bias"))
        hidden = hidden @ weight.transpose(1, 2) + bias.unsqueeze(1)
        if part != PARTS[probe][-1]:
            hidden = gelu(hidden)
    return hidden
