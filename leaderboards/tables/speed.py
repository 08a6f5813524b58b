"""Tables of speed and memory as pages, CSV and terminal text, from stored records alone; see `speed_rows`."""

from collections.abc import Iterator, Sequence
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd

from harness.records.bench_folder import BenchManifest, BenchRecord
from harness.records.measured import Measured, Spread
from harness.records.spec import weights_note
from leaderboards.stats.machines import gpu, listed
from leaderboards.tables.files import write_files
from leaderboards.tables.speed_rows import ALARM, SPREADS, SpeedRow, SpeedTable, numbers, tables
from leaderboards.text import MIB, NOTE_CHARS, Section, clean, csv_text, markdown, number, terminal


def frame(table: SpeedTable) -> pd.DataFrame:
    """The table as text, one line per cell."""
    lines = [_line(row, table.baseline, serving=table.axes["kind"] == "serve-bench") for row in table.rows]
    if len({row.first.bench_id for row in table.rows}) > 1:
        lines = [{**line, "bench": clean(row.first.bench_id)} for line, row in zip(lines, table.rows, strict=True)]
    return pd.DataFrame(lines, dtype=str)


def to_markdown(records: Sequence[BenchRecord], *, manifests: Sequence[BenchManifest] = ()) -> str:
    """All tables as a page, each with what it was measured on."""
    return markdown(_parts(records, manifests))


def to_terminal(records: Sequence[BenchRecord], *, manifests: Sequence[BenchManifest] = ()) -> str:
    """All tables for a terminal of 120 columns."""
    return terminal(_parts(records, manifests))


def _parts(records: Sequence[BenchRecord], manifests: Sequence[BenchManifest]) -> Iterator[Section]:
    for table in tables(records):
        yield Section(heading(table), _facts(table, manifests))
        yield Section("", frame(table))
        yield Section("", _footnotes(table))


def to_csv(records: Sequence[BenchRecord]) -> str:
    """All cells, one line each: axes, status, seconds, bytes and ratios, unrounded."""
    lines = [_csv_line(table, row) for table in tables(records) for row in table.rows]
    return csv_text(pd.DataFrame(lines))


def write_speed(
    records: Sequence[BenchRecord], out_dir: Path, name: str, *, manifests: Sequence[BenchManifest] = ()
) -> list[Path]:
    """Write `<name>.md` and `<name>.csv`. Raises HarnessError when `name` is no file name or writing fails."""
    texts = {"md": to_markdown(records, manifests=manifests), "csv": to_csv(records)}
    return write_files(out_dir, name, texts)


def heading(table: SpeedTable) -> str:
    """What the rows of a table share, in one line."""
    axes = table.axes
    parts = [
        f"{axes['kind']}: {axes['model']}{weights_note(axes['model'])}",
        *(axes["dtype"], f"{axes['device']} ({axes['kernel']})"),
        *(f"{axes['threads']} threads", f"machine {axes['machine']}"),
        *(f"{axes['tokens']} tokens", f"batch {axes['batch']}", f"{axes['new_tokens']} new tokens"),
    ]
    parts += [f"{axes['distinct']} prompts prefilled and the others copies"] if axes["distinct"] else []
    parts += [f"prefill in chunks of {axes['chunk']}"] if axes["chunk"] else []
    parts += [] if axes["warm_up"] else ["no warm-up"]
    parts += [f"limit {axes['limit_bytes'] / MIB:.0f} MiB"] if axes["limit_bytes"] else []
    return clean(", ".join(map(str, parts)))


def _line(row: SpeedRow, base: Measured | None, *, serving: bool) -> dict[str, str]:
    found = numbers(row, base)
    kv_bytes = found["kv_total_bytes" if serving else "kv_bytes"]
    cells = {
        **{"budget": clean(row.first.budget), "method": clean(row.first.method), "status": row.first.status},
        "KV MiB": number(kv_bytes / MIB, digits=2),
    }
    if not serving:
        cells |= {f"{part} s": _spread(row, f"{part}_s") for part in ("prefill", "observe", "compress")}
        cells["compress %"] = number(found["compress_percent"])
    cells["TTFT s"] = _spread(row, "ttft_s")
    cells["step ms" if serving else "TPOT ms"] = _spread(row, "tpot_s", times=1000, digits=2)
    cells["tokens/s"] = _rate(row)
    if serving:
        cells["with prefill"] = number(found["all_tokens_per_s"])
    cells["peak MiB"] = number(found["peak_bytes"] / MIB) + (" !" if row.alarm else "")
    cells["predicted MiB"] = number(found["predicted_bytes"] / MIB)
    if serving:
        cells["tokens/s / full"] = number(found["tokens_per_s_ratio"], digits=2)
    else:
        cells["TPOT / full"] = number(found["tpot_ratio"], digits=2)
    return cells | {"peak / full": number(found["peak_ratio"], digits=2)}


