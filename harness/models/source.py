"""What a model's name stands for, and what of it can be refused before torch is imported."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from harness.errors import HarnessError, did_you_mean, line_of, shown
from harness.models.files import ADAPTER, check_config, check_folder, read_object
from harness.models.gguf_header import check_gguf
from harness.records.spec import SHAPE

PACKAGED = ("smollm2-135m",)
KNOWN = (*PACKAGED, "tiny")
SHAPES_DIR = Path(__file__).parent / "shapes"
SHAPES = {
    "llama-3-8b": "meta-llama/Llama-3.1-8B",  # Llama 3 8B with the longer context
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "gpt-oss-20b": "openai/gpt-oss-20b",  # in the dtype asked for: its own four bits are left out
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
}
"""Models whose config.json comes with the harness, in `SHAPES_DIR`: what decides their shape, as the hub has it."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
AUTO_MAP = "auto-map"  # the device that stands for `device_map="auto"`
DTYPE_NAMES = ("float32", "bfloat16", "float16")
DEVICE = re.compile(rf"auto|{AUTO_MAP}|(cpu|cuda|mps)(:\d+)?")
HUB_S = 1.5
"""Seconds that the hub has to say that it knows a model; one that takes longer is waited for on loading."""


class ModelSource(NamedTuple):
    """Where a model comes from. path: folder or GGUF file of a local one, config of one with random weights."""

    name: str
    kind: Literal["packaged", "tiny", "folder", "gguf", "hub", "shape"]
    path: Path | None = None

    @property
    def title(self) -> str:
        """What records call the model, however its path was typed: the last name of it, or the hub's in its cache.

        Two models of one title are told apart by their revisions.
        """
        if self.path is None:
            return self.name
        real = self.path.resolve()
        if self.kind == "shape":
            return line_of(SHAPE + (real.parent.name if real.name == "config.json" else real.stem))
        if self.kind == "gguf" and real.suffix != ".gguf":  # a link into a store whose files are named by their hash
            real = self.path.absolute()
        top = real.parent.parent.name
        if real.parent.name == "snapshots" and top.startswith("models--"):
            return line_of(top.removeprefix("models--").replace("--", "/"))
        return line_of(f"./{real.name}" if real.name in KNOWN or real.name.startswith(SHAPE) else real.name)

    @property
    def base(self) -> "ModelSource | None":
        """The model that a folder of a peft adapter was made for, None for anything else. Raises HarnessError."""
        if self.kind != "folder" or self.path is None or not (self.path / ADAPTER).is_file():
            return None
        name = read_object(self.path / ADAPTER).get("base_model_name_or_path")
        if not isinstance(name, str) or (self.path / "config.json").is_file():
            why = "and a config.json of a whole model" if isinstance(name, str) else "that names no base model"
            raise HarnessError(f"{shown(self.name)} has an {ADAPTER} {why}; keep the one or the other")
        base = resolve_model(name)
        if base.kind == "folder" and base.path is not None and (base.path / ADAPTER).is_file():
            raise HarnessError(f"{shown(self.name)} is an adapter of {shown(name)}, another adapter; merge that first")
        return base


def resolve_model(name: str) -> ModelSource:
    """What `name` stands for; touches no network. Raises HarnessError, with the nearest known name, for nothing."""
    if name in KNOWN:
        return ModelSource(name, "tiny" if name == "tiny" else "packaged")
    if name.startswith(SHAPE):
        return ModelSource(name, "shape", _config_of(name.removeprefix(SHAPE)))
    path, there = _at(name)
    if there == "folder":
        return ModelSource(name, "folder", path)
    if there == "file" and path.suffix == ".gguf":
        return ModelSource(name, "gguf", path)
    if there:
        what = "a file but not a .gguf" if there == "file" else "neither a file nor a folder"
        raise HarnessError(f"model {shown(name)} is {what}; give the folder that holds config and weights")
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return ModelSource(name, "hub")
    if "/" in name:
        raise HarnessError(f"unknown model {shown(name)}: there is no such folder or file; {_known()}")
    near = did_you_mean(name, (*KNOWN, *map(f"{SHAPE}{{}}".format, SHAPES)))
    raise HarnessError(f"unknown model {shown(name)}{near or ';'} {_known()}")


