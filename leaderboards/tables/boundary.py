"""The boundary: how long a prompt and how large a batch each method finishes under a limit, as a table and a picture.

Read from the folder of `harness boundary` alone. Text from outside is cleaned and escaped; the same records give the
same bytes.
"""

import io
from collections.abc import Sequence
from html import escape as html
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harness.errors import HarnessError
from harness.records.boundary_folder import BoundaryManifest, BoundaryRecord, load_boundaries
from harness.records.run_folder import write_bytes
from harness.records.spec import weights_note
from leaderboards.stats.comparable import budget_order
from leaderboards.stats.machines import gpu, listed
from leaderboards.tables.files import write_files
from leaderboards.tables.picture import plain_text
from leaderboards.text import MIB, Section, clean, csv_text, escape, markdown, number, terminal

HATCHES = ("", "///", "...", "xx", "\\\\\\", "oo")
"""Hatching of the bars of each budget, so that they are told apart without colour."""
READING = (
    "≥: even the largest size tried fits. 0: not even the smallest does. Peak: at that size, above the model's own "
    "bytes. Next: the smallest size that did not fit and how it ended; only `oom` says that memory ran out."
)


def write_boundary(folder: Path, out: Path | None = None, name: str = "frontier") -> list[Path]:
    """Write `<name>.md`, `.csv`, `.svg` and `.png` of a folder of searches into `out`, itself by default.

    Raises HarnessError when there is no search, `name` is no file name, or a file cannot be read or written.
    """
    manifest, records = load_boundaries(folder)
    if not records:
        raise HarnessError(f"no search in {folder}; run `harness boundary` first")
    svg, png = draw(records, manifest, salt=name)
    md = to_markdown(records, manifest, picture=f"{name}.svg")
    paths = write_files(out or folder, name, {"md": md, "csv": to_csv(records, manifest), "svg": svg})
    paths.append(paths[0].with_name(f"{name}.png"))
    write_bytes(paths[-1], png)
    return paths


def to_markdown(records: Sequence[BoundaryRecord], manifest: BoundaryManifest, *, picture: str) -> str:
    """The page. picture: the file that it shows, with its text alternative."""
    alt = escape(describe(records)).replace("[", r"\[").replace("]", r"\]")
    first, *rest = _parts(records, manifest)
    return markdown([Section(first.title, facts(manifest), level=1), Section("", f"![{alt}]({picture})"), *rest])


def to_terminal(records: Sequence[BoundaryRecord], manifest: BoundaryManifest) -> str:
    """The same for a terminal, without the picture and the facts that the command has said already."""
    return terminal(_parts(records, manifest))


def _parts(records: Sequence[BoundaryRecord], manifest: BoundaryManifest) -> list[Section]:
    trouble = troubles(records)
    parts = [Section(title(manifest), []), Section("", frame(records)), Section("", READING)]
    return [*parts, Section("Probes that say nothing about memory", trouble)] if trouble else parts


def to_csv(records: Sequence[BoundaryRecord], manifest: BoundaryManifest) -> str:
    """One row per search, in bytes, tokens and counts; what there is not is empty."""
    rows = []
    model = manifest.model
    for record in ordered(records):
        found, edge = record.found, record.probe(record.found.answer) if record.found else None
        row = {
            **{"model": model.name, "dtype": model.dtype, "device": model.device},
            **{"limit_bytes": record.limit_bytes, "limit_kind": manifest.limit_kind},
            **{"model_bytes": manifest.model_bytes, "method": record.method, "budget": record.budget},
            **{"kind": record.kind, "at_context": record.at_context},
            **{"answer": found.answer if found else None, "everything_fits": found.whole if found else None},
            **{name: getattr(edge, name, None) for name in ("peak_bytes", "predicted_bytes")},
            **{name: getattr(found, name, None) for name in ("next_size", "next_status")},
            "probes": len(record.probes),
        }
        rows.append(row)
    whole = ("at_context", "answer", "peak_bytes", "predicted_bytes", "next_size")
    table = pd.DataFrame(rows).astype(dict.fromkeys(whole, "Int64"))
    return csv_text(table)


