"""`harness.attached`: a user's own `generate`, on the engine."""
