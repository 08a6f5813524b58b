"""What a look at a model's files tells without torch: configs that are none, weights that are cut off or only a part.

What is found here is found in milliseconds; what only the weights themselves show is found on loading.
"""

import os
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, shown
from harness.records.plain_files import parse_json, read_plain

REMEDY = "check the files and the options"
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
ADAPTER = "adapter_config.json"
WHOLE = "model.safetensors"
ADAPTED = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")
"""Endings of the files that decide what a model is, weights or not."""
HEADER_BYTES = 100_000_000
"""The most that the format allows."""
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 512),
    **dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads", "n_head", "num_experts", "num_local_experts"), 2**16
    ),
    **dict.fromkeys(("hidden_size", "head_dim", "n_embd", "d_model"), 2**16),
    **dict.fromkeys(("intermediate_size", "n_inner"), 2**18),
    **{"vocab_size": 2**21, "max_position_embeddings": 2**40, "n_positions": 2**40, "n_ctx": 2**40},
}
"""Sizes in a config, and the most that any model of this decade could mean by them."""


def check_folder(folder: Path) -> None:
    """Refuse a folder whose model or adapter cannot be whole. Raises HarnessError."""
    for path in decisive_files(folder):
        if not path.is_file():
            read_plain(path, remedy=REMEDY)  # which says what it is
    name = ADAPTER if (folder / ADAPTER).is_file() else "config.json"
    if not (folder / name).is_file():
        raise HarnessError(f"no {name} in {shown(str(folder))}; {REMEDY}")
    for name in JSON_FILES:
        if (folder / name).is_file():
            check_sizes(read_object(folder / name), where=name)
    if {path.name for path in decisive_files(folder)} <= {"config.json", "generation_config.json"}:
        bare = f"{shown(str(folder))} has a config.json, no weights and no tokenizer"
        raise HarnessError(f"{bare}; add them, or write shape: before it for speed and memory with random weights")
    for path in _shards(folder):
        check_safetensors(path)


def check_config(path: Path) -> None:
    """Refuse a config that tells no model's shape. Raises HarnessError."""
    config = read_object(path)
    if not isinstance(config.get("model_type"), str):
        raise HarnessError(f"{path.name} has no model_type; give the config.json of a model of transformers")
    check_sizes(config, where=path.name)


def decisive_files(folder: Path) -> list[Path]:
    """Everything in a folder that decides what its model is, by its ending."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
    except OSError as error:
        raise HarnessError(f"cannot list {shown(str(folder))}: {error.strerror}; {REMEDY}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file of a model is. Raises HarnessError."""
    found = parse_json(read_plain(path, remedy=REMEDY), where=path.name, remedy=REMEDY)
    if not isinstance(found, dict):
        raise HarnessError(f"{path.name} is no JSON object but {shown(found)}; {REMEDY}")
    return found


def check_sizes(config: dict[str, Any], *, where: str) -> None:
    """Refuse sizes that no model has and ends of text that are no tokens, also in its part for text."""
    for part in (config, config.get("text_config")):
        for name, value in part.items() if isinstance(part, dict) else ():
            least, most = (0, 2**31) if name == "eos_token_id" else (1, LARGEST.get(name, 0))
            for one in value if isinstance(value, list) else [value]:
                if most and one is not None and not (type(one) is int and least <= one <= most):
                    raise HarnessError(f"{where} says {name} {shown(one)}, no number from {least} to {most}; {REMEDY}")


def check_safetensors(path: Path) -> None:
    """Refuse a file of weights that is cut off or none. Raises HarnessError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 2 <= length <= min(HEADER_BYTES, size - 8) else b""
    except OSError as error:
        raise HarnessError(f"cannot read {path.name}: {error.strerror}; {REMEDY}") from None
    if not text:
        raise HarnessError(
            f"{path.name} has {size:,} bytes and no header of safetensors: cut off, or another kind of file"
        )
    header = parse_json(text, where=f"the header of {path.name}", remedy=REMEDY)
    try:
        told = {name: part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"}
        wanted = 8 + length + max(told.values(), default=0)
    except (AttributeError, TypeError, KeyError, IndexError):
        raise HarnessError(f"the header of {path.name} is damaged; {REMEDY}") from None
    if size != wanted:
        raise HarnessError(f"{path.name} has {size:,} bytes, its header tells of {wanted:,}; fetch it again")


def _shards(folder: Path) -> list[Path]:
    """The files of weights that a folder's model is made of, by the rules of transformers. Raises HarnessError."""
    if (folder / ADAPTER).is_file() or (folder / WHOLE).is_file():
        return [path for path in (folder / ADAPTED, folder / WHOLE) if path.is_file()]
    if not (folder / INDEX).is_file():
        return []
    named = read_object(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise HarnessError(f"{INDEX} has no weight_map of names to files; {REMEDY}")
    paths = [folder / name for name in sorted(set(named.values()))]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise HarnessError(
            f"{INDEX} names {shown(absent[0])}, which is not there, {len(absent)} files in all; fetch it"
        )
    return paths
