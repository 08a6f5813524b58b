"""Rotations that spread what a few channels hold over all of them, before numbers become codes.

They are made from their size and a seed, not fitted, so they are no constants that a model comes with. A product with
one is taken stream by stream, so that a stream has the same numbers in company as alone.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def haar(dim: int, device: torch.device, seed: int = 0) -> Tensor:
    """Return an orthogonal matrix [D, D] float32, uniform over all: QR of a Gaussian, R's diagonal positive."""
    with torch.inference_mode(mode=False):
        drawn = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        orthogonal, upper = torch.linalg.qr(drawn)
        return on((orthogonal * upper.diagonal().sign()).float(), device)


@cache
def gaussian(dim: int, device: torch.device, seed: int = 0) -> Tensor:
    """Return a matrix [D, D] float32 of independent normal numbers of variance 1."""
    with torch.inference_mode(mode=False):
        return on(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)), device)


@cache
def hadamard(dim: int, block: int, device: torch.device) -> Tensor:
    """Return the Walsh-Hadamard rotation [D, D] float32 of blocks of channels, which undoes itself."""
    with torch.inference_mode(mode=False):
        made, two = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        while len(made) < block:
            made = torch.kron(two, made)
        return on(torch.kron(torch.eye(dim // block), made * block**-0.5), device)


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """Return x [n, C, D] @ rotation [D, D] in float32."""
    return torch.bmm(x.float(), rotation.expand(len(x), -1, -1))


def on(x: Tensor, device: torch.device) -> Tensor:
    """Return x on a device, which nothing waits for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
