"""`harness calibrate-relay`: what one model needs to answer from another's cache (`harness.relay.between`)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from harness.compiler.asked import RelaySpec
from harness.compiler.corpora import load_corpus
from harness.compiler.stage import calibration_prompts
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.models.load import load_model
from harness.plan.receivers import MANIFEST, MOMENTS, MapManifest, check_pair
from harness.records.atomic_files import check_place, write_bytes
from harness.relay.between import Moments


def calibrate_relay(spec: RelaySpec, folder: Path, command: Sequence[str]) -> MapManifest:
    """Read the calibration prompts with both models, and write the moments of their caches into `folder`.

    Raises HarnessError for models between which no cache can go, or a folder that cannot be written.
    """
    start = time.perf_counter()
    check_place(folder)
    sender = load_model(spec.model, dtype=spec.dtype, device=spec.device)
    receiver = load_model(spec.receiver, dtype=spec.dtype, device=spec.device)
    check_pair(sender, receiver)
    if sender.spec.revision == receiver.spec.revision:
        raise HarnessError(
            f"{receiver.spec.name} is the sender too, so nothing is to be calibrated; give another model"
        )
    corpora = [load_corpus(name) for name in spec.corpora]
    prompts = calibration_prompts(corpora, sender, spec)
    tensors, tokens = dict[str, Tensor](), 0
    for side, loaded in (("sender", sender), ("receiver", receiver)):
        model, moments = AttachedModel(loaded.model), Moments()
        for prompt in tqdm(prompts, desc=side, unit="prompt", mininterval=5):
            moments.see(model, prompt.ids)
        tensors |= moments.tensors(side)
        tokens = moments.tokens
    data = save({name: x.contiguous() for name, x in tensors.items()})
    manifest = MapManifest(
        sender=sender.spec,
        receiver=receiver.spec,
        corpora={corpus.name: corpus.sha256 for corpus in corpora},
        prompts=len(prompts),
        tokens=tokens,
        seconds=time.perf_counter() - start,
        sha256=hashlib.sha256(data).hexdigest(),
        command=tuple(command),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / MOMENTS, data)
    write_bytes(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest
