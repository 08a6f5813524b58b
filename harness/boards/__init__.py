"""Boards as data: where their options and records are, and how a night of one is run. Others call `sources`."""
