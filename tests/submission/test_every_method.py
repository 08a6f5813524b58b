"""What every method of the package stores is what `harness verify` makes of its records."""

from pathlib import Path

from harness.cli import main
from harness.submission.archive import pack_run
from harness.submission.verify import verify_pack
from methods.artefact import CompiledPolicy
from methods.registry import load_methods
from tests.tiny_run import only

CODED = ("quant", "turboquant", "fp8")
"""Whose presets store other things."""
LABELS = [
    label
    for name, entry in load_methods().items()
    if entry.policy.__module__.startswith("methods.") and not issubclass(entry.policy, CompiledPolicy)
    for label in (name, *(f"{name}@{preset}" for preset in entry.presets if name in CODED))
    if name != "q8_0"  # heads of the tiny model fill no block of it
]


def test_records_of_every_method_are_verified(tmp_path: Path) -> None:
    words = f"run --model tiny --methods {','.join(LABELS)} --tasks niah/passkey --lengths 600 --limit 1 --budgets 0.3"
    assert main([*words.split(), "--max-new-tokens", "3", "--observe", "0", "--out", str(tmp_path)]) == 0
    pack_run(only(tmp_path), tmp_path / "pack.zip")
    verdict = verify_pack(tmp_path / "pack.zip")
    assert verdict.ok, verdict.reasons
    assert next(check.counted for check in verdict.checks if check.name == "budgets") >= len(LABELS)
