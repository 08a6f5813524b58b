"""Q-KVComm's sensitivities against a loop over quantised keys and values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.compiler import qkvcomm
from harness.compiler.asked import CalibrationSpec
from harness.compiler.stage import Workbench
from methods.base import Needs


def error_of(x: Tensor, bits: int) -> float:
    """Mean square error of a tensor as codes: quantization.py:45-54, 75 and 127 at a55ae69."""
    low, high = float(x.min()), float(x.max())
    scale = (high - low) / (2**bits - 1)
    codes = (x.double() / scale - low / scale).round().clamp(0, 2**bits - 1)
    return float(((codes + low / scale) * scale - x).square().mean())


def test_sensitivity_is_the_error_at_four_bits(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qkvcomm, "TOKENS", 100)
    small: dict[str, Any] = {"prompts": 20, "lengths": (600, 800), "answer": 4, "budgets": (64,)}
    spec = CalibrationSpec.model_validate({"model": "tiny", "dtype": "float32", "corpora": (str(corpus),), **small})
    bench = Workbench(spec, tmp_path)
    tensors, report = qkvcomm.compile_constants(bench, 3)
    sums = torch.zeros(4)
    for at in bench.training[:3]:
        view = bench.engine.prefill(bench.prompts[at].ids[:100], Needs(window=1)).view
        for i, layer in enumerate(view.layers):
            sums[i] += error_of(layer.kv.keys, 4) + error_of(layer.kv.values, 4)
    torch.testing.assert_close(tensors["sensitivity"], sums / 3, rtol=1e-3, atol=0)
    assert tensors["layers"].tolist() == [0, 1, 2, 3]
    most, least = int(sums.argmax()), int(sums.argmin())
    assert (report["texts"], report["bits"][most], report["bits"][least]) == (3, 8, 4)
    assert sorted(report["bits"]) == [4, 6, 6, 8]
    found = report["mean_square_error"]
    assert found["all 8 bits"] < found["all 6 bits"] < found["all 4 bits"]
    assert found["all 8 bits"] < found["ranked"] < found["all 4 bits"]
