"""Constants of a model: written and read again, of one model and one method alone, refused when damaged."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from methods import artefact
from methods.artefact import CompiledPolicy, Constants, ConstantsManifest, load_constants, save_constants
from methods.base import PolicyError


@dataclass(frozen=True)
class Reader(CompiledPolicy):
    METHOD = "reader"


def written(folder: Path, *, method: str = "reader", revision: str = "abc", value: float = 1.0) -> Constants:
    facts = {"model": "tiny", "corpus": "none", "prompts": ("0" * 64,), "seed": 0}
    manifest = ConstantsManifest(method=method, model_revision=revision, **facts)  # type: ignore[arg-type]
    return save_constants(Constants(manifest, {"basis": torch.full((3, 2), value, dtype=torch.float16)}), folder)


def test_constants_are_read_as_they_were_written(tmp_path: Path) -> None:
    saved = written(tmp_path)
    found = load_constants(tmp_path)
    assert found.manifest == saved.manifest and torch.equal(found.tensors["basis"], saved.tensors["basis"])
    policy = Reader(str(tmp_path)).for_model("abc")
    assert policy.method_bytes == 12 and policy.fitted_on() == {"0" * 64} and not policy.lacks
    assert policy.provenance() == {"constants_sha256": saved.manifest.tensors_sha256}
    assert policy.constants()["basis"].shape == (3, 2)


def test_the_packaged_ones_of_the_model_at_hand_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact, "COMPILED", tmp_path)
    written(tmp_path / "reader" / "one", revision="abc")
    written(tmp_path / "reader" / "other", revision="def", value=2.0)
    policy = Reader()
    assert policy.lacks and policy.constants() == {} and policy.method_bytes == 0
    assert policy.for_model("def").compiled == "other"
    assert float(policy.for_model("def").constants()["basis"][0, 0]) == 2.0
    with pytest.raises(
        PolicyError, match="reader has no constants of this model, 123; make some with `harness compile"
    ):
        policy.for_model("123")


@pytest.mark.parametrize(
    ("given", "told"),
    [({"revision": "def"}, r"are of tiny \(def\), this model is abc"), ({"method": "other"}, "are of 'other'")],
)
def test_those_of_another_model_or_method_are_refused(tmp_path: Path, given: dict[str, str], told: str) -> None:
    written(tmp_path, **given)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=told):
        Reader(str(tmp_path)).for_model("abc")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("constants.safetensors", b"\0" * 64, "damaged or not this manifest's"),
        ("manifest.json", b"{", "is damaged: "),
        ("manifest.json", b"{}", "method: Field required"),
        ("manifest.json", None, "no constants at"),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(tmp_path: Path, name: str, text: bytes | None, told: str) -> None:
    written(tmp_path)
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_bytes(text)
    with pytest.raises(PolicyError, match=told) as refusal:
        Reader(str(tmp_path)).for_model("abc")
    assert "\n" not in str(refusal.value)


def test_numbers_that_are_none_are_damage(tmp_path: Path) -> None:
    written(tmp_path, value=float("nan"))
    with pytest.raises(PolicyError, match="'basis' is not finite"):
        load_constants(tmp_path)
