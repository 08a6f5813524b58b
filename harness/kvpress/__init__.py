"""Presses of kvpress as methods, under the same budgets and records. Others call `policy`, which registers them."""
