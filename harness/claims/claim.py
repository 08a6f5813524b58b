"""What a claim is: who says what of which model, and how it is checked. The packaged ones are `data/*.toml`.

A check gives a number, and the claim says between which bounds that number must lie. Bounds and published numbers are
data; the number is computed each time, and so is the verdict (`harness.claims.verdict`).
"""

import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from harness.errors import HarnessError, did_you_mean, one_line, shown
from harness.records.spec import Frozen

DATA = Path(__file__).parent / "data"
Given = dict[str, bool | int | float | str | tuple[float, ...]]
"""What a formula or a property is told."""


class Bounded(Frozen):
    """Bounds of what a check finds, both included but in `Records`: at least one of them. unit: of the number."""

    at_least: float = -math.inf
    at_most: float = math.inf
    unit: str = ""

    @model_validator(mode="after")
    def _bounded(self) -> "Bounded":
        if not (self.at_least <= self.at_most and math.isfinite(max(self.at_least, -self.at_most))):
            raise ValueError(
                f"bounds {self.at_least} and {self.at_most} hold nothing or everything; give one that can fail"
            )
        return self


class Arithmetic(Bounded):
    """A number that follows from shapes and bits. formula: a function of `harness.claims.arithmetic`."""

    kind: Literal["arithmetic"]
    formula: str
    given: Given = Field(default_factory=dict)


class Property(Bounded):
    """What our code does on a prompt made up for it. property: a function of `harness.claims.properties`."""

    kind: Literal["property"]
    property: str
    given: Given = Field(default_factory=dict)


class Records(Bounded):
    """A paired difference of published records: `first` less `share` times `second`, each a method and a budget.

    As on boards, an interval that ends at a bound tells nothing, nor do cells that are equal on every sample.

    board: its folder in leaderboards/published/records. tasks: beginnings of the names of those that count, all by
    default. measure: score in points or answer NLL in nats a token.
    """

    kind: Literal["records"]
    board: str
    first: tuple[str, str]
    second: tuple[str, str]
    share: float = 1.0
    tasks: tuple[str, ...] = ("",)
    measure: Literal["score", "nll"] = "score"


class Elsewhere(Frozen):
    """Nothing here can check it. why: what it needs."""

    kind: Literal["elsewhere"]
    why: str


Check = Annotated[Arithmetic | Property | Records | Elsewhere, Field(discriminator="kind")]


class Claim(Frozen):
    """A claim of a paper.

    section: title of the file it is in. paper: its address, with the version where that matters. where: table, figure
    or section. says: in our words.
    published: its numbers as printed. model, protocol: of the paper. preset: which of our methods stands for it.
    source: where the numbers were read, if not in the paper itself. note: what the verdict is about, and what not.
    command: what checks it, commands with `&&` between them; by itself the one that computes the verdict.
    """

    section: str
    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9.]+)*$")]
    paper: Annotated[str, Field(pattern=r"^https://(arxiv\.org/abs/\d{4}\.\d{5}(v\d+)?|github\.com/\S+)$")]
    where: str
    says: str
    published: tuple[float, ...]
    model: str
    protocol: str
    preset: str
    source: str = ""
    note: str = ""
    command: str = ""
    check: Check

    @property
    def checked_by(self) -> str:
        return self.command or f"harness claims {self.id}"

    @property
    def method(self) -> str:
        return self.preset.partition("@")[0]

    def is_of(self, paper: str) -> bool:
        """Whether a claim is of a paper, which is named by its method or its number."""
        return paper == self.method or self.id.startswith(f"{paper}-") or paper == self.paper.rpartition("/")[2][:10]


@dataclass(frozen=True)
class Found:
    """What a check found: a number, its interval (the number itself where it is exact), and of how many samples.

    NaN where there is none. why: why an interval says nothing, or why nothing was found.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    why: str = ""

    @classmethod
    def exactly(cls, value: float) -> "Found":
        return cls(value, value, value)


def load_claims(folder: Path = DATA) -> tuple[Claim, ...]:
    """Return every claim, file by file in the order of their names. Raises HarnessError for a file that is no data."""
    found: dict[str, Claim] = {}
    for path in sorted(folder.glob("*.toml")):
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        for entry in data["claim"]:
            try:
                claim = Claim.model_validate({"section": data["title"], **entry})
            except ValidationError as error:
                raise HarnessError(f"{path.name}, claim {shown(entry.get('id'))}: {one_line(error)}") from None
            if claim.id in found:
                raise HarnessError(f"{path.name}: claim {claim.id} is there twice; rename one")
            found[claim.id] = claim
    return tuple(found.values())


def choose(claims: Sequence[Claim], ids: Iterable[str], paper: str | None = None) -> tuple[Claim, ...]:
    """Return the claims of those ids, all without any, and of one paper. Raises HarnessError for what there is not."""
    known = {claim.id: claim for claim in claims}
    for name in (asked := tuple(ids)):
        if name not in known:
            near = did_you_mean(name, known) or "; `harness claims` lists them"
            raise HarnessError(f"no claim {shown(name)}{near}")
    chosen = tuple(known[name] for name in dict.fromkeys(asked or known))
    if paper is None:
        return chosen
    of = tuple(claim for claim in chosen if claim.is_of(paper))
    if not of:
        papers = sorted({claim.method for claim in claims})
        near = did_you_mean(paper, papers) or f"; papers, by their methods: {', '.join(papers)}"
        raise HarnessError(f"no claim of paper {shown(paper)}{near}")
    return of
