"""One method alone: its seconds by phase, its memory, and the largest context and batch that fit a limit.

Others call `bench`, `boundary` and, for probes in processes of their own, `client.Prober`.
"""
