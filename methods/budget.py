"""Budgets: what a policy may keep, and how slots are shared out. `methods.base` offers all of it too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

MOST_TOKENS = 1_000_000_000
LEAST_FRACTION = 1e-9
"""Of any prompt that there is it keeps one slot, as every smaller one."""
TEXT_CHARS = 40
BUDGET = re.compile(r"(-?\d+)|(\d+\.\d*|\.\d+)|(\d+\.?\d*|\.\d+)%", re.ASCII)
"""Tokens, a fraction, or a percentage."""
SHOWN_CHARS, LINE_CHARS = 200, 1000
"""Of a value in an error line, and of the line."""
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""What a terminal obeys, hides or cannot encode."""


class PolicyError(ValueError):
    """A policy was asked for something it cannot do; the message, a line safe to show, says what to change."""

    def __str__(self) -> str:
        text = UNSAFE.sub(lambda found: ascii(found[0])[1:-1], super().__str__())
        return text if len(text) <= LINE_CHARS else f"{text[: LINE_CHARS // 2]}[...]{text[-LINE_CHARS // 3 :]}"


class BudgetTooSmall(PolicyError):
    """A budget that a policy cannot serve on this prompt: its cell is skipped."""


def quoted(value: object) -> str:
    """A value as an error line shows it: ASCII, escaped, at most `SHOWN_CHARS` characters of it."""
    try:
        text = ascii(value[:SHOWN_CHARS] if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # an integer of too many digits, a list too deep
        return f"<a {type(value).__name__} too large to show>"
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 5]}[...]"


@dataclass(frozen=True)
class Budget:
    """How much a policy may keep: tokens per layer and KV head, or a fraction of the prompt. Exactly one is set.

    Two budgets are equal when they keep the same share; `parse(str(budget))` is the budget again.
    """

    tokens: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        for given, kinds in ((self.tokens, int), (self.fraction, int | float)):
            if given is not None and (isinstance(given, bool) or not isinstance(given, kinds)):
                raise PolicyError(f"budget {quoted(given)} is no number; give tokens (128) or a fraction (0.25)")
        if (self.tokens is None) == (self.fraction is None):
            raise PolicyError(f"a budget is tokens or a fraction, got tokens={self.tokens} fraction={self.fraction}")
        if self.tokens is not None and not 1 <= self.tokens <= MOST_TOKENS:
            what = "keeps nothing" if self.tokens < 1 else "is beyond any prompt"
            raise PolicyError(f"budget {quoted(self.tokens)} {what}; ask for 1 to {MOST_TOKENS:,} tokens")
        if self.fraction is not None and not LEAST_FRACTION <= self.fraction <= 1.0:
            what = "keeps nothing" if 0 <= self.fraction < LEAST_FRACTION else "is not a kept fraction"
            raise PolicyError(f"budget {quoted(self.fraction)} {what}; ask for {LEAST_FRACTION:g} to 1")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`128` is tokens, `0.25` or `25%` a kept fraction. Raises PolicyError when it is neither."""
        found = BUDGET.fullmatch(text.strip(" ")) if len(text) <= TEXT_CHARS else None
        if found is None:
            raise PolicyError(f"budget {quoted(text)} is not a number; write tokens (128) or a fraction (0.25)")
        tokens, fraction, percent = found.groups()
        if tokens:
            return cls(tokens=int(tokens))
        return cls(fraction=float(fraction) if fraction else float(Decimal(percent) / 100))

    def resolve(self, prompt_tokens: int) -> int:
        """Slots per layer and KV head for a prompt of `prompt_tokens`; never less than 1."""
        if self.tokens is not None:
            return self.tokens
        assert self.fraction is not None
        return max(1, round(self.fraction * prompt_tokens))

    def __str__(self) -> str:
        return decimal_text(float(self.fraction)) if self.fraction is not None else str(self.tokens)


def decimal_text(number: float) -> str:
    """The shortest text that is read as the same number, without an exponent: `0.0000001`; `1.0`, never `1`."""
    return format(Decimal(float.__repr__(number)), "f")


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
