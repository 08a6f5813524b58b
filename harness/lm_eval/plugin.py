"""`kvpolicy`: this harness's engine as a model of lm-eval (0.4.13).

    harness lm-eval --model kvpolicy --model_args pretrained=smollm2-135m,method=snapkv,budget=128 --tasks ...
    lm_eval.simple_evaluate(model=KVPolicyLM(pretrained="smollm2-135m", method="snapkv", budget=128), tasks=[...])

What is compressed, by kind of request. In all of them the last token of what was compressed is fed again on the
compressed cache, at its true position, so that no generated or scored token behind it comes from the full cache.

generate_until         the prompt, once; then greedy decoding until end of text (the generation config's and the
                       tokenizer's), a stop string, or `max_gen_toks`.
loglikelihood          the context, once for all its continuations; each is scored on the compressed cache.
loglikelihood_rolling  the first half of the text, or of each window of `max_length` tokens. That half is scored with
                       the full cache, the second on what compression left; the results' `kv_notes` say so. (In
                       lm-eval's own windows the context is one token; nothing would be compressed.)

With `method=fullkv` all three give what lm-eval's `hf` gives: the same generations, log-probabilities up to rounding.
A prompt no longer than its budget stays uncompressed; the results' `kv_tasks` say how many did.

Differences from `hf`: one prompt at a time; greedy only, so that a repetition penalty and the like of the model's own
generation config are set aside (`kv_notes` name them); generation stops at every end of text or turn that the model's
files name; a date that a chat template writes is always the same day; no end of text is put behind a text.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from harness.errors import HarnessError, line_of, shown
from harness.lm_eval.answers import Answerer, ScoredPair
from harness.lm_eval.cache_owner import claim, identity
from harness.lm_eval.requests import (
    ModelArguments,
    check_alone,
    check_own_options,
    device_here,
    generation,
    method_cells,
    request_texts,
    taken,
    tokenizer_folder,
)
from harness.machine import set_threads
from harness.models.load import LoadedModel, load_model
from harness.models.prompt import dated, open_ended
from harness.models.source import check_scored

log = logging.getLogger("harness")

ROLLING = "loglikelihood_rolling: the first half of each text is scored with the full cache, the second after it"
MERGED = "loglikelihood: of a continuation that merges into its context's last token, what is behind it, as in hf"


class KVPolicyLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A model under one method at one budget.

    dtype, trust_remote_code and device_map are those of `harness.models.load_model`. batch_size is 1; max_batch_size is
    ignored, and tokenizer too: tasks that size their prompts by tokens (RULER) read it among the model arguments.

    Args:
        pretrained: a model as `harness run --model` takes it, or a loaded one.
        method: `name` or `name@preset`.
        budget: tokens per layer and KV head (128) or a kept fraction of each prompt (0.25); none for fullkv.
        device: what lm-eval passes from `--device`.
        max_length: tokens of prompt and answer together; the model's context when it is not given.
        truncation_side: which end of a longer prompt goes: left (as `hf`), right, or the middle (as LongBench).
        add_bos_token: whether texts get the tokenizer's special tokens; None is the tokenizer's own choice.
        set: parameters of the method, as `--set METHOD.PARAM=VALUE` of `harness run`.
        params: the same one by one, as they stand in `--model_args` (`recent=16`).

    Raises HarnessError, in one line, for bad input.
    """

    batch_size = 1
    max_gen_toks = 256
    """Tokens to generate where a task names no number, as in `hf`."""

    def __init__(
        self,
        pretrained: str | LoadedModel = "smollm2-135m",
        *,
        method: str = "fullkv",
        budget: int | float | str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        truncation_side: str = "left",
        add_bos_token: bool | None = None,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        device_map: str | None = None,
        set: dict[str, Any] | None = None,
        **params: Any,
    ) -> None:
        super().__init__()
        check_alone(batch_size)
        name = "loaded" if isinstance(pretrained, LoadedModel) else pretrained
        given = {"pretrained": name, "method": method, "budget": budget, "dtype": dtype, "device": device, "set": set}
        given |= {"max_length": max_length, "truncation_side": truncation_side, "add_bos_token": add_bos_token}
        given |= {"trust_remote_code": trust_remote_code, "device_map": device_map}
        taken(ModelArguments, given, "model argument")
        if not isinstance(pretrained, LoadedModel):
            remote: dict[str, Any] = {"trust_remote_code": trust_remote_code, "device_map": device_map}
            check_scored(pretrained)
            set_threads(None)
            pretrained = load_model(pretrained, dtype=dtype, device=device_here(device), **remote)
        self.loaded, self.tokenizer, self.add_bos_token = pretrained, pretrained.tokenizer, add_bos_token
        self.spec, planned = method_cells(pretrained, method, budget, {**(set or {}), **params})
        self.answers = Answerer(pretrained, planned, max_length=max_length, side=truncation_side)
        self.max_length, self._device = self.answers.max_length, self.answers.engine.model.device
        self.notes: dict[str, None] = {}

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        check_own_options(arg_dict)
        made: Self = super().create_from_arg_obj(arg_dict, additional_config)
        return made

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end of text, None without one; a generation also ends at those of the generation config."""
        eos = self.tokenizer.eos_token_id
        return None if eos is None else int(eos)

    @property
    def prefix_token_id(self) -> int:
        """What stands in for an empty context: BOS, or end of text where there is none.

        Raises HarnessError for a tokenizer that has neither.
        """
        found = self._prefix
        if found is None:
            raise HarnessError("the tokenizer names no beginning and no end of text: a text without a context has none")
        return found

    @property
    def _prefix(self) -> int | None:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path or self.loaded.spec.name).replace("/", "__")

    @cached_property
    def tokenizer_folder(self) -> str:
        """Where transformers can read the tokenizer from: the `metadata={"tokenizer": ...}` of RULER's tasks."""
        return tokenizer_folder(self.loaded)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuse a response cache of another policy; see `harness.lm_eval.cache_owner`."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            asked: dict[str, Any] = {"budget": self.answers.planned.budget, "add_bos_token": self.add_bos_token}
            asked |= {"max_length": self.max_length, "truncation_side": self.answers.side}
            claim(cache_hook.dbdict, identity(self.loaded.spec, self.spec, **asked))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids. Without a choice, special tokens are the tokenizer's, unless the text brings its BOS."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        prefix = self._prefix
        if add_special_tokens is None and prefix is not None and has_bos_prefix(string, self._token(prefix)):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        ids = open_ended(self.tokenizer(string, verbose=False, return_special_tokens_mask=True, **options))
        self.loaded.check_ids(ids, f"the text {shown(string, 60)}")
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages as `hf` does: a template that refuses a system message gets the other messages."""
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except HarnessError:
            log.warning("the chat template refuses the messages; once more without the system's")
            others = [message for message in chat_history if message["role"] != "system"]
            return self._rendered(others, add_generation_prompt)

    def _rendered(self, messages: list[dict[str, str]], head: bool) -> str:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": head, "continue_final_message": not head}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options, **dated(self.tokenizer)))
        except Exception as error:  # a template is a program
            why = line_of(str(error) or type(error).__name__)[:300]
            raise HarnessError(f"the chat template refuses the messages ({why}); leave the template out") from None

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the generated texts, cut at the first stop string."""
        eos = None if self.eot_token_id is None else self._token(self.eot_token_id)
        read = []
        for request in requests:  # all of them, before the first is answered
            (text,), gen_kwargs = request_texts(request, _task(request), count=1), request.args[1]
            read.append((request, text, generation(gen_kwargs, default=self.max_gen_toks, eos=eos)))
        texts: list[str] = []
        for request, text, asked in tqdm(read, desc="Running generate_until requests", disable=disable_tqdm):
            ids = self.tok_encode(text) or [self.prefix_token_id]
            texts.append(self.answers.generate(_task(request), text, ids, asked))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-probability, whether greedy decoding would give it) of every continuation, in order."""
        pairs = []
        for index, request in enumerate(requests):
            context, continuation = request_texts(request, _task(request), count=2)
            ids, following = self._encoded(context, continuation)
            pairs.append(ScoredPair(index, _task(request), context, tuple(ids), tuple(following)))
        return self._scores(pairs, [request.args for request in requests], disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [
            ScoredPair(index, "", (text or ("",))[0], tuple(ids), tuple(following))
            for index, (text, ids, following) in enumerate(requests)
        ]
        return self._scores(pairs, [text for text, _, _ in requests], disable_tqdm)

    def _scores(
        self, pairs: Sequence[ScoredPair], texts: Sequence[Any], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for group in self.answers.score(pairs):
                for pair, logprob, greedy in group:
                    found[pair.place] = logprob, greedy
                    if texts[pair.place] is not None:
                        self.cache_hook.add_partial("loglikelihood", texts[pair.place], found[pair.place])
                bar.update(len(group))
        return [found[index] for index in range(len(pairs))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of every text; the head of this module says what of it is compressed."""
        self.notes[ROLLING] = None
        totals = []
        read = [(request, *request_texts(request, _task(request), count=1)) for request in requests]
        for request, text in tqdm(read, desc="Running loglikelihood_rolling requests", disable=disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [
                self.answers.score_text(_task(request), text, context, predicted)
                for context, predicted in map(make_disjoint_window, windows)
            ]
            totals.append(sum(parts))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def get_model_info(self) -> dict[str, Any]:
        """Return what goes into `results["config"]`: the method, its budget, and what was measured. JSON values.

        kv_kept_tokens: per layer and KV head; kv_bytes: right after compression. Both are means over prompts.
        """
        model, answers = self.loaded.spec, self.answers
        return {
            "model_num_parameters": self.loaded.model.num_parameters(),
            "model_dtype": model.dtype,
            "model_revision": model.revision,
            "kv_model": model.model_dump(),
            "kv_method": self.spec.model_dump(),
            "kv_budget": answers.planned.budget,
            "kv_memory": answers.planned.cell.policy.memory,
            "kv_max_length": self.max_length,
            **answers.facts.means(),
            "kv_prefills": answers.engine.prefills,
            "kv_notes": [*self.loaded.set_aside, *self.notes],
            "kv_tasks": {task: facts.summary() for task, facts in answers.facts.tasks.items()},
            "kv_prompts": answers.facts.prompts,
        }

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode as `hf` does: a space at the border belongs to the continuation; an empty context is one token."""
        if context.strip():
            ids, whole = self.tok_encode(context.rstrip()), self.tok_encode(context + continuation)
            if whole[: len(ids)] != ids:
                self.notes[MERGED] = None
            return ids, whole[len(ids) :]
        ids = self.tok_encode(context + continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    def _token(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False))


def _task(request: Any) -> str:
    return str(request.task_name or "")