def _config_of(shape: str) -> Path:
    """The config of a known shape, or of a folder or file. Raises HarnessError, with the nearest known shape."""
    if shape in SHAPES:
        return SHAPES_DIR / f"{shape}.json"
    path, there = _at(shape)
    if there not in ("folder", "file"):
        known = f"give shape: before {', '.join(SHAPES)}, a config.json or a folder with one"
        raise HarnessError(f"unknown shape {shown(shape)}{did_you_mean(shape, SHAPES) or ';'} {known}")
    return path / "config.json" if there == "folder" else path


def _at(text: str) -> tuple[Path, Literal["folder", "file", "other", ""]]:
    """A path as typed and what is there, nothing for no text. Raises HarnessError for one that the system refuses."""
    try:
        path = Path(text).expanduser()
        if not (text and path.exists()):
            return path, ""
        return path, "folder" if path.is_dir() else "file" if path.is_file() else "other"
    except (OSError, ValueError, RuntimeError) as error:  # an overlong name, a NUL, ~ of nobody
        why = error.strerror if isinstance(error, OSError) else error
        raise HarnessError(f"unknown model {shown(text)}: {why}; {_known()}") from None


def _known() -> str:
    return f"give {', '.join(KNOWN)}, a folder, a .gguf file or org/name"


def check_model(name: str) -> ModelSource:
    """What `name` stands for, if it can be read as far as a look at its files tells.

    Raises HarnessError: an unknown name, a folder or file that is damaged, lacks a part or is one part of several, a
    model of the hub that is not in its cache where the hub does not know it or cannot be asked.
    """
    source = resolve_model(name)
    try:
        _look(source)
        if source.base is not None:
            _look(source.base)
    except HarnessError as error:
        raise HarnessError(f"model {shown(name)} cannot be loaded: {error}") from None
    return source


def check_scored(name: str) -> ModelSource:
    """What `name` stands for, as of `check_model`. Raises HarnessError for random weights too: they have no score."""
    if name.startswith(SHAPE):
        what = "has random weights, so no score; use bench, serve-bench or boundary, or give trained weights"
        raise HarnessError(f"model {shown(name)} {what}")
    return check_model(name)


def _look(source: ModelSource) -> None:
    if source.kind == "hub":
        _ask_hub(source.name)
    elif source.kind == "shape" and source.path is not None:
        check_config(source.path)
    elif source.path is not None:
        (check_folder if source.kind == "folder" else check_gguf)(source.path)


def check_dtype(dtype: str) -> None:
    """Raise HarnessError for a name that is no dtype of weights."""
    if dtype not in ("auto", *DTYPE_NAMES):
        raise HarnessError(f"unknown dtype {dtype!r}; give auto, {', '.join(DTYPE_NAMES)}")


def check_device(device: str) -> None:
    """Raise HarnessError for a name that is no device; whether it is here, torch alone knows."""
    if not DEVICE.fullmatch(device):
        raise HarnessError(f"unknown device {device!r}; give auto, {AUTO_MAP}, cpu, cuda, cuda:1 or mps")


def _ask_hub(name: str) -> None:
    """Refuse a model that is not in the hub's cache and that the hub will not give. Its client is light to import."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir():
        return
    missing = f"there is no folder {shown(name)} here, and"
    if constants.HF_HUB_OFFLINE:
        where = f"it is not in the hub's cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set"
        raise HarnessError(f"{missing} {where}; check the name and the network")
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_S)
    except HfHubHTTPError as error:
        raise HarnessError(f"{missing} the hub does not give it: {line_of(str(error))[:200]}; check the name") from None
    except Exception as error:  # of whichever HTTP library the client uses
        if "timeout" not in type(error).__name__.lower():
            raise HarnessError(
                f"{missing} the hub cannot be reached ({error}); check the name and the network"
            ) from None
