"""Budgets: what a policy may keep, and how slots are shared out. `methods.base` offers all of it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class PolicyError(ValueError):
    """A policy was asked for something it cannot do; the message says what to change."""


class BudgetTooSmall(PolicyError):
    """A budget that a policy cannot serve on this prompt: its cell is skipped."""


@dataclass(frozen=True)
class Budget:
    """How much a policy may keep: tokens per layer and KV head, or a fraction of the prompt. Exactly one is set."""

    tokens: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        for given, kinds in ((self.tokens, int), (self.fraction, int | float)):
            if given is not None and (isinstance(given, bool) or not isinstance(given, kinds)):
                raise PolicyError(f"budget {_shown(given)} is no number; give tokens (128) or a fraction (0.25)")
        if (self.tokens is None) == (self.fraction is None):
            raise PolicyError(f"a budget is tokens or a fraction, got tokens={self.tokens} fraction={self.fraction}")
        if self.tokens is not None and self.tokens < 1:
            raise PolicyError(f"budget {_shown(self.tokens)} keeps nothing; ask for at least 1 token")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise PolicyError(
                f"budget {_shown(self.fraction)} is not a kept fraction; ask for more than 0 and at most 1"
            )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`128` is tokens, `0.25` or `25%` a kept fraction. Raises PolicyError when it is neither."""
        text = text.strip()
        try:
            if text.endswith("%"):
                return cls(fraction=float(text[:-1]) / 100)
            return cls(fraction=float(text)) if "." in text else cls(tokens=int(text))
        except PolicyError:
            raise
        except ValueError:
            raise PolicyError(f"budget {text!r} is not a number; write tokens (128) or a fraction (0.25)") from None

    def resolve(self, prompt_tokens: int) -> int:
        """Slots per layer and KV head for a prompt of `prompt_tokens`; never less than 1."""
        if self.tokens is not None:
            return self.tokens
        assert self.fraction is not None
        return max(1, round(self.fraction * prompt_tokens))

    def __str__(self) -> str:
        if self.tokens is not None:
            return str(self.tokens)
        text = f"{self.fraction:.6f}".rstrip("0")  # `1.0`, never `1`, which is one token
        return text + "0" if text.endswith(".") else text


def _shown(value: object) -> str:
    try:
        return ascii(value)[:200]
    except (ValueError, RecursionError):  # an integer of too many digits, a list too deep
        return f"<a {type(value).__name__} too large to show>"


def spread(total: int, weights: Sequence[float], cap: int | Sequence[int]) -> list[int]:
    """Whole shares of `total` in proportion to `weights`, none above `cap`; sums to min(total, sum of all caps).

    Largest remainder; what a capped share cannot hold goes to the others in proportion. cap: one, or each share's own.
    """
    caps = [cap] * len(weights) if isinstance(cap, int) else cap
    shares, left = [0.0] * len(weights), float(min(total, sum(caps)))
    free = [i for i, weight in enumerate(weights) if weight > 0]
    while free and left > 1e-9:
        scale = left / sum(weights[i] for i in free)
        grown = {i: min(float(caps[i]), shares[i] + scale * weights[i]) for i in free}
        left -= sum(grown[i] - shares[i] for i in free)
        for i in free:
            shares[i] = grown[i]
        free = [i for i in free if shares[i] < caps[i] - 1e-9]
    whole = [int(share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    for i in by_remainder[: round(sum(shares)) - sum(whole)]:
        whole[i] += 1
    return whole
