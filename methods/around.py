"""The base of methods that go around another one: they store, protect or rank anew what the method `over` keeps."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

from methods.base import KV, KVPolicy, Needs, PolicyError, PromptView
from methods.budget import quoted
from methods.fullkv import FullKV
from methods.registry import make_policy


@dataclass(frozen=True)
class Around(KVPolicy):
    """What a record says of such a method it says of both.

    over: the other method, `name` or `name@preset`; None where a subclass can do without. inner: its policy.
    """

    over: str | None = None
    inner: KVPolicy | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.over is not None:
            self._around(make_policy(self.over))

    def suits(self, policy: KVPolicy) -> None:
        """Raise PolicyError for a policy that this one cannot go around."""

    @property
    def chooser(self) -> KVPolicy:
        """The policy that chooses slots: the other method's, else one that keeps all."""
        return self.inner or FullKV()

    @property
    def asked(self) -> str:
        """`over` as an error line names it."""
        return f"{type(self).__name__.lower()}.over={quoted(str(self.over))}"

    def changed(self, **fields: Any) -> Self:
        """Return this policy with other values of its own fields, around the same policy."""
        own = replace(self, **fields)
        object.__setattr__(own, "inner", self.inner)
        return own

    @property
    def needs(self) -> Needs:
        return super().needs | self.chooser.needs

    def for_model(self, revision: str) -> Self:
        own = super().for_model(revision)
        if self.inner is not None:
            own = replace(own)
            own._around(self.inner.for_model(revision))
        return own

    def provenance(self) -> dict[str, Any]:
        return {**super().provenance(), **self.chooser.provenance()}

    def fitted_on(self) -> frozenset[str]:
        return super().fitted_on() | self.chooser.fitted_on()

    @property
    def lacks(self) -> str:
        return super().lacks or self.chooser.lacks

    @property
    def method_bytes(self) -> int:
        return super().method_bytes + self.chooser.method_bytes

    def check(self, view: PromptView) -> None:
        super().check(view)
        self.chooser.check(view)

    def plain(self, kept: KV) -> None:
        """Raise PolicyError where the other method keeps more than keys and values."""
        if type(kept) is not KV or kept.extra:
            raise PolicyError(f"{self.asked} leaves more than keys and values; name another method")

    def _around(self, policy: KVPolicy) -> None:
        self.suits(policy)
        object.__setattr__(self, "inner", policy)
