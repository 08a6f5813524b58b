"""The one way from a prompt to its answers, for everything that runs a model: prefill -> observe -> compress -> decode.

A token's way: `transformers_seam` hands what a layer computed to that layer's cache (`layer_cache` says what one is).
`prefill` keeps the whole prompt and observes it, `compress` lets a policy take its slots, `decode` goes on over rows
that grow (`row_cache`) or that evict (`evicting_cache`), all on `kernels`. `engine` runs one prompt so under many
policies. Others call `engine.Engine`, `prefill.prefill`, `compress.compress`, `decode.Decoding` and
`transformers_seam.AttachedModel`.
"""
