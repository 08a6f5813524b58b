"""Tables of speed and memory as pages, CSV and terminal text, from stored records alone; see `speed_rows`."""

from collections.abc import Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd

from harness.records.bench_folder import BenchManifest, BenchRecord
from harness.records.measured import Measured, Spread
from leaderboards.tables.files import write_files
from leaderboards.tables.speed_rows import ALARM, SPREADS, SpeedRow, SpeedTable, numbers, tables
from leaderboards.text import MIB, NOTE_CHARS, Section, clean, markdown, number, terminal


def frame(table: SpeedTable) -> pd.DataFrame:
    """The table as text, one line per cell."""
    serving, base = table.axes["kind"] == "serve-bench", table.baseline
    lines = [_serve_line(row, base) if serving else _bench_line(row, base) for row in table.rows]
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
    found = pd.DataFrame(lines)
    texts = found.select_dtypes(exclude="number").columns
    found[texts] = found[texts].map(lambda value: "" if value is None else clean(value))
    return found.to_csv(index=False, float_format="%.10g", lineterminator="\n")


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
        *(f"{axes['kind']}: {axes['model']}", axes["dtype"], f"{axes['device']} ({axes['kernel']})"),
        *(f"{axes['threads']} threads", f"machine {axes['machine']}"),
        *(f"{axes['tokens']} tokens", f"batch {axes['batch']}", f"{axes['new_tokens']} new tokens"),
    ]
    parts += [f"prefill in chunks of {axes['chunk']}"] if axes["chunk"] else []
    parts += [] if axes["warm_up"] else ["no warm-up"]
    parts += [f"limit {axes['limit_bytes'] / MIB:.0f} MiB"] if axes["limit_bytes"] else []
    return clean(", ".join(map(str, parts)))


def _named(row: SpeedRow) -> dict[str, str]:
    return {"budget": clean(row.first.budget), "method": clean(row.first.method), "status": row.first.status}


def _memory(row: SpeedRow, found: Mapping[str, float]) -> dict[str, str]:
    return {
        "peak MiB": number(found["peak_bytes"] / MIB) + (" !" if row.alarm else ""),
        "predicted MiB": number(found["predicted_bytes"] / MIB),
    }


def _bench_line(row: SpeedRow, base: Measured | None) -> dict[str, str]:
    found = numbers(row, base)
    return {
        **_named(row),
        "KV MiB": number(found["kv_bytes"] / MIB, digits=2),
        "prefill s": _spread(row, "prefill_s"),
        "observe s": _spread(row, "observe_s"),
        "compress s": _spread(row, "compress_s"),
        "compress %": number(found["compress_percent"]),
        "TTFT s": _spread(row, "ttft_s"),
        "TPOT ms": _spread(row, "tpot_s", times=1000, digits=2),
        "tokens/s": _rate(row),
        **_memory(row, found),
        "TPOT / full": number(found["tpot_ratio"], digits=2),
        "peak / full": number(found["peak_ratio"], digits=2),
    }


def _serve_line(row: SpeedRow, base: Measured | None) -> dict[str, str]:
    found = numbers(row, base)
    return {
        **_named(row),
        "KV MiB": number(found["kv_total_bytes"] / MIB, digits=2),
        "TTFT s": _spread(row, "ttft_s"),
        "step ms": _spread(row, "tpot_s", times=1000, digits=2),
        "tokens/s": _rate(row),
        "with prefill": number(found["all_tokens_per_s"]),
        **_memory(row, found),
        "tokens/s / full": number(found["tokens_per_s_ratio"], digits=2),
        "peak / full": number(found["peak_ratio"], digits=2),
    }


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
    notes = dict.fromkeys(str(note) for m in used for note in m.machine.get("notes", ()))
    facts = {
        "note": "; ".join(notes),
        "benches": ", ".join(sorted(ids)),
        "passes": ", ".join(map(str, passes)) + "; median of the passes' medians [least, most]",
        "machine": "; ".join(dict.fromkeys(_machine(m) for m in used)),
        "versions": "; ".join(dict.fromkeys(_versions(m) for m in used)),
        "code": ", ".join(sorted({m.git_commit[:12] for m in used if m.git_commit})),
    }
    return [f"{name}: {clean(text, longest=3 * NOTE_CHARS)}" for name, text in facts.items() if text]


def _machine(manifest: BenchManifest) -> str:
    found = manifest.machine
    clocks = found.get("clocks_mhz") or {}
    told = f", {clocks['low']:.0f} to {clocks['high']:.0f} MHz at the start" if clocks else ", clocks not told"
    graphics = "".join(f", {name}" for name in found.get("accelerators") or ())
    return f"{found.get('processor')}, {found.get('cores')} cores, {found.get('memory_gib')} GiB{graphics}{told}"


def _versions(manifest: BenchManifest) -> str:
    wanted = ("python", "torch", "transformers")
    return ", ".join(f"{name} {manifest.versions[name]}" for name in wanted if name in manifest.versions)


def _footnotes(table: SpeedTable) -> list[str]:
    kinds = sorted({row.found.memory for row in table.rows if row.found is not None})
    lines = []
    if kinds:
        lines += ["prefill, observe, compress: of one prompt, apart; TTFT: their sum and the choice of the token"]
        lines += ["TPOT: one decode step of the whole batch; tokens/s: batch over TPOT, [slowest, fastest] step"]
        lines += ["compress %: of prefill; KV: keys and values left after compression"]
        lines += [f"peak: highest {' and '.join(kinds)} above the loaded model, prefill and decode included"]
        lines += ["predicted: the same from shapes alone, before anything ran (harness/speed/predicted_memory.py)"]
    lines += [_alarm(row, row.found) for row in table.rows if row.alarm and row.found is not None]
    if any(row.alarm for row in table.rows):
        lines.append(
            f"!: measured and predicted peak differ by more than {ALARM:.0%}. The prediction counts tensors, "
            "the peak all that the process held; do not take either for the other"
        )
    if table.baseline is None:
        lines.append("no ratios: fullkv is not among the methods, or did not finish")
    for row in table.rows:
        if row.first.error is not None:
            first = row.first
            lines.append(
                clean(f"{first.method} at {first.budget}, pass {first.round + 1}: {first.status}: {first.error}")
            )
    return lines


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
