"""CompilerKV's compiled form: whose tables it takes, and how many slots they give to each head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.models.assets import ASSETS
from methods.base import Needs, PolicyError, PromptView
from methods.compilerkv.form import Form
from methods.compilerkv.manifest import Shapes
from methods.compilerkv.policy import COMPILED, CompilerKV
from methods.compilerkv.tables import Tables, load_tables, save_tables
from methods.registry import make_policy
from tests.methods.test_compilerkv import GROUP, HEADS, LAYERS, make_prompt, make_tables


def with_sums(view: PromptView) -> PromptView:
    for layer in view.layers:
        draw = torch.Generator().manual_seed(layer.index)
        layer.column_sums = torch.rand(1, HEADS, GROUP, view.tokens, generator=draw)
    return view


def compiled_tables(folder: Path, **fields: Any) -> Tables:
    tables = make_tables((16, 64))
    form = Form(window=4, kernel=5, whole=0.3)
    changed = tables.manifest.model_copy(update={"form": form, "model": "some", "model_revision": "r1", **fields})
    return save_tables(replace(tables, manifest=changed), folder)


def live(policy: CompilerKV, view: PromptView, budget: int) -> list[list[int]]:
    return [kv.live[0].tolist() for kv in policy.compress(view, budget)]


def test_the_compiled_form_gives_every_head_its_share(tmp_path: Path) -> None:
    tables, view = compiled_tables(tmp_path), with_sums(make_prompt(60))
    policy = CompilerKV(tables=str(tmp_path))
    assert policy.needs == Needs(window=4, column_sums=True)
    found = live(policy, view, 16)
    assert sum(map(sum, found)) == 16 * LAYERS * HEADS
    np.testing.assert_allclose(found, 4 + 12 * tables.budget[0].numpy(), atol=1)
    assert live(CompilerKV(tables=str(tmp_path), budgets="uniform"), view, 16) == [[16] * HEADS] * LAYERS
    shuffled = live(CompilerKV(tables=str(tmp_path), budgets="shuffled"), view, 16)
    assert shuffled != found
    both = [sorted(slots for layer in table for slots in layer) for table in (shuffled, found)]
    assert both[0] == pytest.approx(both[1], abs=1)
    bare = make_prompt(60)
    window = make_policy("compilerkv@window", {"tables": str(tmp_path)})
    assert window.needs == Needs(window=4)
    assert [kv.live[0].tolist() for kv in window.compress(bare, 16)] == found


def test_shares_of_any_budget_lie_between_the_compiled_ones() -> None:
    tables = make_tables((16, 64, 256))
    for asked, row in ((1, 0), (16, 0), (64, 1), (256, 2), (9999, 2)):
        torch.testing.assert_close(tables.at(asked), tables.budget[row])
    torch.testing.assert_close(tables.at(32), (tables.budget[0] + tables.budget[1]) / 2)
    torch.testing.assert_close(tables.at(128), (tables.budget[1] + tables.budget[2]) / 2)
    torch.testing.assert_close(make_tables((16,)).at(99), make_tables((16,)).budget[0])


def test_tables_belong_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_tables(tmp_path / "own")
    monkeypatch.setattr("methods.compilerkv.policy.COMPILED", tmp_path)
    assert CompilerKV().for_model("r1") == CompilerKV(tables="own")
    assert CompilerKV().for_model("r2") == CompilerKV(tables="neutral")
    assert CompilerKV(tables="own").for_model("r1").provenance().keys() == {"tables_sha256"}
    with pytest.raises(PolicyError, match=r"tables own are of some \(r1\), this model is r2; compile"):
        CompilerKV(tables="own").for_model("r2")
    (note,) = CompilerKV(tables="neutral").notes(16, 99, LAYERS)
    assert note.startswith("no tables for this model")
    assert CompilerKV(tables="own").notes(16, 99, LAYERS) == ()
    assert live(CompilerKV(tables="neutral"), with_sums(make_prompt(60)), 20) == [[20] * HEADS] * LAYERS


def test_the_prompts_that_tables_were_fitted_on_are_known(tmp_path: Path) -> None:
    compiled_tables(tmp_path, prompts=("a" * 64, "b" * 64))
    assert CompilerKV(tables=str(tmp_path)).fitted_on() == {"a" * 64, "b" * 64}
    assert CompilerKV(tables="neutral").fitted_on() == frozenset()


def test_the_packaged_tables_are_compiled_and_those_of_the_packaged_model() -> None:
    policy = CompilerKV().for_model(ASSETS["smollm2-135m"].sha256)
    assert policy.tables == "smollm2-135m"
    tables = load_tables(COMPILED / policy.tables)
    assert tables.manifest.kind == "compiled"
    assert tables.manifest.shapes == Shapes(layers=30, query_heads=9, kv_heads=3)
    assert len(tables.manifest.prompts) == 128
    assert tables.manifest.form is not None and policy.needs == tables.manifest.form.needs
    assert tables.manifest.command[:2] == ("harness", "compile")
    assert not any(word.startswith("/") for word in tables.manifest.command)
