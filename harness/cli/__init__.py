"""The command line, `harness COMMAND`: a file a command, no logic. Others call `main`."""

from harness.cli.parser import main as main

__all__ = ["main"]
