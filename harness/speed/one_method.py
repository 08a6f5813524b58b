"""One method at one budget by itself, as it would serve: prefill, compress, decode, with the seconds of each.

Nothing is shared with other methods. A policy whose layers need no other (`KVPolicy.per_layer`) compresses a layer as
soon as the prompt's last token has passed it, so the full cache never exists at once. A prompt may be prefilled in
chunks, which bounds the activations. The first token comes from the prefill, as it does when serving.
"""

from collections.abc import Sequence

import torch

from harness.engine.compress import Compressed, compress
from harness.engine.decode import Decoding
from harness.engine.prefill import prefill
from harness.engine.stepping import Stepped, greedy_steps
from harness.engine.transformers_seam import AttachedModel
from methods.base import KVPolicy


class Isolated:
    """Runs prompts under one policy, as made for the model, and budget.

    budget: slots per layer and KV head; None for a policy that is given none. chunk: tokens of a prefill forward;
    None for all at once.
    """

    def __init__(self, model: AttachedModel, policy: KVPolicy, budget: int | None, *, chunk: int | None = None) -> None:
        self.model, self.policy, self.budget, self.chunk = model, policy, budget, chunk

    def prefill(self, ids: Sequence[int]) -> Compressed:
        """Prefill and compress one prompt. Raises what the policy raises."""
        budget = len(ids) if self.budget is None else self.budget
        with torch.inference_mode():
            acts = self.policy.per_layer(budget, self.model.sizes(len(ids)))
            prefilled = prefill(self.model, ids, self.policy.needs, chunk=self.chunk, acts=acts)
            return compress(prefilled, self.policy, budget)

    def decode(self, prompts: list[Compressed], new_tokens: int) -> Stepped:
        """Greedy tokens of prompts of the same length, as one batch, end-of-text ignored. Takes the prompts' caches."""
        with torch.inference_mode():
            decoding = Decoding.of(self.model, prompts, room=new_tokens - 1, release=True)
            return greedy_steps(decoding, new_tokens - 1)
