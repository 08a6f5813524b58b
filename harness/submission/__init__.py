"""Runs as archives that others can check. Others call `archive.pack_run` and `verify.verify_pack`."""
