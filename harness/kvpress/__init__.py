"""Presses of kvpress as methods, under the same budgets and records. Importing it registers labels `kvpress:...`."""

from importlib import import_module

from harness.kvpress.label import spelling
from methods.registry import Prefix, register_prefix

POLICY = "harness.kvpress.policy"  # with which torch is imported: only when a press is made

register_prefix("kvpress", Prefix(lambda press, given: import_module(POLICY).make_press(press, given), spelling))
