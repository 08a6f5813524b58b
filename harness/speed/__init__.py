"""One method alone: its seconds by phase, its memory, and the largest context and batch that fit a limit.

Others call `bench`, `boundary` and, for a probe in a process of its own, `client.Prober`.
"""
