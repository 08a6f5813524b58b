"""Templates of pages. What a template shows is one cleaned line that HTML escapes, unless it is markup already."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from leaderboards.tables.verdicts import MethodName
from leaderboards.text import NOTE_CHARS, clean, number


def line(value: object, longest: int = NOTE_CHARS) -> Markup:
    """One line that HTML shows as it is, in an element or a quoted attribute."""
    return escape(clean(value, longest=longest))


def render(template: str, **values: Any) -> str:
    """A template of `leaderboards/pages/templates` filled in. Raises jinja2's UndefinedError for a missing value."""
    return environment().get_template(template).render(values)


@cache
def environment() -> Environment:
    """The templates with their filters."""
    made = Environment(
        loader=PackageLoader("leaderboards.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else line(value),
    )
    made.filters |= {"line": line, "number": number}
    made.tests["method_name"] = lambda part: isinstance(part, MethodName)
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "sort_keys": True, "separators": (",", ":")}
    return made
