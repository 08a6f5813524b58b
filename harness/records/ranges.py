"""What a stored value may be: the types of the fields of records, manifests and archive indexes.

Integers and numbers are strict: `true` is not 1, `"1"` is not 1. Numbers are finite. Texts are bounded, and can be
written as UTF-8: no half of a surrogate pair. The bounds are far above what a run makes; they keep one forged line from
stopping whatever reads it.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

MOST = (1 << 63) - 1
TEXT = 1 << 20
"""Characters of a prediction or a reference, and of the texts in a sample's meta together."""
META_DEPTH = 16
META_VALUES = 10_000
NUMBERS = frozenset({int, float, bool})

Bytes = Annotated[int, Field(strict=True, ge=0, le=MOST)]
Count = Annotated[int, Field(strict=True, ge=0, le=1 << 48)]
Tokens = Annotated[int, Field(strict=True, ge=1, le=1 << 31)]
"""Of a length or a limit."""
TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
Seed = Annotated[int, Field(strict=True, ge=-MOST, le=MOST)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e12, le=1e12)]
Seconds = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1e12)]
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1 + 1e-9)]
"""A metric: in [0, 1], and what rounding adds."""
Nats = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e-6, le=1e6)]
"""A negative log-likelihood: not negative, but for what rounding takes."""
Label = Annotated[str, Field(max_length=1000)]
"""A name of anything: a model, a label, an id."""
Line = Annotated[str, Field(max_length=4000)]
"""What a reader is told: an error or a note."""
Text = Annotated[str, Field(max_length=TEXT)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Sha256OrNone = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
Lines = Annotated[tuple[Line, ...], Field(max_length=10_000)]
Texts = Annotated[tuple[Text, ...], Field(max_length=10_000)]
TokenIds = Annotated[tuple[TokenId, ...], Field(max_length=TEXT)]
Counts = Annotated[tuple[Count, ...], Field(max_length=10_000)]
"""Of layers, heads or turns."""
CountsByLayer = Annotated[tuple[Counts, ...], Field(max_length=10_000)]
BytesByLayer = Annotated[tuple[Bytes, ...], Field(max_length=10_000)]
Metrics = Annotated[dict[Label, Share], Field(max_length=1000)]
Typed = Annotated[tuple[Label, ...], Field(max_length=1000)]
"""What a person asked for: methods, tasks, budgets."""
Lengths = Annotated[tuple[Tokens, ...], Field(max_length=1000)]
Versions = Annotated[dict[Label, Label], Field(max_length=10_000)]


def _bounded(given: dict[str, Any]) -> dict[str, Any]:
    """What JSON can say, of a bounded depth and size; level by level, without recursion. Raises ValueError."""
    level: list[Any] = [given]
    values, size = 0, 0
    for _ in range(META_DEPTH):
        below: list[Any] = []
        for found in level:
            inside = (*found, *found.values()) if type(found) is dict else found
            values += len(inside)
            for value in inside:  # a record has few: types are compared, the commonest first
                kind = type(value)
                if kind is str:
                    size += len(value) if value.isascii() else len(value.encode())  # half of a pair: a ValueError
                elif kind is list or kind is dict or kind is tuple:
                    below.append(value)
                elif not (value is None or (kind in NUMBERS and -MOST <= value <= MOST)):
                    raise ValueError("a value is no finite number, text, list or table of JSON")
        if values > META_VALUES or size > TEXT:
            raise ValueError(f"more than {META_VALUES:,} values, or {TEXT:,} bytes of text")
        if not below:
            return given
        level = below
    raise ValueError(f"nested more than {META_DEPTH} deep")


Meta = Annotated[dict[str, Any], AfterValidator(_bounded)]
"""What another room says in JSON: a sample's meta, a method's parameters, where data is from, a machine."""
