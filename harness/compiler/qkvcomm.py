"""`harness compile qkvcomm`: how much the keys and values of each layer suffer from few bits.

Source: https://arxiv.org/abs/2512.17914, Algorithm 1; `methods.qkvcomm` says what is made of it. As the authors', over
100 texts of at most 512 tokens.
"""

from typing import Any

import torch
from torch import Tensor

from harness.compiler.stage import Workbench
from methods.base import KV, Needs
from methods.qkvcomm import HIGH, LOW, MIDDLE, PerTensor, bits_of

TEXTS, TOKENS = 100, 512
BITS = (LOW, MIDDLE, HIGH)


def compile_constants(bench: Workbench, steps: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the constants of `methods.qkvcomm`, and a report of mean square errors on validation prompts.

    steps: texts, 100 at most when left out; those of the training prompts.
    """
    texts = bench.training[: TEXTS if steps is None else steps]

    def errors(at: int) -> list[list[float]]:
        view = bench.engine.prefill(bench.prompts[at].ids[:TOKENS], Needs(window=1)).view
        return [[float(square_error(layer.kv, bits)) for bits in BITS] for layer in view.layers]

    sensitivity = bench.measure("sensitivity", texts, errors)[:, :, 0].mean(dim=0)
    layers = bench.engine.model.compressible
    found = bench.measure("sensitivity", bench.validation, errors).mean(dim=0)  # [L, 3]
    chosen = bits_of(dict(zip(layers, sensitivity.tolist(), strict=True)))
    own = found[range(len(layers)), [BITS.index(chosen[layer]) for layer in layers]]
    error = {f"all {bits} bits": float(found[:, i].mean()) for i, bits in enumerate(BITS)}
    report = {
        "texts": len(texts),
        "bits": list(chosen.values()),
        "mean_square_error": {"ranked": float(own.mean())} | error,
    }
    return {"layers": torch.tensor(layers), "sensitivity": sensitivity}, report


def square_error(kv: KV, bits: int) -> Tensor:
    """Return the mean square error of a layer's keys, plus that of its values, as codes: [] float32."""
    heads = kv.keys.shape[1]
    made = PerTensor(bits, heads).encode(kv.keys[0], kv.values[0], kv.positions[0])
    out = [torch.empty_like(x[0]) for x in (kv.keys, kv.values)]
    made.decode(out[0], out[1], kv.positions[0])
    return sum(((a[0].float() - b.float()) ** 2).mean() for a, b in zip((kv.keys, kv.values), out, strict=True))  # type: ignore[return-value]
