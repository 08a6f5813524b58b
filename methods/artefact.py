"""Constants of a model that a method reads: a folder of `constants.safetensors` and `manifest.json`.

`harness compile METHOD` makes them. They are of one model, by its content hash, and refused on another; the prompts
that they were made from are not for scoring. Those that come with this package lie in `methods/compiled/METHOD/MODEL/`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor

from methods.base import KVPolicy, PolicyError, Sizes
from methods.budget import quoted
from methods.plain_files import parsed, place_of, read_plain, stamps_of

COMPILED = Path(__file__).parent / "compiled"
MANIFEST, TENSORS = "manifest.json", "constants.safetensors"
AUTO = "auto"
REMEDY = "compile them again"


class ConstantsManifest(BaseModel):
    """What a folder of constants says of itself.

    model, model_revision: whose they are, and its content hash or commit. corpus: what they were made from. prompts:
    SHA-256 of the token ids of every calibration prompt. report: losses and whatever else was measured on the way.
    seconds: that it took. made_on: processor, threads and versions. tensors_sha256, created: of the tensors file, and
    UTC in ISO 8601; set when saved.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    method: str
    model: str
    model_revision: str
    corpus: str
    prompts: tuple[str, ...]
    seed: int
    report: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    command: tuple[str, ...] = ()
    git_commit: str | None = None
    made_on: dict[str, Any] = Field(default_factory=dict)
    tensors_sha256: str = ""
    created: str = ""


@dataclass(frozen=True, eq=False)
class Constants:
    """tensors: by name, on the CPU, in the types that they are stored in."""

    manifest: ConstantsManifest
    tensors: Mapping[str, Tensor]


def save_constants(constants: Constants, folder: Path) -> Constants:
    """Write constants to a folder and return them as `load_constants` will read them."""
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({name: x.contiguous().cpu() for name, x in constants.tensors.items()})
    digest, now = hashlib.sha256(data).hexdigest(), datetime.now(UTC).isoformat(timespec="seconds")
    manifest = constants.manifest.model_copy(update={"tensors_sha256": digest, "created": now})
    (folder / TENSORS).write_bytes(data)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return replace(constants, manifest=manifest)


def load_constants(folder: Path) -> Constants:
    """Read and check the constants of a folder; cached until a file changes. Raises PolicyError, one line."""
    advice = "make them with `harness compile`"
    return _load(folder.resolve(), stamps_of(folder, (MANIFEST, TENSORS), what="constants", advice=advice))


@lru_cache(maxsize=16)
def _load(folder: Path, stamps: tuple[int, ...]) -> Constants:
    path = folder / MANIFEST
    manifest = parsed(ConstantsManifest, read_plain(path, remedy=REMEDY), path, remedy=REMEDY)
    return Constants(manifest, read_tensors(folder / TENSORS, manifest.tensors_sha256, remedy=REMEDY))


def read_tensors(path: Path, stated: str, *, remedy: str) -> dict[str, Tensor]:
    """Read a safetensors file whose SHA-256 a manifest states. Raises PolicyError for another or a damaged one."""
    data, where = read_plain(path, remedy=remedy), quoted(str(path))
    digest = hashlib.sha256(data).hexdigest()
    if digest != stated:
        what = f"its sha256 is {digest[:12]}..., the manifest says {stated[:12] or 'none'}..."
        raise PolicyError(f"{where} is damaged or not this manifest's: {what}; {remedy}")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise PolicyError(f"{where} is damaged: {quoted(str(error))}; {remedy}") from None
    if flawed := [name for name, x in tensors.items() if x.is_floating_point() and not bool(x.isfinite().all())]:
        raise PolicyError(f"{where} is damaged: {quoted(flawed[0])} is not finite; {remedy}")
    return tensors


@dataclass(frozen=True)
class CompiledPolicy(KVPolicy):
    """A method that reads constants of the model.

    compiled: folder of constants, name of packaged ones, or `auto` for those of the model at hand. Until `for_model`
    has found these, such a policy has none and knows nothing of the model.
    """

    METHOD: ClassVar[str]
    """Its registered name."""

    compiled: str = AUTO

    def constants(self) -> Mapping[str, Tensor]:
        """Return the constants by name; none before `for_model` has found the model's own."""
        found = self._loaded()
        return {} if found is None else found.tensors

    def for_model(self, revision: str) -> Self:
        """Return this policy with the constants of a model's revision.

        Raises PolicyError where there are none, or the ones that were named are those of another model or method.
        """
        advice = f"make some with `harness compile {self.METHOD}` and name them by {self.METHOD}.compiled=FOLDER"
        if self.compiled == AUTO:
            own = sorted((COMPILED / self.METHOD).glob("*"))
            found = [path.name for path in own if load_constants(path).manifest.model_revision == revision]
            if not found:
                raise PolicyError(f"{self.METHOD} has no constants of this model, {revision[:12]}; {advice}")
            return replace(self, compiled=found[0])
        loaded = self._loaded()
        if loaded is not None and loaded.manifest.method != self.METHOD:
            raise PolicyError(f"constants {quoted(self.compiled)} are of {quoted(loaded.manifest.method)}; {advice}")
        if loaded is not None and loaded.manifest.model_revision != revision:
            of = f"{loaded.manifest.model} ({loaded.manifest.model_revision[:12]})"
            raise PolicyError(f"constants {quoted(self.compiled)} are of {of}, this model is {revision[:12]}; {advice}")
        return self

    @property
    def method_bytes(self) -> int:
        """Bytes of its constants, in the types that they are stored in."""
        found = self._loaded()
        return 0 if found is None else sum(x.nbytes for x in found.tensors.values())

    def provenance(self) -> dict[str, Any]:
        found = self._loaded()
        return {} if found is None else {"constants_sha256": found.manifest.tensors_sha256}

    def fitted_on(self) -> frozenset[str]:
        found = self._loaded()
        return frozenset() if found is None else frozenset(found.manifest.prompts)

    @property
    def lacks(self) -> str:
        return "" if self._loaded() else "no constants of this model: it knows nothing of it"

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        return (self.lacks,) if self.lacks else ()

    def _loaded(self) -> Constants | None:
        return None if self.compiled == AUTO else load_constants(self._folder)

    @property
    def _folder(self) -> Path:
        packaged = COMPILED / self.METHOD / self.compiled
        return packaged if packaged.is_dir() else place_of(self.compiled)
