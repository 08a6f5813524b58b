"""Compiled tables to look at: heat maps as a PNG, and a page that needs nothing but itself."""

import base64
import io
import json
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from harness.errors import HarnessError
from harness.records.run_folder import write_bytes, write_text
from leaderboards.pages.html import render
from methods.compilerkv.tables import Tables


def write_page(tables: Tables, folder: Path) -> list[Path]:
    """Write `tables.png` and `tables.html` into `folder` and return their paths. Raises HarnessError when it cannot."""
    picture, manifest = heat_maps(tables), tables.manifest
    facts = {
        "model": f"{manifest.model} ({manifest.model_revision[:12] or 'any revision'})",
        "shapes": str(manifest.shapes),
        "source": manifest.source,
        "form": str(manifest.form or "published"),
        "corpus": manifest.corpus,
        "left neutral": "; ".join(f"{name}: {why}" for name, why in manifest.neutral.items()) or "nothing",
        "created": f"{manifest.created} by {' '.join(manifest.command)} at {(manifest.git_commit or 'no commit')[:12]}",
        "report": json.dumps(manifest.report),
    }
    page = render(
        "compiled_tables.html",
        title=f"Compiled tables of {manifest.model or 'no model'}",
        alt=f"Heat maps by layer and head: {', '.join(name for name, _ in shown(tables))}",
        picture=base64.b64encode(picture).decode(),
        facts=facts,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"cannot create {folder}: {error.strerror}; choose another --out") from None
    paths = [folder / "tables.png", folder / "tables.html"]
    write_bytes(paths[0], picture)
    write_text(paths[1], page)
    return paths


def heat_maps(tables: Tables) -> bytes:
    """A PNG: layers downwards, heads (or entropy bins) to the right; the colour scale is each map's own."""
    maps = shown(tables)
    figure = Figure(figsize=(2.6 * len(maps) + 1, 6), layout="constrained")
    for panel, (name, table) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        image = panel.imshow(table.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
        panel.set(title=name, xlabel="entropy bin" if name.startswith("threshold") else "head", ylabel="layer")
        figure.colorbar(image, ax=panel, shrink=0.7)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    return data.getvalue()


def shown(tables: Tables) -> list[tuple[str, Tensor]]:
    """Name and [L, columns] of every table that was compiled."""
    neutral, budgets = tables.manifest.neutral, tables.manifest.budgets
    maps = [(f"slots at {budget}", tables.budget[i]) for i, budget in enumerate(budgets)]
    maps.append(("importance", tables.importance[0]))
    for i, budget in enumerate(budgets):
        if not {"head", f"head {budget}"} & neutral.keys():
            maps.append((f"weights at {budget}", tables.head[i]))
        if not {"gate", f"gate {budget}"} & neutral.keys():
            maps.append((f"thresholds at {budget}", tables.gate[i].mean(dim=-1)))
    return maps
