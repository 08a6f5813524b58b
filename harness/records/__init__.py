"""Everything that is written to disk: what a run is, what it recorded, and the crash-safe folders that hold both.

Others call `spec` (Sweep, RunSpec), `record` (Record, RunManifest) and `run_folder` (RunStore); nothing here imports
another room, torch or transformers.
"""
