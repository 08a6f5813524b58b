"""Presses of kvpress as methods, under the same budgets and records. Importing it registers labels `kvpress:...`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from methods.registry import register_prefix

if TYPE_CHECKING:
    from methods.base import KVPolicy


def _press(text: str, overrides: Mapping[str, Any]) -> KVPolicy:
    """The policy of a label's part after `kvpress:`; only now is torch imported."""
    from harness.kvpress.policy import make_press

    return make_press(text, overrides)


register_prefix("kvpress", _press)
