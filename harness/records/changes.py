"""What changed between two sessions of one folder, so that its records are not of one code, set of packages or machine.

What a manifest does not tell is no change: earlier versions wrote less into it.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from harness.errors import line_of

NO_PART = frozenset({"ray", "lm-eval"})
"""Packages without a part in what a record says."""
ON_CPU, ON_GPU = ("processor", "torch_threads"), ("accelerators", "cuda")
"""What of a machine decides numbers there; the threads of a processor do, since they decide in which order it sums."""
MOVES = frozenset({"torch_threads"})
"""What a run that other machines make the records of asks of them all."""
CHARS = 200  # of a change


class Session(Protocol):
    """What every manifest says of the session that wrote it."""

    @property
    def git_commit(self) -> str | None: ...
    @property
    def versions(self) -> Mapping[str, str]: ...
    @property
    def machine(self) -> Mapping[str, Any]: ...
    @property
    def sources(self) -> Mapping[str, str]: ...


def changes(first: Session, now: Session, *, device: str, elsewhere: bool = False) -> tuple[str, ...]:
    """What decides numbers and is another now, a short text each: `torch 2.12.0 -> 2.13.0`.

    device: that the numbers are made on. elsewhere: whether other machines make them, which their records name.
    """
    found = _between({"commit": _commit(first)}, {"commit": _commit(now)})
    if first.versions and now.versions:
        names = (first.versions.keys() | now.versions.keys()) - NO_PART
        before, after = ({name: session.versions.get(name, "none") for name in names} for session in (first, now))
        found += _between(before, after)
    fields = [name for name in (ON_CPU if device.startswith("cpu") else ON_GPU) if name in MOVES or not elsewhere]
    before, after = ({name: _text(session.machine.get(name)) for name in fields} for session in (first, now))
    found += _between(before, after)
    both = sorted(first.sources.keys() & now.sources.keys())
    found += [f"code of {name} changed" for name in both if first.sources[name] != now.sources[name]]
    return tuple(line_of(text[:CHARS]) for text in found)


def _between(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What differs by name, of the same names; what one side leaves empty is no difference."""
    pairs = [(name, before[name], after[name]) for name in sorted(before)]
    return [f"{name} {old} -> {new}" for name, old, new in pairs if old and new and old != new]


def _commit(session: Session) -> str:
    name, dirty, _ = (session.git_commit or "none").partition("-dirty")
    return name[:12] + dirty


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else "" if value is None else str(value)