def frame(records: Sequence[BoundaryRecord]) -> pd.DataFrame:
    """Text, a row per budget and method: the answer, its peak in MiB and the next size, for each thing searched."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for record in ordered(records):
        row = rows.setdefault((record.budget, record.method), {})
        what = "context" if record.kind == "context" else f"batch at {record.at_context}"
        edge = record.probe(record.found.answer) if record.found else None
        peak = "-" if edge is None or edge.peak_bytes is None else number(edge.peak_bytes / MIB)
        row |= {f"largest {what}": answer(record), f"{what}: peak MiB": peak, f"{what}: next": following(record)}
    keyed = [{"budget": clean(b), "method": clean(m), **row} for (b, m), row in rows.items()]
    return pd.DataFrame(keyed).fillna("-").astype(str)


def ordered(records: Sequence[BoundaryRecord]) -> list[BoundaryRecord]:
    """The records by budget, then in the order of the command; contexts before batches."""
    place = {method: i for i, method in enumerate(dict.fromkeys(record.method for record in records))}
    return sorted(
        records, key=lambda r: (budget_order(r.budget), place[r.method], r.kind == "batch", r.at_context or 0)
    )


def answer(record: BoundaryRecord) -> str:
    """The size as text."""
    if record.found is None:
        return "unfinished"
    return ("≥ " if record.found.whole else "") + str(record.found.answer)


def following(record: BoundaryRecord) -> str:
    """The next size and how it ended, or a dash where there is none."""
    found = record.found
    return f"{found.next_size} {found.next_status}" if found and found.next_size is not None else "-"


def troubles(records: Sequence[BoundaryRecord]) -> list[str]:
    """A line for each probe that ended otherwise than ok or out of memory."""
    return [
        f"{clean(record.method)} at {clean(record.budget)}: {probe.tokens} tokens x {probe.batch}: {probe.status} "
        f"after {number(probe.seconds)} s {clean(probe.error or '')}".rstrip()
        for record in ordered(records)
        for probe in record.probes
        if probe.status in ("timeout", "failed")
    ]


def title(manifest: BoundaryManifest) -> str:
    """The limit and what ran under it."""
    limit, model = f"{manifest.limit_bytes / MIB:.0f} MiB", manifest.model
    return clean(f"Boundary under {limit}: {model.name}{weights_note(model.name)} ({model.dtype}, {model.device})")


def facts(manifest: BoundaryManifest) -> list[str]:
    """What decides the numbers, a line each."""
    machine = manifest.machine
    where = [str(machine[name]) for name in ("processor", "system") if machine.get(name)]
    lines = [
        f"limit: {manifest.limit_bytes} bytes by {manifest.limit_kind}, {manifest.model_bytes} of them the model's",
        f"each probe: prefill and {manifest.new_tokens} tokens by itself, at most {manifest.timeout_s:g} s, "
        f"chunk {manifest.chunk or 'none'}, threads {manifest.threads or 'default'}",
        *([f"batches: {manifest.distinct} prompts prefilled and the others copies"] if manifest.distinct else []),
        f"machine: {', '.join([*where, *listed(machine, 'accelerators')]) or 'unknown'}",
        *([f"gpu at the start: {found}"] if (found := gpu(machine)) else []),
        *manifest.notes,
    ]
    return [clean(line) for line in lines]


def describe(records: Sequence[BoundaryRecord]) -> str:
    """What the picture shows, in words."""
    parts = []
    for record in ordered(records):
        what = "context" if record.kind == "context" else f"batch at {record.at_context} tokens"
        end = f", next {following(record)}" if record.found and record.found.next_size is not None else ""
        size = answer(record).replace("≥", "at least")
        parts.append(f"{clean(record.method)} at {clean(record.budget)}: largest {what} {size}{end}")
    return "Bars by method and budget. " + "; ".join(parts) + "."


def draw(records: Sequence[BoundaryRecord], manifest: BoundaryManifest, *, salt: str) -> tuple[str, bytes]:
    """SVG text and PNG bytes: a panel for the contexts and one for the batches of each context."""
    panels = list(dict.fromkeys((r.kind, r.at_context) for r in sorted(records, key=lambda r: r.at_context or 0)))
    rows = len({(r.method, r.budget) for r in records})
    text, image = io.StringIO(), io.BytesIO()
    with plain_text({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure = Figure(figsize=(max(4.5, 1.1 * rows + 1.5) * len(panels), 4.8), layout="constrained")
        figure.suptitle(title(manifest), fontsize=10)
        for panel, (kind, at) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _bars(panel, [r for r in ordered(records) if (r.kind, r.at_context) == (kind, at)])
            panel.set_title("largest context, batch 1" if at is None else f"largest batch, prompts of {at} tokens")
            panel.set_ylabel("prompt tokens" if at is None else "prompts")
        figure.savefig(text, format="svg", metadata={"Date": None, "Title": title(manifest)})
        figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    desc = f"</title>\n <desc>{html(describe(records))}</desc>"
    svg = text.getvalue().replace("</title>", desc, 1).replace("<svg ", '<svg role="img" ', 1)
    return svg, image.getvalue()


def _bars(panel: Axes, records: Sequence[BoundaryRecord]) -> None:
    """Bars with their numbers, and what the next size ended with; told apart by hatching, not by colour."""
    budgets = list(dict.fromkeys(record.budget for record in records))
    for x, record in enumerate(records):
        height = record.found.answer if record.found else 0
        line = "--" if record.found and record.found.whole else "-"
        hatch = HATCHES[budgets.index(record.budget) % len(HATCHES)]
        panel.bar(x, height, width=0.7, color="0.85", edgecolor="black", hatch=hatch, linestyle=line, lw=1.2)
        label = answer(record) if following(record) == "-" else f"{answer(record)}\nnext: {following(record)}"
        panel.annotate(label, (x, height), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7)
    names = [f"{clean(r.method, longest=40)}\n{clean(r.budget, longest=12)}" for r in records]
    panel.set_xticks(range(len(records)), names, rotation=30, ha="right", fontsize=8)
    panel.margins(y=0.18)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylim(bottom=0)
