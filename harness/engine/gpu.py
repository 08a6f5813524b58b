"""What attention runs by on a GPU: flash attention where it takes the form, else kernels of our own, in Triton.

No card has run this file yet: its choices are tested on a CPU that is taken for a GPU, its Triton kernels by Triton's
interpreter, and the call of flash attention by a stand-in with its arguments.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from methods.views import Form

HALF = (torch.float16, torch.bfloat16)
WIDEST = 256  # head dimension that flash attention takes


@cache
def installed(name: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(name) is not None


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def fused(device: torch.device) -> bool:
    """Whether kernels of our own run there. Triton comes with PyTorch for CUDA on Linux."""
    return is_gpu(device) and installed("triton")


def flash_takes(queries: Tensor, values: Tensor, form: Form) -> bool:
    """Whether flash attention takes a prompt of this form; sinks can be added to what it gives, soft caps cannot.

    PyTorch's own has no window; that of the package `flash-attn` has.
    """
    dim, device = queries.shape[-1], queries.device
    if queries.dtype not in HALF or form.softcap is not None or dim != values.shape[-1] or dim % 8 or dim > WIDEST:
        return False
    return (form.window is None or installed("flash_attn")) and torch.cuda.get_device_capability(device) >= (8, 0)


def flash(queries: Tensor, keys: Tensor, values: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Causal attention of the last Q of S tokens: [B, Hq, Q, D], and log denominators [B, Hq, Q] float32, natural.

    Both kernels take fewer KV heads than query heads, and end the causal mask at the last token, whatever Q is.
    """
    if installed("flash_attn"):
        from flash_attn import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

        span = (-1, -1) if form.window is None else (form.window - 1, 0)
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
        shape = {"softmax_scale": form.scaling, "causal": True, "window_size": span}
        out, lse, _ = flash_attn_func(q, k, v, **shape, return_attn_probs=True)  # tells no more than the denominators
        return out.transpose(1, 2), lse
    found = torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, 0.0, True, scale=form.scaling)
    return found[0], found[1]
