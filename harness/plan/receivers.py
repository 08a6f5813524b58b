"""Another model that answers from the caches of a run's: whether it can, and what was calibrated between the two."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import HarnessError, shown
from harness.models.load import LoadedModel, describe_model
from harness.records import ranges
from harness.records.plain_files import of_json, read_plain
from harness.records.spec import Frozen, ModelSpec, Sweep

MANIFEST, MOMENTS = "manifest.json", "constants.safetensors"
Shape = tuple[int, int, int]  # layers, KV heads, channels of a head


class MapManifest(Frozen):
    """What `harness calibrate-relay` made: from which model to which, on what. sha256: of its tensors' file."""

    sender: ModelSpec
    receiver: ModelSpec
    corpora: ranges.Versions
    prompts: ranges.Count
    tokens: ranges.Count
    seconds: ranges.Seconds
    sha256: ranges.Sha256
    command: ranges.Texts = ()


class PlannedReceiver(NamedTuple):
    """The model that answers. typed: its name as asked for. folder: of the calibration between it and the run's."""

    typed: str
    spec: ModelSpec
    folder: Path
    sha256: str


def plan_receiver(sweep: Sweep, loaded: LoadedModel) -> PlannedReceiver | None:
    """The receiver of a sweep whose model is `loaded`; None where that answers itself.

    Raises HarnessError for one whose cache has another shape, that reads text as other tokens, or to which nothing was
    calibrated.
    """
    if sweep.receiver is None:
        return None
    own = loaded.spec
    device = "cuda" if own.device.startswith("cuda") else "cpu"
    other = describe_model(sweep.receiver, dtype=own.dtype, device=device, trust_remote_code=own.trust_remote_code)
    if other.spec.revision == own.revision:
        return None
    check_pair(loaded, other)
    advice = f"run `harness calibrate-relay --model {own.name} --receiver {other.spec.name} --out DIR`"
    if sweep.receiver_map is None:
        nothing = f"nothing is calibrated between {own.name} and the receiver {other.spec.name}"
        raise HarnessError(f"{nothing}; {advice}, then add --receiver-map DIR")
    folder = Path(sweep.receiver_map)
    told = of_json(MapManifest, read_plain(folder / MANIFEST, remedy=advice), where=MANIFEST, remedy=advice)
    found = hashlib.sha256(read_plain(folder / MOMENTS, remedy=advice)).hexdigest()
    if found != told.sha256:
        raise HarnessError(f"{shown(str(folder / MOMENTS))} is not what its {MANIFEST} says; {advice}")
    if (told.sender.revision, told.receiver.revision) != (own.revision, other.spec.revision):
        pair = (
            f"{told.sender.name} ({told.sender.revision[:12]}) to {told.receiver.name} ({told.receiver.revision[:12]})"
        )
        raise HarnessError(f"{shown(str(folder))} is from {pair}; {advice}")
    return PlannedReceiver(sweep.receiver, other.spec, folder, found)


def check_pair(sender: LoadedModel, receiver: LoadedModel) -> None:
    """Raises HarnessError where no cache of the one can be the other's."""
    one, other = shape_of(sender), shape_of(receiver)
    if one != other:
        told = ["{} layers of {} KV heads of {} channels".format(*shape) for shape in (one, other)]
        raise HarnessError(
            f"the cache of {sender.spec.name} has {told[0]}, the receiver {receiver.spec.name} has {told[1]}; "
            "give a receiver of one shape"
        )
    if sender.tokenizer.get_vocab() != receiver.tokenizer.get_vocab():
        raise HarnessError(
            f"the receiver {receiver.spec.name} reads text as other tokens than {sender.spec.name}; give one with its "
            "tokenizer"
        )


def shape_of(loaded: LoadedModel) -> Shape:
    """Of a model's cache, as its config tells it."""
    config: Any = loaded.model.config.get_text_config(decoder=True)
    queries = int(config.num_attention_heads)
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return int(config.num_hidden_layers), int(heads), int(width)
