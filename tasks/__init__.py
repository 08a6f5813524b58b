"""Evaluation tasks: text in, number out. `tasks.load_tasks` fills the registry of `tasks.base`."""

from collections.abc import Mapping
from importlib import import_module

from tasks.base import TASKS, Task

FAMILIES = (
    "niah",
    "ruler",
    "longbench",
    "longbench_kvpress",
    "multiquery",
    "stdlib",
    "prose",
    "instructions",
    "graded",
    "turns",
    "long",
    "relay",
)


def load_tasks() -> Mapping[str, Task]:
    """Import every task family and return the registry."""
    for family in FAMILIES:
        import_module(f"tasks.{family}")
    return TASKS
