"""CompilerKV: a runtime of look-ups, driven by tables that were compiled offline from roll-outs of the model.

Source: https://arxiv.org/abs/2602.08686. `compilerkv` is our compiled form (`methods.compilerkv.form`): its tables give
every layer and KV head a slot budget. `compilerkv@paper` is the published one (`methods.compilerkv.paper`): its tables
give score weights and thresholds. `streaming` goes on choosing while decoding (`methods.compilerkv.streaming`). The
other presets take one part away: `uniform` and `shuffled` the compiled budgets, `onepass` the gradient that they are
found by (they come from the importance of heads, as HeadKV's), `window` the whole-prompt attention, `head_only`,
`gate_only` and `independent` (no alternation) parts of the published tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from methods.base import KV, KVPolicy, LayerView, Needs, PolicyError, PromptView, Sizes, StepView, at_least
from methods.compilerkv import paper, streaming
from methods.compilerkv.form import Form, FormPolicy
from methods.compilerkv.manifest import Shapes
from methods.compilerkv.risk import batch_budgets
from methods.compilerkv.tables import Learned, Tables, load_tables, neutral
from methods.plain_files import place_of
from methods.registry import method

AUTO, NEUTRAL = "auto", "neutral"
COMPILED = Path(__file__).parent / "compiled"
"""Tables that come with this package, a folder a model."""
SHUFFLE_SEED = 0
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"form": "published"},
    "head_only": {"form": "published", "learned": "head"},
    "gate_only": {"form": "published", "learned": "gate"},
    "independent": {"form": "published", "learned": "independent"},
    "uniform": {"budgets": "uniform"},
    "shuffled": {"budgets": "shuffled"},
    "onepass": {"budgets": "onepass"},
    "window": {"whole": False},
    "streaming": {"every": 16},
}


@method("compilerkv", paper="https://arxiv.org/abs/2602.08686", presets=PRESETS)
@dataclass(frozen=True)
class CompilerKV(KVPolicy):
    """Tokens by a compiled score, with a compiled slot budget for each layer and KV head; `@paper` as published.

    tables: folder of compiled tables, name of packaged ones, `auto` for those of the model at hand, or `neutral`.
    whole: whether the score may use whole-prompt attention. window: last queries of the published form; the compiled
    form has its own. learned: which tables of the published form are in force, see `Tables.lookup`. every: decoded
    tokens between two computations of the compiled score, 0 for none.
    """

    form: Literal["compiled", "published"] = "compiled"
    tables: str = AUTO
    budgets: Literal["compiled", "uniform", "shuffled", "onepass"] = "compiled"
    whole: bool = True
    window: int = 64
    learned: Learned = "both"
    every: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "window")
        at_least(self, 0, "every")
        if self.every and self.form == "published":
            raise PolicyError(f"CompilerKV.every={self.every}: the published form acts once; give 0, or form=compiled")

    @property
    def needs(self) -> Needs:
        scan, tables = Needs(window=self.window, logprobs=True), self._loaded()
        if self.form == "published":
            return scan
        batch = scan if tables is not None and bool(tables.risk[:, :, 0].any()) else Needs()  # for `compress_batch`
        return self._form().needs | batch | Needs(decode_attention=self.evicts_while_decoding)

    @property
    def evicts_while_decoding(self) -> bool:
        return self.every > 0

    def for_model(self, revision: str) -> Self:
        """Return this policy with the tables of a model's revision: packaged ones for `auto`, neutral without any.

        Raises PolicyError when the tables that were named are those of another model.
        """
        if self.tables == AUTO:
            found = [path.name for path in sorted(COMPILED.glob("*")) if load_tables(path).manifest.of_model(revision)]
            return replace(self, tables=found[0] if found else NEUTRAL)
        tables = self._loaded()
        if tables is not None and not tables.manifest.of_model(revision):
            what = f"tables {self.tables} are of {tables.manifest.model} ({tables.manifest.model_revision[:12]})"
            advice = "compile tables for it, or move these with `harness tables transfer`"
            raise PolicyError(f"{what}, this model is {revision[:12]}; {advice}")
        return self

    def compress(self, view: PromptView, budget: int) -> list[KV]:
        if self.form == "published":
            tables = self.tables_for(view.sizes, budget)
            return paper.compress(view, budget, tables, window=self.window, learned=self.learned)
        if not self.every:
            return self._policy(budget, view.sizes).compress(view, budget)
        form, slots = self._form(), streaming.affordable(view.layers[0].kv, budget)
        kept = self._policy(slots, view.sizes).compress(view, slots)
        return [streaming.start(kv, scores) for kv, scores in zip(kept, form.scores(view), strict=True)]

    def per_layer(self, budget: int, sizes: Sizes) -> list[Callable[[LayerView], KV]] | None:
        if self.form == "published" or self.every:
            return None
        return self._policy(budget, sizes).per_layer(budget, sizes)

    @property
    def ranks_tokens(self) -> bool:
        return self.form == "compiled" and self._form().basis != "global"

    def score(self, view: LayerView) -> Tensor:
        return self._form().scores(PromptView([view]))[0]

    def ends(self, view: LayerView, budget: int) -> tuple[int, int]:
        return 0, min(self._form().window, budget)

    def _policy(self, budget: int, sizes: Sizes) -> FormPolicy:
        return FormPolicy(self._form(), self.shares(sizes, budget))

    def compress_batch(self, views: Sequence[PromptView], budget: int) -> list[list[KV]]:
        """Return what is left of every layer of each prompt of a batch; the same as alone, unless risk moves slots.

        Where the tables say that it pays, prompts at risk get more slots and the others fewer; the total stays.
        """
        tables = self.tables_for(views[0].sizes, budget)
        risk = tables.at(budget, "risk")
        if self.form == "published" or self.budgets != "compiled" or not bool(risk[:, 0].any()):
            return [self.compress(view, budget) for view in views]
        alphas = [paper.prompt_utility(view, self.window) for view in views]
        signals = [paper.prompt_risk(view, alpha, self.window) for view, alpha in zip(views, alphas, strict=True)]
        own = batch_budgets(budget, torch.tensor(signals), risk)
        return [self.compress(view, max(1, slots)) for view, slots in zip(views, own, strict=True)]

    def after_step(self, step: StepView) -> Tensor:
        return streaming.after_step(step, self._form(), self.every)

    def check(self, view: PromptView) -> None:
        self.tables_for(view.sizes, 1)

    def provenance(self) -> dict[str, Any]:
        tables = self._loaded()
        return {} if tables is None else {"tables_sha256": tables.manifest.tensors_sha256}

    def fitted_on(self) -> frozenset[str]:
        tables = self._loaded()
        return frozenset() if tables is None else frozenset(tables.manifest.prompts)

    @property
    def lacks(self) -> str:
        if self.tables not in (AUTO, NEUTRAL):
            return ""
        instead = "the default form with uniform budgets" if self.form == "compiled" else "neutral ones"
        return f"no tables for this model: {instead}"

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        tables = self._loaded()
        if self.form == "compiled" and not self.lacks:
            return ()
        if self.lacks:
            return (self.lacks,)
        if tables is None or tables.published_neutral(budget):
            return ("neutral tables: every head weighs 1 and every threshold is 0.8, nothing was compiled",)
        origin, nearest = f"tables {tables.manifest.tensors_sha256[:12]}", tables.nearest_budget(budget)
        return (origin if nearest == budget else f"{origin}, compiled for budget {nearest}, used at {budget}",)

    def _form(self) -> Form:
        tables = self._loaded()
        form = (tables.manifest.form if tables else None) or Form()
        return form if self.whole else form.model_copy(update={"whole": 0.0})

    def shares(self, sizes: Sizes, budget: int) -> tuple[tuple[float, ...], ...]:
        """Return slot shares [L][H] that the tables give at a budget; () for uniform ones."""
        if self.budgets == "uniform":
            return ()
        tables = self.tables_for(sizes, budget)
        shares = tables.multiples(budget, "onepass" if self.budgets == "onepass" else "compiled")
        if self.budgets == "shuffled":
            draw = torch.Generator().manual_seed(SHUFFLE_SEED)
            shares = shares.flatten()[torch.randperm(shares.numel(), generator=draw)].view(shares.shape)
        return tuple(map(tuple, shares.tolist()))

    def _loaded(self) -> Tables | None:
        return None if self.tables in (AUTO, NEUTRAL) else load_tables(folder_of(self.tables))

    def tables_for(self, sizes: Sizes, budget: int) -> Tables:
        """Return its tables, neutral ones without any. Raises PolicyError where they do not fit a model's sizes."""
        shapes = Shapes(layers=sizes.layers, query_heads=sizes.query_heads, kv_heads=sizes.kv_heads)
        tables = self._loaded()
        if tables is None:
            return neutral(shapes, (budget,))
        tables.validate(shapes)
        return tables


def folder_of(tables: str) -> Path:
    """Return the folder that a name of tables stands for: packaged ones first."""
    place = place_of(tables)
    packaged = COMPILED / tables
    return packaged if packaged.is_dir() else place
