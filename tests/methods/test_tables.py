"""Compiled tables: look-ups, files and what they refuse, and tables moved to another model."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.contract import GROUP, HEADS, LAYERS
from harness.models.assets import ASSETS
from methods.base import PolicyError
from methods.compilerkv.form import Form
from methods.compilerkv.manifest import Shapes
from methods.compilerkv.policy import COMPILED, CompilerKV
from methods.compilerkv.tables import load_tables, one_pass, save_tables, transfer
from tests.methods.compiled import make_tables, saved
from tests.methods.loops import sizes


def test_lookup_takes_the_nearest_budget_and_the_right_cell() -> None:
    tables = make_tables(64, 128, 512)
    assert [tables.nearest_budget(n) for n in (1, 64, 96, 97, 320, 321, 9999)] == [64, 64, 64, 128, 128, 512, 512]
    edges, plain = tables.entropy_edges.tolist(), (torch.full_like(tables.head[1], 1.0), torch.full((LAYERS,), 0.8))
    for entropy, high in ((0.0, 0), (edges[0], 1), (edges[4] - 1e-4, 4), (edges[4], 5), (99.0, 19)):
        for perplexity, wide in ((1.0, 0), (1.55, 1), (1.65, 2), (float("inf"), 3)):
            gate, alone = (own[1, :, high, wide] for own in (tables.gate, tables.gate_alone))
            for learned, expected in {
                "both": (tables.head[1], gate),
                "independent": (tables.head_alone[1], alone),
                "head": (tables.head_alone[1], plain[1]),
                "gate": (plain[0], alone),
            }.items():
                found = tables.lookup(130, entropy=entropy, perplexity=perplexity, learned=learned)  # type: ignore[arg-type]
                assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("found", ["compiled", "onepass"])
def test_no_head_of_the_shipped_tables_gets_fewer_slots_at_a_larger_budget(found: Any) -> None:
    tables = load_tables(COMPILED / "smollm2-135m")
    assert tables.manifest.form is not None
    window, budgets = tables.manifest.form.window, [*range(32, 1100), 2048, 4096]
    every = [tables.multiples(budget, found) for budget in budgets]
    assert all(float(own.mean()) == pytest.approx(1.0, abs=1e-3) and float(own.min()) > 0 for own in every)
    slots = torch.stack([max(0, budget - window) * own for budget, own in zip(budgets, every, strict=True)])
    least = -1e-3 if found == "compiled" else -2.0  # one pass: the heads that matter least lose a slot or two after 64
    assert bool((slots.diff(dim=0) >= least).all())
    for row, budget in enumerate(tables.manifest.budgets):
        own = tables.budget[row] if found == "compiled" else one_pass(tables.importance[0], tables.pool[row])
        assert torch.equal(tables.multiples(budget, found), own)
    assert torch.equal(tables.multiples(2048, found), tables.multiples(512, found))


def test_slots_beyond_the_window_are_linear_between_compiled_budgets() -> None:
    """At 96, 192 and 384, by hand: (96 - 32) m = (32 x 1.5 + 96 x 0.5) / 2 for a head of 1.5 at 64 and 0.5 at 128."""
    tables = make_tables(64, 128, 256, 512)
    form = Form(window=32)
    tables = replace(tables, manifest=tables.manifest.model_copy(update={"form": form}))
    rows = torch.ones_like(tables.budget)
    rows[0, 0, :2], rows[1, 0, :2] = torch.tensor([1.5, 0.5]), torch.tensor([0.5, 1.5])
    tables = replace(tables, budget=rows)
    found = tables.multiples(96, "compiled")
    assert found[0, :2].tolist() == pytest.approx([(32 * 1.5 + 96 * 0.5) / 2 / 64, (32 * 0.5 + 96 * 1.5) / 2 / 64])
    assert tables.multiples(192, "compiled")[0, 0].item() == pytest.approx((96 * 0.5 + 224 * 1.0) / 2 / 160)
    assert tables.multiples(384, "compiled")[0, 0].item() == pytest.approx(1.0)
    inside = make_tables(8, 14)  # budgets that the window fills have no slots beyond it
    inside = replace(inside, manifest=inside.manifest.model_copy(update={"form": form}))
    assert torch.equal(inside.multiples(12, "compiled"), inside.budget[1])


def test_shares_of_any_budget_lie_between_the_compiled_ones() -> None:
    tables = make_tables(16, 64, 256)
    for asked, row in ((1, 0), (16, 0), (64, 1), (256, 2), (9999, 2)):
        torch.testing.assert_close(tables.at(asked), tables.budget[row])
    torch.testing.assert_close(tables.at(32), (tables.budget[0] + tables.budget[1]) / 2)
    torch.testing.assert_close(tables.at(128), (tables.budget[1] + tables.budget[2]) / 2)
    torch.testing.assert_close(make_tables(16).at(99), make_tables(16).budget[0])


def test_tables_come_back_as_saved_and_are_read_once(tmp_path: Path) -> None:
    written = saved(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "tables.safetensors"]
    loaded = load_tables(tmp_path)
    assert loaded.manifest == written.manifest and loaded.manifest.created
    assert all(torch.equal(x, loaded.tensors[name]) for name, x in written.tensors.items())
    assert load_tables(str(tmp_path)) is loaded
    assert torch.equal(saved(tmp_path, seed=1).head, load_tables(tmp_path).head)


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def damage_tensors(folder: Path) -> None:
    data = bytearray((folder / "tables.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "tables.safetensors").write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no tables at": lambda folder: (folder / "tables.safetensors").unlink(),
    "manifest.json': No such file": lambda folder: (folder / "manifest.json").unlink(),
    "simulated tables are refused": lambda folder: edit(folder, kind="simulated"),
    "sha256": damage_tensors,
    "Extra inputs are not permitted": lambda folder: edit(folder, surprise=1),
    "schema_version": lambda folder: edit(folder, schema_version=1),
    "Invalid JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "not ascending": lambda folder: edit(folder, budgets=[16, 16]),
    r"budget is .*\[2, 4, 2\], expected .*\[1, 4, 2\]": lambda folder: edit(folder, budgets=[16]),
    "head(_alone)? goes from .* outside 1.4 to 1.5": lambda folder: edit(folder, head_range=[1.4, 1.5]),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_unsound_files_are_refused_in_one_line(message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    load_tables(tmp_path)
    DAMAGE[message](tmp_path)
    with pytest.raises(PolicyError, match=rf"^.*{message}.*compile.*$"):
        CompilerKV(tables=str(tmp_path)).notes(16, sizes(20, LAYERS))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("head", math.nan, "1 values of head are not finite"),
        ("gate", math.inf, "1 values of gate are not finite"),
        ("budget", 0.0, "budget multiples are not above 0 with a mean of 1"),
        ("budget", 9.0, "budget multiples are not above 0 with a mean of 1"),
        ("head", 2.0, "head goes from .* to 2, outside 0.8 to 1.5"),
        ("gate", 0.5, "gate goes from 0.5"),
        ("entropy_edges", 9.0, "entropy_edges .* are not ascending"),
        ("gate_support", -1, "gate_support goes from -1"),
    ],
)
def test_unsound_values_are_neither_saved_nor_read(name: str, value: float, message: str, tmp_path: Path) -> None:
    tables = make_tables(16)
    tables.tensors[name].view(-1)[0] = value
    with pytest.raises(PolicyError, match=message):
        save_tables(tables, tmp_path)
    assert not list(tmp_path.iterdir())
    mislabelled = replace(tables, manifest=tables.manifest.model_copy(update={"kind": "neutral"}))
    with pytest.raises(PolicyError, match="compile the tables again"):
        save_tables(mislabelled, tmp_path)


def test_tables_of_another_model_are_refused_and_moved_by_depth(tmp_path: Path) -> None:
    tables, other = make_tables(16), Shapes(layers=7, query_heads=HEADS * GROUP, kv_heads=HEADS)
    with pytest.raises(PolicyError, match=r"tables are for 4 layers .* has 7 layers .*transfer"):
        tables.validate(other)
    moved = save_tables(transfer(tables, other), tmp_path)
    moved.validate(other)
    assert "transferred from 4 layers" in moved.manifest.source
    torch.testing.assert_close(moved.gate[:, ::2], tables.gate)
    torch.testing.assert_close(moved.gate[:, 1], (tables.gate[:, 0] + tables.gate[:, 1]) / 2)
    assert torch.equal(moved.gate_support[:, 1], torch.minimum(tables.gate_support[:, 0], tables.gate_support[:, 1]))
    assert torch.equal(moved.entropy_edges, tables.entropy_edges)


def test_heads_are_moved_only_when_asked_for() -> None:
    tables, other = make_tables(16), Shapes(layers=LAYERS, query_heads=11, kv_heads=1)
    with pytest.raises(PolicyError, match="heads=True"):
        transfer(tables, other)
    moved = transfer(tables, other, heads=True)
    moved.validate(other)
    torch.testing.assert_close(moved.head[..., ::2], tables.head)
    torch.testing.assert_close(moved.head[..., 1], (tables.head[..., 0] + tables.head[..., 1]) / 2)
    assert torch.equal(moved.gate, tables.gate)
    assert moved.budget.shape == (1, LAYERS, 1)
    torch.testing.assert_close(moved.budget.mean(dim=(1, 2)), torch.ones(1))


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
