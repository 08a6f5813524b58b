"""The tiny model as probes and one method alone take it."""

import copy

import pytest
import torch

from harness.engine.transformers_seam import AttachedModel
from harness.models.load import LoadedModel
from harness.speed.server import ServerReady


@pytest.fixture(scope="session")
def ready() -> ServerReady:
    return ServerReady.load("tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def model(tiny: LoadedModel) -> AttachedModel:
    return AttachedModel(copy.deepcopy(tiny.model), tiny.wording)


def ids(tokens: int = 90, seed: int = 3) -> list[int]:
    found: list[int] = torch.randint(5, 260, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found
