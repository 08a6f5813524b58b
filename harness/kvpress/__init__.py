"""Presses of kvpress as methods, under the same budgets and records. Importing it registers labels `kvpress:...`."""

from importlib import import_module

from methods.registry import register_prefix

POLICY = "harness.kvpress.policy"  # with which torch is imported: only when a label is read

register_prefix("kvpress", lambda press, overrides: import_module(POLICY).make_press(press, overrides))
