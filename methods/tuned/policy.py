"""A method with tuned parameters, as a policy: which ones is known once the model is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from methods.base import KV, Kind, KVPolicy, LayerView, Needs, PolicyError, PromptView, Sizes, StepView
from methods.plain_files import place_of
from methods.registry import make_policy
from methods.tuned.artefact import CHOSEN, Tuning, load_tuning, packaged

AUTO = "auto"


@dataclass(frozen=True)
class Tuned(KVPolicy):
    """`method` with the parameters that were chosen for the model at hand.

    artefact: a file of `harness tune`, or a folder of them; `auto` for the packaged one of the model.
    """

    method: str
    artefact: str = AUTO
    inner: KVPolicy | None = field(init=False, default=None)

    @property
    def chosen(self) -> KVPolicy:
        """The method as tuned. Raises PolicyError before `for_model`."""
        if self.inner is None:
            raise PolicyError(f"{self.method}@tuned depends on the model; name one with `for_model` first")
        return self.inner

    def for_model(self, revision: str) -> Self:
        """Return it with the parameters of a model's revision. Raises PolicyError where none were chosen for it."""
        path = self._path(revision)
        tuning, _ = load_tuning(path)
        if (tuning.method, tuning.model_revision) != (self.method, revision):
            what = f"{path} is of {tuning.method} on {tuning.model} ({tuning.model_revision[:12]})"
            raise PolicyError(f"{what}, not of {self.method} on this model ({revision[:12]}); {self._advice}")
        own = replace(self, artefact=_name(path))
        object.__setattr__(own, "inner", make_policy(self.method, tuning.chosen).for_model(revision))
        return own

    def _path(self, revision: str) -> Path:
        if self.artefact != AUTO:
            place, path = place_of(self.artefact), CHOSEN / self.artefact
            path = path if path.is_file() else place
            return path / f"{self.method}.json" if path.is_dir() else path
        found = [path for path in packaged(self.method) if load_tuning(path)[0].model_revision == revision]
        if not found:
            raise PolicyError(f"nothing was tuned for this model ({revision[:12]}); {self._advice}")
        return found[0]

    @property
    def _advice(self) -> str:
        return f"run `harness tune {self.method} --out DIR` and add --set {self.method}.artefact=DIR"

    def _tuning(self) -> tuple[Tuning, str]:
        return load_tuning(self._path(""))

    def provenance(self) -> dict[str, Any]:
        return {} if self.inner is None else {"artefact_sha256": self._tuning()[1], **self.inner.provenance()}

    def fitted_on(self) -> frozenset[str]:
        return frozenset() if self.inner is None else frozenset(self._tuning()[0].prompts) | self.inner.fitted_on()

    @property
    def lacks(self) -> str:
        return self.chosen.lacks

    @property
    def _known(self) -> KVPolicy:
        """What is known without a model: no tuning changes whether it has a budget, evicts, turns or frees."""
        return self.inner or make_policy(self.method)

    @property
    def kind(self) -> Kind:
        return self._known.kind

    @property
    def evicts_while_decoding(self) -> bool:
        return self._known.evicts_while_decoding

    @property
    def turns_keys(self) -> bool:
        return self._known.turns_keys

    @property
    def memory(self) -> Literal["physical", "simulated"]:
        return self._known.memory

    @property
    def needs(self) -> Needs:
        return self.chosen.needs

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        return self.chosen.compress(view, budget)

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]] | None:
        return self.chosen.per_layer(budget, sizes)

    def check(self, view: PromptView) -> None:
        self.chosen.check(view)

    def after_step(self, step: StepView) -> Tensor:
        return self.chosen.after_step(step)

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        return self.chosen.notes(budget, sizes)


def _name(path: Path) -> str:
    """A path, or what a packaged artefact is called."""
    return str(path.relative_to(CHOSEN)) if path.is_relative_to(CHOSEN) else str(path)
