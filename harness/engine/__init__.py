"""The one way from a prompt to its answers: prefill, observe, compress, decode.

Others call `engine.Engine` and `transformers_seam.AttachedModel`.
"""
