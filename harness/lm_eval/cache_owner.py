"""lm-eval's response cache (`--use_cache`) finds answers by their request alone: it is kept to one way of answering."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from harness.errors import HarnessError, shown
from harness.records.spec import MethodSpec, ModelSpec

IDENTITY = "kvpolicy"  # a key of the cache, whose others are hashes


def identity(model: ModelSpec, method: MethodSpec, **others: Any) -> dict[str, Any]:
    """All that decides an answer beside its request, whatever names and paths it was asked for by. JSON values."""
    return {
        "model": model.revision,
        "dtype": model.dtype,
        "loaded_as": list(model.loaded_as),
        "method": method.name,
        "params": method.model_dump(mode="json", exclude={"label"}),
        **others,
    }


def claim(held: MutableMapping[str, Any], own: Mapping[str, Any]) -> None:
    """Write into an empty cache whose answers it holds. Raises HarnessError for one that holds another's."""
    whose = held.get(IDENTITY) if len(held) else own
    if whose != own:
        there = whose if isinstance(whose, dict) else {"model": "another model"}
        name = next((name for name in own if there.get(name) != own[name]), "model")
        told = f"was made with {name} {shown(there.get(name))}, this is {shown(own[name])}"
        raise HarnessError(f"the file of --use_cache {told}: name another file")
    held[IDENTITY] = own
