"""lm-eval's generation arguments and model arguments in this harness's terms. Refusals are one line."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from harness.errors import HarnessError, shown
from harness.models.load import LoadedModel
from harness.models.source import check_dtype, check_scored
from harness.plan.methods import plan_budget, plan_method, told_uncompiled
from harness.plan.sweep import PlannedCell, plan_cells
from harness.records.spec import MethodSpec

log = logging.getLogger("harness")

LOG = logging.getLogger(__name__)
HARMLESS = frozenset({"do_sample", "temperature", "top_p", "top_k", "typical_p", "min_p", "use_cache", "seed"})
"""Generation arguments that change nothing in a greedy generation."""
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}
"""Generation arguments that change nothing at these values."""


Tokens = Annotated[int, Field(ge=1, lt=2**31)]
Word = Annotated[str, Field(min_length=1, max_length=1000)]
Options = TypeVar("Options", bound=BaseModel)


class ModelArguments(BaseModel):
    """Model arguments whose type and range are known here; see `KVPolicyLM`."""

    model_config = ConfigDict(strict=True)

    pretrained: Word = "smollm2-135m"
    method: Word = "fullkv"
    budget: int | FiniteFloat | Word | None = None
    dtype: Word = "auto"
    device: Word | None = None
    max_length: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    truncation_side: Literal["left", "right", "middle"] = "left"
    add_bos_token: bool | None = None
    trust_remote_code: bool = False
    device_map: Word | None = None
    set: dict[str, Any] | None = None


class GenerationArguments(BaseModel):
    """Generation arguments that decide how a text goes on and where it ends; the others are refused or change nothing.

    The four names of the most tokens are lm-eval's.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    until: str | list[str] | None = None
    do_sample: bool | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0)] | None = None
    max_gen_toks: Tokens | None = None
    max_new_tokens: Tokens | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    min_new_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None


Generation = tuple[int, int, tuple[str, ...]]
"""The most and the least tokens of a generation, and where its text is cut."""


def taken(model: type[Options], given: object, what: str) -> Options:
    """Arguments as their model takes them. Raises HarnessError, naming `what`, for the first that it refuses."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = " ".join([what, *map(str, first["loc"][:1])])
        raise HarnessError(f"{field}: {first['msg']}, got {shown(first['input'])}; change or drop it") from None


def request_texts(request: Any, task: str, *, count: int) -> tuple[str, ...]:
    """The first `count` arguments of a request as text that can be written down. Raises HarnessError for others."""
    given = request.args
    for text in given[:count]:
        if not isinstance(text, str):
            raise HarnessError(f"lm-eval task {task}: a request is of text, got {shown(text)}; leave that task out")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            cut = text[max(0, error.start - 20) : error.end]
            raise HarnessError(f"lm-eval task {task}: half of a surrogate pair in {shown(cut)}; mend the row") from None
    return tuple(given[:count])


def generation(gen_kwargs: Mapping[str, Any], *, default: int, eos: str | None) -> Generation:
    """Return what lm-eval asks for. default: tokens where it names no number. eos: text of the tokenizer's end of text.

    Raises HarnessError for sampling, beams and everything else that a greedy decoder would pass over in silence.
    """
    given = taken(GenerationArguments, gen_kwargs, "generation argument").model_dump(exclude_none=True)
    asked = dict(normalize_gen_kwargs(given, default))
    if asked.get("do_sample"):
        seen = f"do_sample=True, temperature={asked.get('temperature', 0)}"
        raise HarnessError(f"{seen} asks for sampling; kvpolicy is greedy: --gen_kwargs do_sample=False,temperature=0")
    until = handle_stop_sequences(asked.pop("until"), eos)
    length, least = asked.pop("max_gen_toks"), asked.pop("min_new_tokens", 0)
    for name, value in asked.items():
        if name not in HARMLESS and not (name in NEUTRAL and value == NEUTRAL[name]):
            seen = f"{shown(name)[1:-1]}={shown(value)}"
            raise HarnessError(f"generation argument {seen} is not supported by kvpolicy; leave it out")
    return length, least, tuple(text for text in until if text)


def method_cells(
    loaded: LoadedModel, method: str, budget: object, params: Mapping[str, Any]
) -> tuple[MethodSpec, PlannedCell]:
    """Return the method with its changed parameters, and its cell. Raises HarnessError, with the nearest known name."""
    if "," in method:
        raise HarnessError(f"method {method!r} is more than one; run lm-eval once for each")
    planned = plan_method(method, params, revision=loaded.spec.revision)
    for line in told_uncompiled([planned], loaded.spec.name):
        LOG.warning(line)
    spec = planned.spec
    if spec.budgeted and budget is None:
        raise HarnessError(f"method {spec.label} needs a budget; add budget=512 (tokens) or budget=0.25 (a fraction)")
    return spec, plan_cells([planned], [] if budget is None else [plan_budget(budget)])[0]


def check_alone(batch_size: object) -> None:
    """Raises HarnessError for a batch above 1, and under a launcher of several processes.

    Rows of one decode batch share a prompt here, so prompts run one at a time; each process would answer everything.
    """
    if str(batch_size).strip() not in {"None", "1"}:
        raise HarnessError(f"batch_size {batch_size} is not supported: kvpolicy runs one prompt at a time; give 1")
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise HarnessError(f"kvpolicy runs in one process, WORLD_SIZE is {world}; start it without a launcher")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raises HarnessError for model arguments that can be refused before tasks and a model are read."""
    check_own_options(given)
    asked = taken(ModelArguments, given, "model argument")
    check_scored(asked.pretrained)
    check_dtype(asked.dtype)
    others = {"tokenizer", *ModelArguments.model_fields}
    params = {name: value for name, value in given.items() if name not in others}
    plan_method(asked.method, {**(asked.set or {}), **params})
    if asked.budget is not None:
        plan_budget(asked.budget)


def check_own_options(arguments: Mapping[str, Any]) -> None:
    """Raises HarnessError for what lm-eval passes beside the model arguments; inside them it would come twice."""
    for name in ("device", "batch_size", "max_batch_size"):
        if name in arguments:
            remedy = f"take it out and pass --{name} {arguments[name]}"
            raise HarnessError(f"{name}={arguments[name]} does not belong inside --model_args; {remedy}")


def device_here(device: str | None) -> str:
    """Return the device to load on. lm-eval asks for cuda:0 by default; where there is no GPU, it is the CPU."""
    if device is None:
        return "auto"
    if device.startswith("cuda") and not torch.cuda.is_available():
        log.warning("device %s is not here; running on the CPU", device)
        return "cpu"
    return device


def tokenizer_folder(loaded: LoadedModel) -> str:
    """Return a folder that transformers reads the tokenizer from: its own, or one made until this process ends."""
    own = str(loaded.tokenizer.name_or_path)
    if loaded.spec.name == own or (Path(own) / "tokenizer.json").is_file():
        return own
    made = tempfile.mkdtemp(prefix="tokenizer-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    loaded.tokenizer.save_pretrained(made)
    return made
