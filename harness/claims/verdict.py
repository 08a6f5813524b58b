"""The verdict of a claim, computed from what its check finds.

`holds`: everything that the check cannot rule out, the 95 % interval or the one number, lies within the bounds.
`does not hold`: all of it lies outside, on one side. `cannot be told`: it reaches a bound, or the records have too few
contexts for an interval to mean anything. `cannot be checked here`: there is nothing to compute it from.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from harness.claims.claim import Arithmetic, Bounded, Check, Claim, Elsewhere, Found, Property, Records

Word = Literal["holds", "does not hold", "cannot be told", "cannot be checked here"]


@dataclass(frozen=True)
class Verdict:
    """What became of a claim."""

    claim: Claim
    word: Word
    found: Found


def judge(claims: Iterable[Claim]) -> Iterator[Verdict]:
    """Check each claim."""
    for claim in claims:
        found = find(claim.check)
        yield Verdict(claim, word(claim.check, found), found)


def find(check: Check) -> Found:
    """Compute what a check looks at."""
    if isinstance(check, Elsewhere):
        return Found(why=check.why)
    if isinstance(check, Arithmetic):
        from harness.claims.arithmetic import FORMULAS

        return Found.exactly(FORMULAS[check.formula](**check.given))
    if isinstance(check, Property):
        from harness.claims.properties import PROPERTIES

        told = PROPERTIES[check.property](**check.given)
        return told if isinstance(told, Found) else Found.exactly(told)
    from harness.claims.published import contrast

    return contrast(check)


def word(check: Check, found: Found) -> Word:
    """Say how what was found lies to the bounds."""
    if math.isnan(found.value) or not isinstance(check, Bounded):
        return "cannot be checked here"
    if found.why or math.isnan(found.low):
        return "cannot be told"
    if isinstance(check, Records):
        within = check.at_least < found.low and found.high < check.at_most
    else:
        within = check.at_least <= found.low and found.high <= check.at_most
    if within:
        return "holds"
    return "does not hold" if found.high < check.at_least or found.low > check.at_most else "cannot be told"
