"""The process that answers from caches it is sent.

    python -m harness.relay.receiver MODEL --dtype float32 --device cpu --threads 2 --reply 3

reads requests (`harness.relay.wire.Ask`, and the message behind each) from standard input and writes a line for each to
the descriptor --reply. It holds a model and nothing of the prompts: a context reaches it as a message, or, to know what
that would take, as text. It ends with its parent, and when standard input ends.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from harness.engine.compress import Compressed, weighed
from harness.engine.decode import Decoding
from harness.engine.engine import CellRun, Engine
from harness.engine.prefill import prefill
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Outcome
from harness.errors import HarnessError, line_of
from harness.models.load import LoadedModel, load_model
from harness.models.prompt import TaskTokenizer
from harness.plan.methods import policy_of
from harness.relay.between import Between
from harness.relay.message import read_message, read_tensors
from harness.relay.wire import Ask, Reply
from harness.speed.memory_limit import die_with_parent
from methods.base import KVPolicy, Needs
from methods.fullkv import FullKV
from methods.registry import load_methods

WARM = 16
"""Tokens that go through the model before the first request, so that the first seconds are those of any request."""


class Answering:
    """A model, and what it says to requests."""

    def __init__(self, loaded: LoadedModel, between: Path | None = None) -> None:
        """between: file of what was calibrated from the sender's model to this one; None for the same model."""
        self.loaded, self.model = loaded, AttachedModel(loaded.model)
        self.engine = Engine(self.model, query="agnostic")
        self.decode = TaskTokenizer(loaded.tokenizer).decode
        self.between = None if between is None else Between.load(between, self.model.device)
        self.constants: dict[str, Tensor] = {}
        load_methods()  # classes that messages name
        self.read_text([token % self.model.vocab for token in range(WARM)])

    def reply(self, ask: Ask, constants: bytes, data: bytes) -> Reply:
        """What comes of a request; whatever it trips over is said in one line."""
        try:
            self.constants |= read_tensors(constants, self.model.device) if constants else {}
            return Reply(text_s=self.read_text(ask.text)) if ask.text else self.answer(ask, data)
        except Exception as error:  # methods and models are foreign code
            failed = Outcome()
            failed.fail(error)
            return Reply(outcomes=(failed,) * len(ask.questions), error=failed.error)

    def read_text(self, ids: Sequence[int]) -> float:
        """Seconds of a prompt through the model, its first token chosen."""
        start = time.perf_counter()
        with torch.inference_mode():
            int(prefill(self.model, ids, Needs()).logits.argmax())  # a GPU is waited for
        return time.perf_counter() - start

    def answer(self, ask: Ask, data: bytes) -> Reply:
        """Answers to every question from one message."""
        start = time.perf_counter()
        with torch.inference_mode():
            left = self._left(ask, data)
            Decoding.of(self.model, [left], room=len(ask.questions[0].ids))
            self._wait()
        receive_s, outcomes, seconds = time.perf_counter() - start, [], []
        for question in ask.questions:
            seconds.append(self._asked_s(left, question.ids))
            run = CellRun(Cell(left.policy, None), Outcome(), left)
            self.engine.answer([run], question.prompt(self.decode), tail=list(question.ids))
            outcomes.append(run.outcome)
        found = tuple(outcomes)
        return Reply(outcomes=found, kv_bytes=left.kv_bytes, receive_s=receive_s, ask_s=tuple(seconds))

    def _left(self, ask: Ask, data: bytes) -> Compressed:
        where = self.model.device, self.model.rotate
        came = read_message(data, *where, constants=self.constants, zeroed=ask.zeroed)
        if len(came.kvs) != self.model.layers:
            raise HarnessError(f"a message of {len(came.kvs)} layers, this model has {self.model.layers}")
        kvs = came.kvs if self.between is None else self.between.taken(came.kvs)
        policy: KVPolicy = FullKV() if ask.method is None else policy_of(ask.method, self.loaded.spec.revision)
        states = {came.tokens: came.states}
        return Compressed(
            policy,
            came.budget,
            compressible=self.model.compressible,
            logits=torch.empty(1, 0, device=self.model.device),  # of the context, which nothing is chosen by
            tokens=came.tokens,
            states=states,
            **weighed(kvs, self.model.compressible, came.tokens, came.states),
        )

    def _asked_s(self, left: Compressed, ids: Sequence[int]) -> float:
        """Seconds of a question through the model to the first token, as fast as it goes; 0 without a question."""
        if not ids:
            return 0.0
        with torch.inference_mode():
            decoding = Decoding.of(self.model, [left], room=len(ids))
            self._wait()
            start = time.perf_counter()
            int(decoding.feed(ids, alone=True).argmax())
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def _send(reply: int, message: Reply) -> None:
    with open(reply, "wb", closefd=False) as stream:
        stream.write(message.model_dump_json().encode() + b"\n")


def serve(requests: IO[bytes], reply: int, options: argparse.Namespace) -> int:
    """Answer requests until they end; return the exit code."""
    try:
        loaded = load_model(
            options.model, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
        )
        answering = Answering(loaded, options.map)
    except Exception as error:  # whatever a model's files bring is told to the sender, in a line
        _send(reply, Reply(error=line_of(" ".join(str(error).split()))))
        return 2
    _send(reply, Reply(revision=loaded.spec.revision))
    for line in requests:
        ask = Ask.model_validate_json(line)
        _send(reply, answering.reply(ask, requests.read(ask.constants), requests.read(ask.size)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.relay.receiver")
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--map", type=Path, help="moments of the sender's model and of this one")
    parser.add_argument("--reply", type=int, required=True, help="descriptor to answer on")
    options = parser.parse_args(arguments)
    die_with_parent(os.getppid())
    torch.set_num_threads(options.threads)
    return serve(sys.stdin.buffer, options.reply, options)


if __name__ == "__main__":
    sys.exit(main())
