"""Compile every Triton kernel for cards that are not there, and print the shared memory that each asks for.

In a process of its own: `TRITON_INTERPRET` must not be set. Run: python -m tests.engine.compiled_kernels
"""

import json
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harness.engine import triton_kernels, triton_parts

CARDS = (80, 90)  # A100; H100 and H200
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
FLOATS = ("scale", "cap")


def shared_bytes(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], card: int) -> int:
    """Of one kernel. pointers: what each points to; the other arguments are integers, but for `FLOATS`."""
    kinds = pointers | dict.fromkeys(constants, "constexpr") | dict.fromkeys(FLOATS, "fp32")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    known = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=known)
    return int(triton.compile(source, target=GPUTarget("cuda", card, 32)).metadata.shared)


def kernels(dtype: torch.dtype, dim: int) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Every kernel with what its arguments point to and its constants."""
    x, scales = f"*{NAMES[dtype]}", "*bf16" if dtype == torch.bfloat16 else "*fp16"
    rows, columns = triton_parts.blocks(dim, dtype)
    found, shape = dict.fromkeys(("parts", "lse"), "*fp32"), {"CAPPED": True, "DIM": dim}
    asked, both, stream = {"q": x, "k": x, "v": x}, {"BM": rows, "BN": columns}, {"GROUP": 16, "BN": columns}
    coded = dict.fromkeys(("k", "v"), "*u8") | dict.fromkeys(("ks", "kz", "vs", "vz"), scales)
    codes = {"BITS": 4, "SPAN": 32, "CHANNELS": 32}
    of_streams = asked | found | {"out": "*fp32"}
    return [
        (triton_kernels._forward, asked | found | {"out": x, "sinks": x}, shape | both | {"SINKS": True}),
        (triton_kernels._sums, asked | found | {"out": "*fp32"}, shape | both),
        (triton_kernels._ragged, of_streams | dict.fromkeys(("starts", "lengths"), "*i32"), shape | stream),
        (triton_parts._coded, of_streams | coded | {"index": "*i32"}, shape | stream | codes),
        (triton_kernels._join, found | {"sinks": x, "out": x}, {"DIM": dim, "MOST": 64, "SINKS": True}),
    ]


if __name__ == "__main__":
    most: dict[str, int] = {}
    for card, (dtype, dim) in product(CARDS, [(torch.bfloat16, 128), (torch.float32, 256)]):
        for kernel, pointers, constants in kernels(dtype, dim):
            name = f"{kernel.__name__} {NAMES[dtype]} {dim} sm_{card}"
            pointers = {key: own for key, own in pointers.items() if key in kernel.arg_names}
            most[name] = shared_bytes(kernel, pointers, constants, card)
    print(json.dumps(most))
