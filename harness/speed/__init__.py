"""One method alone: its seconds by phase, its memory, and the largest context and batch that fit a limit.

Others call `client.Prober`, `bench` and `boundary`.
"""