def _spread(row: SpeedRow, name: str, *, times: float = 1.0, digits: int = 3) -> str:
    if row.found is None:
        return "-"
    spread: Spread = getattr(row.found, name)
    middle, low, high = (number(times * value, digits=digits) for value in (spread.median, spread.low, spread.high))
    return middle if low == high else f"{middle} [{low}, {high}]"


def _rate(row: SpeedRow) -> str:
    """Output tokens a second of the whole batch by the median step, the slowest and the fastest one."""
    if row.found is None:
        return "-"
    steps, batch = row.found.tpot_s, row.found.batch
    rates = [number(batch / seconds if seconds else nan) for seconds in (steps.median, steps.high, steps.low)]
    return rates[0] if steps.low == steps.high else f"{rates[0]} [{rates[1]}, {rates[2]}]"


def _facts(table: SpeedTable, manifests: Sequence[BenchManifest]) -> list[str]:
    """What was measured on: of the manifests whose records are in the table."""
    ids = {row.first.bench_id for row in table.rows}
    used = sorted((m for m in manifests if m.bench_id in ids), key=lambda m: m.bench_id)
    passes = sorted({row.passes for row in table.rows})
    notes = dict.fromkeys(note for m in used for note in listed(m.machine, "notes"))
    wanted = ("python", "torch", "transformers")
    versions = (", ".join(f"{name} {m.versions[name]}" for name in wanted if name in m.versions) for m in used)
    facts = {
        "note": "; ".join(notes),
        "benches": ", ".join(sorted(ids)),
        "passes": ", ".join(map(str, passes)) + "; median of the passes' medians [least, most]",
        "machine": "; ".join(dict.fromkeys(_machine(m) for m in used)),
        "gpu at the start": "; ".join(dict.fromkeys(filter(None, (gpu(m.machine) for m in used)))),
        "versions": "; ".join(dict.fromkeys(versions)),
        "code": ", ".join(sorted({m.git_commit[:12] for m in used if m.git_commit})),
    }
    return [f"{name}: {clean(text, longest=3 * NOTE_CHARS)}" for name, text in facts.items() if text]


def _machine(manifest: BenchManifest) -> str:
    found = manifest.machine
    clocks = found.get("clocks_mhz")
    low, high = (clocks.get(name) if isinstance(clocks, dict) else None for name in ("low", "high"))
    told = ", clocks not told"
    if isinstance(low, int | float) and isinstance(high, int | float):
        told = f", {low:.0f} to {high:.0f} MHz at the start"
    graphics = "".join(f", {name}" for name in listed(found, "accelerators"))
    return f"{found.get('processor')}, {found.get('cores')} cores, {found.get('memory_gib')} GiB{graphics}{told}"


def _footnotes(table: SpeedTable) -> list[str]:
    kinds = sorted({row.found.memory for row in table.rows if row.found is not None})
    lines = []
    if kinds:
        lines = [
            "prefill, observe, compress: of one prompt, apart; TTFT: their sum and the choice of the token",
            "TPOT: one decode step of the whole batch; tokens/s: batch over TPOT, [slowest, fastest] step",
            "compress %: of prefill; KV: keys and values left after compression",
            f"peak: highest {' and '.join(kinds)} above the loaded model, prefill and decode included",
            "predicted: the same from shapes alone, before anything ran (harness/speed/predicted_memory.py)",
        ]
    alarms = [_alarm(row, row.found) for row in table.rows if row.alarm and row.found is not None]
    lines += alarms
    if alarms:
        lines.append(
            f"!: measured and predicted peak differ by more than {ALARM:.0%}. The prediction counts tensors, "
            "the peak all that the process held; do not take either for the other"
        )
    if table.baseline is None:
        lines.append("no ratios: fullkv is not among the methods, or did not finish")
    firsts = [row.first for row in table.rows if row.first.error is not None]
    return lines + [clean(f"{r.method} at {r.budget}, pass {r.round + 1}: {r.status}: {r.error}") for r in firsts]


def _alarm(row: SpeedRow, found: Measured) -> str:
    share = found.peak_bytes / found.predicted_bytes - 1 if found.predicted_bytes else nan
    where = f"{clean(row.first.method)} at {clean(row.first.budget)}"
    return f"! {where}: peak {abs(share):.0%} {'above' if share > 0 else 'below'} its prediction"


def _csv_line(table: SpeedTable, row: SpeedRow) -> dict[str, Any]:
    found, first = row.found, row.first
    line = {**table.axes, "bench_id": first.bench_id, "method": first.method, "budget": first.budget}
    line |= {"budget_tokens": nan if first.budget_tokens is None else first.budget_tokens, "status": first.status}
    line |= {"error": first.error, "passes": row.passes}
    for name in SPREADS:
        spread: Spread | None = getattr(found, name, None)
        line |= {f"{name}_{part}": getattr(spread, part, nan) for part in ("median", "low", "high")}
    line |= numbers(row, table.baseline)
    per_layer = "" if found is None else " ".join(map(str, found.kv_bytes))
    return {**line, "alarm": row.alarm, "memory": found and found.memory, "kv_bytes_per_layer": per_layer}
