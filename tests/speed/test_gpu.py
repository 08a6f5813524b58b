"""What a GPU says of itself, with a pretend library in the place of NVIDIA's."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.records.measured import GpuState
from harness.speed.gpu import describe, state_of

CUDA, CPU = torch.device("cuda", 1), torch.device("cpu")


class NVMLError(Exception): ...


def refuse(*_: object) -> Any:
    raise NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A card of one name; clocks by their number in the library."""
    card = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=85 * 10**9, uuid="0-1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    found = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "570.86",
        nvmlDeviceGetHandleByUUID=lambda name: {"GPU-0-1-2": "handle"}[name],
        nvmlDeviceGetClockInfo=lambda own, kind: {1: 1980, 2: 2619}[kind],
        nvmlDeviceGetTemperature=lambda own, kind: 45,
        nvmlDeviceGetPowerUsage=lambda own: 310_500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", found)
    return found


CARD = {"name": "NVIDIA H100", "capability": "9.0", "memory_bytes": 85 * 10**9}
STATE = {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "temperature_c": 45.0, "power_w": 310.5}


def test_what_it_is_and_how_it_stands(nvml: SimpleNamespace) -> None:
    assert describe(CUDA) == {"gpu": {**CARD, "driver": "570.86", **STATE}}
    assert state_of(CUDA) == GpuState(**STATE)
    assert describe(CPU) == {} and state_of(CPU) is None


def test_what_is_not_told_is_left_out(nvml: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.nvmlDeviceGetPowerUsage = nvml.nvmlSystemGetDriverVersion = refuse
    assert describe(CUDA) == {"gpu": {**CARD, **{name: STATE[name] for name in STATE if name != "power_w"}}}
    nvml.nvmlDeviceGetHandleByUUID = refuse
    assert state_of(CUDA) is None and describe(CUDA) == {"gpu": CARD}
    nvml.nvmlInit = refuse
    assert state_of(CUDA) is None and describe(CUDA) == {"gpu": CARD}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert state_of(CUDA) is None and describe(CUDA) == {"gpu": CARD}
