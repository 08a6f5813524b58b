"""What a manifest says of its machine, as texts. It is JSON of another computer: a field may hold anything."""

from collections.abc import Mapping
from typing import Any


def listed(machine: Mapping[str, Any], name: str) -> list[str]:
    """The texts of a list such as `accelerators` or `notes`; none where the field is no list."""
    found = machine.get(name)
    return [str(value) for value in found] if isinstance(found, list | tuple) else []


def gpu(machine: Mapping[str, Any]) -> str:
    """What a GPU said of itself, `name H100, driver 570, sm_mhz 1980`; empty where there is none."""
    found = machine.get("gpu")
    told = found.items() if isinstance(found, dict) else ()
    return ", ".join(f"{name} {value}" for name, value in told if isinstance(value, str | int | float))


def processor(machine: Mapping[str, Any]) -> str:
    """The name of the processor; empty where there is none."""
    return str(machine.get("processor") or "")
