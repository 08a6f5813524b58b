"""What a verification found, in lines for a terminal."""

from harness.submission.verify import Verification


def told(verdict: Verification) -> list[str]:
    """The verdict in lines: what it is of, a table of checks, what was not recomputed, OK or REFUSED with reasons."""
    lines = []
    if verdict.manifest is not None:
        m = verdict.manifest
        what = f"{m.spec.model.name} {m.spec.model.dtype}, {m.samples} samples x {m.cells} cells, commit {m.git_commit}"
        lines.append(ascii(f"run {m.run_id}: {what}, packed by version {verdict.index.harness}")[1:-1])
    lines.append(f"{'check':<12} {'counted':>9} {'refused':>9}")
    for check in verdict.checks:
        note = "  values reported, not recomputed" if check.name == "likelihood" else ""
        lines.append(f"{check.name:<12} {check.counted:>9,} {check.refused:>9,}{note}")
    others = [f"{count} {status}" for status, count in sorted(verdict.statuses.items()) if status != "ok"]
    if others:
        lines.append(f"without a score: {', '.join(others)}")
    if verdict.ok:
        part = " Cells may be missing: it is a part of a run." if verdict.index.partial else ""
        lines.append(f"OK: the scores follow from the predictions. Seconds and NLL are as reported.{part}")
    else:
        lines += ["REFUSED", *(f"  {reason}" for reason in verdict.reasons)]
    return lines
