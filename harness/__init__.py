"""The benchmark harness: how a run happens. `harness.cli` is the command line."""

__version__ = "0.1.0"
