"""What a GPU says of itself: what it is, and its clocks, temperature and power now.

The second is told by NVIDIA's library through `pynvml` (nvidia-ml-py), and what that does not tell is left out.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from harness.records.measured import GpuState


def describe(device: torch.device) -> dict[str, Any]:
    """Say what a GPU is and how it stands, in JSON values; nothing for a CPU. Memory is all that it has, in bytes."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    told = {"name": found.name, "capability": f"{found.major}.{found.minor}", "memory_bytes": found.total_memory}
    told |= {"driver": driver} if (driver := _driver()) else {}
    state = state_of(device)
    return {"gpu": told | ({} if state is None else state.model_dump(exclude_none=True))}


def state_of(device: torch.device) -> GpuState | None:
    """Read the clocks, the temperature and the power of a GPU now; None where nothing tells them."""
    if device.type != "cuda" or (nvml := _nvml()) is None:
        return None
    found: dict[str, float] = {}
    with suppress(nvml.NVMLError):
        own = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        asked: dict[str, Callable[[], Any]] = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(own, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(own, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(own, nvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(own) / 1000,
        }
        for name, ask in asked.items():
            with suppress(nvml.NVMLError):  # a virtual machine may hide some
                found[name] = float(ask())
    return GpuState(**found) if found else None


def _driver() -> str | None:
    nvml = _nvml()
    if nvml is None:
        return None
    with suppress(nvml.NVMLError):
        return str(nvml.nvmlSystemGetDriverVersion())
    return None


def _nvml() -> Any:
    """NVIDIA's library, ready; None where it is not installed or does not start."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()  # type: ignore[no-untyped-call, unused-ignore]
    except pynvml.NVMLError:
        return None
    return pynvml
