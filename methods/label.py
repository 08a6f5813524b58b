"""What a method is called wherever one is named: on the command line, in records and on boards. No torch.

    snapkv                  the method with its default parameters
    snapkv@kvcf             a preset of it
    snapkv@kvcf[kernel=5]   with parameters changed, as records name it
    kvpress:KnormPress()    what a prefix resolves; the rest is the prefix's own grammar

A preset and changed parameters belong to a method of the registry alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from methods.budget import PolicyError, quoted

TUNED = "tuned"
"""The preset of every method that `harness tune` can tune."""
ARTEFACT = "artefact"
"""Its one parameter: where the tuned ones lie."""
NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
"""Of a method, a preset or a prefix."""
PREFIXED = re.compile(rf"({NAME.pattern}):", re.ASCII)
PARAMETER = re.compile(r"(?:^|,)(\w+)=")
LABEL = re.compile(rf"({NAME.pattern})(?:@({NAME.pattern}))?(?:\[(.+)\])?", re.ASCII)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MOST_CHARS = 8192
"""Of a label with all its parameters, a path among them."""
FORMS = "write name, name@preset or name@preset[parameter=value]"


@dataclass(frozen=True)
class MethodLabel:
    """A label taken apart; `str` puts it together again.

    name: of the method, or `prefix:NAME`. preset: its name, empty without one. arguments: what follows the name of a
    prefixed label, parentheses included. params: changed parameters with their values as text, in order.
    """

    name: str
    preset: str = ""
    arguments: str = ""
    params: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> MethodLabel:
        """The parts of a label, of which `str` makes it again. Raises PolicyError for what is none."""
        if len(text) > MOST_CHARS or CONTROL.search(text):
            raise PolicyError(f"method {quoted(text)} cannot be read; {FORMS}")
        if PREFIXED.match(text) and text.isascii():
            name, parenthesis, arguments = text.partition("(")
            return cls(name, arguments=parenthesis + arguments)
        found = LABEL.fullmatch(text)
        if found is None:
            raise PolicyError(f"method {quoted(text)} cannot be read; {FORMS}")
        name, preset, inside = found.groups()
        return cls(name, preset or "", params=_parameters(text, inside) if inside else ())

    def __str__(self) -> str:
        preset = f"@{self.preset}" if self.preset else ""
        params = f"[{','.join(f'{key}={value}' for key, value in self.params)}]" if self.params else ""
        return f"{self.name}{preset}{self.arguments}{params}"

    @property
    def prefix(self) -> str | None:
        """What stands before the colon; None for a method of the registry."""
        found = PREFIXED.match(self.name)
        return None if found is None else found[1]

    @property
    def asked(self) -> str:
        """The label without its changed parameters, as it is asked for."""
        return str(replace(self, params=()))

    def changed(self, params: Mapping[str, Any]) -> MethodLabel:
        """The label with changed parameters spelled out, by name."""
        return replace(self, params=tuple((key, str(value)) for key, value in sorted(params.items())))

    def own(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters among `options`, `method.parameter` to value, that are this label's.

        An artefact is for the tuned preset alone, so that it can stand beside others of its method.
        """
        split = ((*key.partition("."), value) for key, value in options.items())
        own = {parameter: value for method, dot, parameter, value in split if dot and method == self.name}
        return own if self.preset == TUNED else {key: own[key] for key in own if key != ARTEFACT}


def _parameters(text: str, inside: str) -> tuple[tuple[str, str], ...]:
    """What stands in a label's brackets. A value reaches to the next `,parameter=`: it may hold commas itself."""
    pieces = PARAMETER.split(inside)
    if pieces[0] or len(pieces) < 3:
        raise PolicyError(f"method {quoted(text)} cannot be read; {FORMS}")
    return tuple(zip(pieces[1::2], pieces[2::2], strict=True))


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'? known: a, b` for an error line."""
    names = sorted(known)
    close = get_close_matches(word[:MOST_CHARS].lower(), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(names) or 'none'}"
