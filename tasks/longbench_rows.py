"""The rows of LongBench's files, read and checked once."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, StrictInt, TypeAdapter, model_validator

from tasks.base import TaskError, shown
from tasks.datafile import MOST_TEXTS, Count, Part, References, Text, checked, json_lines

NAME_CHARS = 200
Classes = Annotated[tuple[Text, ...], Field(min_length=1, max_length=MOST_TEXTS)]


class Row(Part):
    """One row. id: None or empty where the file has none."""

    input: Text
    context: Text
    answers: References
    length: Count
    dataset: Text
    language: Text
    all_classes: Classes | None = None
    id: Annotated[Text, Field(max_length=NAME_CHARS)] | Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = Field(
        None, alias="_id"
    )

    @model_validator(mode="after")
    def _has_words(self) -> "Row":
        if not self.context and self.length:
            raise ValueError(f"field 'context' is empty, length is {self.length}")
        return self


class ClassRow(Row):
    """One row of a data set of classes."""

    all_classes: Classes


SHAPES: dict[bool, TypeAdapter[Any]] = {False: TypeAdapter(Row), True: TypeAdapter(ClassRow)}
"""Of a row, by whether it names its classes."""
REMEDY = "the file is damaged or not LongBench's"


def longbench_rows(
    blob: bytes, file: str, *, with_classes: bool, scorable: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Return the rows of one of LongBench's files, each with a unique `_id`, `line-7` where the file has none.

    with_classes: rows must name their classes. scorable: raises TaskError for a reference that the metric cannot read.
    Raises TaskError when there are no rows, a field is not what it must be, or two rows share an id.
    """
    rows: dict[str, dict[str, Any]] = {}
    own = file.removesuffix(".jsonl")
    for where, value in json_lines(blob, file):
        row: Row = checked(SHAPES[with_classes], value, where=where, remedy=REMEDY)
        if row.dataset not in (own, own.removesuffix("_e")):
            raise TaskError(f"{where}: a row of {shown(row.dataset)} in the file of {own!r}; {REMEDY}")
        for answer in row.answers:
            try:
                scorable(answer)
            except TaskError as error:
                raise TaskError(f"{where}: field 'answers': {error}; {REMEDY}") from None
        name = str(row.id or f"line-{where.rpartition(' ')[2]}")
        if name in rows:
            raise TaskError(f"{where}: _id {name!r} is in the file twice; remove one of the two rows")
        rows[name] = {**row.model_dump(), "_id": name}
    if not rows:
        raise TaskError(f"{file} is empty; fetch LongBench's official file again")
    return list(rows.values())
