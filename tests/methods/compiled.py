"""Prompts and compiled tables, drawn at random, for the tests of CompilerKV."""

from pathlib import Path
from typing import Any

import torch

from harness.contract import GROUP, HEADS, LAYERS, make_view
from methods.base import KVPolicy, Needs, PromptView
from methods.compilerkv.form import Form
from methods.compilerkv.manifest import Manifest, Shapes
from methods.compilerkv.tables import Tables, save_tables

SHAPES = Shapes(layers=LAYERS, query_heads=HEADS * GROUP, kv_heads=HEADS)
FORM = Form(window=4, kernel=5, whole=0.3)


def prompt(tokens: int, window: int = 64) -> PromptView:
    return make_view(tokens, Needs(window=window, column_sums=True, logprobs=True))


def make_tables(*budgets: int, seed: int = 0, **fields: Any) -> Tables:
    """fields: of the manifest."""
    draw = torch.Generator().manual_seed(seed)
    given = {"kind": "compiled", "source": "random", "corpus": "none", "model": "some", "model_revision": "r1"}
    manifest = Manifest(**{**given, "shapes": SHAPES, "budgets": budgets, "seed": seed, "form": FORM, **fields})
    head, gate = (len(budgets), LAYERS, HEADS * GROUP), (len(budgets), LAYERS, 20, 4)
    shares = [torch.rand(rows, LAYERS, HEADS, generator=draw) + 0.2 for rows in (len(budgets), 1)]
    budget, importance = (own / own.mean(dim=(1, 2), keepdim=True) for own in shares)
    return Tables(
        manifest,
        **{name: 0.8 + 0.7 * torch.rand(head, generator=draw) for name in ("head", "head_alone")},
        **{name: 0.8 + 0.2 * torch.rand(gate, generator=draw) for name in ("gate", "gate_alone")},
        **{"budget": budget, "importance": importance, "pool": torch.linspace(0.9, 0.5, len(budgets))},
        entropy_edges=torch.linspace(2.0, 4.4, 19),
        perplexity_edges=torch.tensor([1.5, 1.6, 1.7]),
        head_support=torch.randint(9, head, generator=draw),
        gate_support=torch.randint(9, gate, generator=draw),
        risk=torch.tensor([[0.0, 4.0, 0.2], [0.0, 1.0, 0.5]]).repeat(len(budgets), 1, 1),
    )


def saved(folder: Path, **fields: Any) -> Tables:
    return save_tables(make_tables(16, 64, **fields), folder)


def live(policy: KVPolicy, view: PromptView, budget: int) -> list[list[int]]:
    return [kv.live[0].tolist() for kv in policy.compress(view, budget)]


def kept(policy: KVPolicy, view: PromptView, budget: int) -> list[list[list[int]]]:
    return [kv.positions[0].tolist() for kv in policy.compress(view, budget)]
