"""What a model's name stands for, and what of it can be refused before torch is imported. Touches no network."""

import json
import re
from pathlib import Path
from typing import Literal, NamedTuple

from harness.errors import HarnessError, did_you_mean

PACKAGED = ("smollm2-135m",)
KNOWN = (*PACKAGED, "tiny")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
ADAPTER = "adapter_config.json"
AUTO_MAP = "auto-map"  # the device that stands for `device_map="auto"`
DTYPE_NAMES = ("float32", "bfloat16", "float16")
DEVICE = re.compile(rf"auto|{AUTO_MAP}|(cpu|cuda|mps)(:\d+)?")
GGUF_MAGIC = b"GGUF"


class ModelSource(NamedTuple):
    """Where a model comes from. path: folder or GGUF file of a local one."""

    name: str
    kind: Literal["packaged", "tiny", "folder", "gguf", "hub"]
    path: Path | None = None

    @property
    def adapted(self) -> str | None:
        """The model that a folder of a peft adapter was made for, None for anything else. Raises HarnessError."""
        if self.kind != "folder" or self.path is None or not (self.path / ADAPTER).is_file():
            return None
        try:
            base = json.loads((self.path / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError):
            base = None
        if not isinstance(base, str) or (self.path / "config.json").is_file():
            why = "and a config.json of a whole model" if isinstance(base, str) else "that names no base model"
            raise HarnessError(f"{self.name!r} has an {ADAPTER} {why}; keep the one or the other")
        return base


def resolve_model(name: str) -> ModelSource:
    """What `name` stands for; touches no network. Raises HarnessError, with the nearest known name, for nothing."""
    if name in KNOWN:
        return ModelSource(name, "tiny" if name == "tiny" else "packaged")
    path = Path(name).expanduser()
    if name and path.is_dir():
        return ModelSource(name, "folder", path)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, "gguf", path)
    if path.is_file():
        raise HarnessError(f"model {name!r} is a file but not a .gguf; give the folder that holds config and weights")
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return ModelSource(name, "hub")
    hint = did_you_mean(name, KNOWN) or ";"
    raise HarnessError(f"unknown model {name!r}{hint} give {', '.join(KNOWN)}, a folder, a .gguf file or org/name")


def check_model(name: str) -> None:
    """Refuse a model that cannot be read, as far as a look at its files tells; what they hold is found on loading.

    Raises HarnessError: an unknown name, a folder without a config, a .gguf file without its header, a model of the
    hub that is not in the cache while HF_HUB_OFFLINE is set.
    """
    source, why = resolve_model(name), None
    if source.path is not None and source.adapted is None:
        folder = source.kind == "folder"
        why = _trouble_of_config(source.path / "config.json") if folder else _trouble_of_gguf(source.path)
    elif source.kind == "hub":
        why = _trouble_of_hub(name)
    if why is not None:
        advice = "check the name and the network" if source.kind == "hub" else "check the files and the options"
        raise HarnessError(f"model {name!r} cannot be loaded: {why}; {advice}")


def check_dtype(dtype: str) -> None:
    """Raise HarnessError for a name that is no dtype of weights."""
    if dtype not in ("auto", *DTYPE_NAMES):
        raise HarnessError(f"unknown dtype {dtype!r}; give auto, {', '.join(DTYPE_NAMES)}")


def check_device(device: str) -> None:
    """Raise HarnessError for a name that is no device; whether it is here, torch alone knows."""
    if not DEVICE.fullmatch(device):
        raise HarnessError(f"unknown device {device!r}; give auto, {AUTO_MAP}, cpu, cuda, cuda:1 or mps")


def _trouble_of_config(path: Path) -> str | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {path.name} in {path.parent}"
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be read ({' '.join(str(error).split())})"
    return None if isinstance(config, dict) else f"{path.name} is no JSON object"


def _trouble_of_gguf(path: Path) -> str | None:
    try:
        with path.open("rb") as stream:
            start = stream.read(len(GGUF_MAGIC))
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if start == GGUF_MAGIC else f"{path.name} does not begin with {GGUF_MAGIC.decode()}, it is no GGUF file"


def _trouble_of_hub(name: str) -> str | None:
    """What is wrong with a model of the hub when nothing may be downloaded. The hub's client is light to import."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    folder = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if HF_HUB_OFFLINE and not folder.is_dir():
        return f"it is not in the hub's cache ({HF_HUB_CACHE}) and HF_HUB_OFFLINE is set"
    return None
