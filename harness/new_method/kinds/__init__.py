"""The kinds of methods that `harness new-method` writes: of each what it keeps in words, its file and its test.

@NAME@ and @CLASS@ are filled in. Every one works as it is written, and its test is a plain loop.
"""

from typing import NamedTuple

from harness.new_method.kinds import decoding, layers, own, pooled, score, storage


class Kind(NamedTuple):
    """what: a phrase. method, test: texts of files."""

    what: str
    method: str
    test: str


KINDS = {
    "score": Kind(score.WHAT, score.METHOD, score.TEST),
    "layers": Kind(layers.WHAT, layers.METHOD, layers.TEST),
    "pooled": Kind(pooled.WHAT, pooled.METHOD, pooled.TEST),
    "storage": Kind(storage.WHAT, storage.METHOD, storage.TEST),
    "decoding": Kind(decoding.WHAT, decoding.METHOD, decoding.TEST),
    "own": Kind(own.WHAT, own.METHOD, own.TEST),
}
"""score: a score of tokens. layers: a budget for each layer. pooled: slots shared out across layers and heads. storage:
codes instead of numbers. decoding: eviction at every decoded token. own: the prompt says how much is kept."""
