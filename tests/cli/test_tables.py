"""`harness tables`: pages of what tables hold, their agreement, and moving them to another model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.cli import main
from methods.compilerkv.form import Form
from methods.compilerkv.manifest import Manifest, Shapes
from methods.compilerkv.selection import spearman, spearman_interval
from methods.compilerkv.tables import Tables, load_tables, neutral, save_tables

EVIL = "<script>alert(1)</script>"


def make(folder: Path, *, layers: int = 6, seed: int = 0, **fields: object) -> Tables:
    shapes = Shapes(layers=layers, query_heads=4, kv_heads=2)
    plain = neutral(shapes, (64, 128))
    budget = torch.rand(2, layers, 2, generator=torch.Generator().manual_seed(seed)) + 0.2
    given = {"kind": "compiled", "shapes": shapes, "budgets": (64, 128), "source": EVIL, "corpus": "made", "seed": 0}
    manifest = Manifest.model_validate({**given, "form": Form(), "neutral": {"head": "no", "gate": "no"}, **fields})
    shares = budget / budget.mean(dim=(1, 2), keepdim=True)
    return save_tables(replace(plain, manifest=manifest, budget=shares), folder)


def test_show_writes_a_picture_and_a_page_without_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = make(tmp_path / "tables", model=EVIL)
    assert main(["tables", "show", str(tmp_path / "tables"), "--out", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    row, column = divmod(int(tables.budget[1].argmax()), 2)
    assert f"slots at 128: {tables.budget[1].min():.2f} to {tables.budget[1].max():.2f}, most in layer {row}" in out
    assert f"column {column}" in out and "head left neutral: no" in out
    assert (tmp_path / "page" / "tables.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "page" / "tables.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert 'alt="Heat maps by layer and head: slots at 64, slots at 128, importance"' in page


def test_compare_prints_rank_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make(tmp_path / "a"), make(tmp_path / "b", seed=1)
    assert main(["tables", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, budget in zip(lines, (64, 128), strict=True):
        found = spearman_interval(one.at(budget), other.at(budget), seed=0)
        assert line == f"budget {budget}: Spearman {found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
        assert found["low"] < found["mean"] < found["high"]
    make(tmp_path / "c", layers=7)
    assert main(["tables", "compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "transfer one first" in capsys.readouterr().err


def test_ranks_share_ties() -> None:
    one, other = torch.tensor([[1.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    ranks = torch.tensor([[0.5, 0.5, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
    assert spearman(one, other) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))


def test_transfer_moves_tables_to_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", layers=7, model_revision="another")
    assert main(["tables", "transfer", str(tmp_path / "a"), "--model", "tiny", "--out", str(tmp_path / "moved")]) == 0
    assert "7 layers" in capsys.readouterr().out
    moved = load_tables(tmp_path / "moved")
    assert moved.manifest.shapes == Shapes(layers=4, query_heads=4, kv_heads=2)
    assert moved.manifest.of_model("any")
    run = ["run", "--model", "tiny", "--dtype", "float32", "--methods", "compilerkv", "--budgets", "64", "--tasks"]
    run += ["stdlib/next_line", "--lengths", "512", "--limit", "1", "--max-new-tokens", "2", "--out", str(tmp_path)]
    assert main([*run, "--set", f"compilerkv.tables={tmp_path / 'moved'}"]) == 0
    assert main([*run, "--set", f"compilerkv.tables={tmp_path / 'a'}"]) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [({"kind": "simulated"}, "simulated tables are refused"), ({"seed": "x"}, "damaged"), ({"more": 1}, "damaged")],
)
def test_unsound_tables_are_one_line(
    change: dict[str, object], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for verb in (["show", str(tmp_path)], ["compare", str(tmp_path), str(tmp_path)]):
        assert main(["tables", *verb]) == 2
        err = capsys.readouterr().err.strip()
        assert says in err and "\n" not in err
