"""Tasks of `relay` on the tiny model: another process answers as this one would, from the cache alone."""

import copy
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.engine.engine import Engine
from harness.engine.prefill import prefill
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from harness.errors import HarnessError
from harness.models.load import LoadedModel
from harness.models.prompt import TaskTokenizer
from harness.plan.methods import plan_method
from harness.plan.sweep import PlannedCell, plan_cells
from harness.records.record import Record
from harness.records.relayed import HEADER_BYTES, LAYER_BYTES
from harness.records.run_folder import load_run
from harness.records.spec import Sweep
from harness.relay import client, send
from harness.relay.client import Receiver
from harness.relay.send import Relay
from harness.relay.wire import Ask, Reply
from harness.run.sequential import run_sweep
from methods.artefact import Constants, ConstantsManifest, save_constants
from methods.base import KV, Budget, Needs, PromptView
from methods.fullkv import FullKV
from methods.recalkv import ReCalKV
from methods.registry import make_policy
from tests.tasks.test_multiquery import longbench

OTHER = {"run_id", "task", "prefill_s", "compress_s", "decode_s", "decode_rows", "observe_ms", "relayed"}
TEXT = "The town of Ash lies by the river Ilm, and its mill has stood for a hundred years. " * 3


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """The same questions by this process and by another one. Only read."""
    root = tmp_path_factory.mktemp("runs")
    data = longbench(root, (TEXT, "Which town?"), (TEXT, "Which river?"), (TEXT + "!", "a"), (TEXT + "!", "b"))
    run = {"methods": ("fullkv", "snapkv"), "budgets": ("64",), "data_dir": str(data), "observe": 1, "nll_tokens": 8}
    run |= {"model": "tiny", "dtype": "float32", "device": "cpu", "max_new_tokens": 3}
    found = {}
    for task in ("multiquery/longbench", "relay/qa/longbench"):
        folder = run_sweep(Sweep(**run, tasks=(task,)), root=root / task, command=())
        found[task.partition("/")[0]] = load_run(folder)[1]
    return found


def same(record: Record) -> dict[str, Any]:
    """What does not depend on who answered; likelihoods to three digits."""
    told = {key: value for key, value in record.model_dump().items() if key not in OTHER}
    return {key: round(value, 3) if key in ("nll", "nll_first") else value for key, value in told.items()}


def test_a_run_answers_as_one_process_does(answered: dict[str, list[Record]]) -> None:
    here, there = answered["multiquery"], answered["relay"]
    assert len(here) == 8 and all(record.status == "ok" and record.query == "agnostic" for record in here)
    assert [same(record) for record in there] == [same(record) for record in here]
    assert all(record.token_ids for record in there if record.method == "fullkv")
    assert all(record.relayed is None for record in here)


def test_a_record_says_what_was_sent_and_what_text_would_have_taken(answered: dict[str, list[Record]]) -> None:
    for record in answered["relay"]:
        sent = record.relayed
        assert sent is not None and sent.text_s is not None
        assert record.kv_bytes < sent.sent_bytes <= record.stored_bytes + HEADER_BYTES + 4 * LAYER_BYTES
        assert min(sent.send_s, sent.receive_s, sent.ask_s, sent.text_s) > 0
        assert len(TEXT) < sent.text_bytes < len(TEXT) + 400
    assert len({(r.meta["group"], r.method, r.relayed.send_s) for r in answered["relay"] if r.relayed}) == 4


def test_zeros_in_place_of_the_cache_give_another_answer(answered: dict[str, list[Record]]) -> None:
    """On the samples that are measured: the questions of the first context."""
    depends = [record.relayed.depends for record in answered["relay"] if record.relayed]
    assert depends == [True] * 4 + [None] * 4


# One receiver for the tests below; each asks the same prompt.


def prompt_of(loaded: LoadedModel) -> Prompt:
    ids = loaded.tokenizer(TEXT + "Which town?").input_ids
    limits = Limits(6, loaded.eos_ids, text=TaskTokenizer(loaded.tokenizer).decode)
    return Prompt(ids, len(ids) - 11, ids[:4], limits)


@pytest.fixture(scope="module")
def relay(tiny: LoadedModel) -> Relay:
    return Relay(Engine(AttachedModel(copy.deepcopy(tiny.model)), query="agnostic"), tiny, Spec())  # type: ignore[arg-type]


def run(relay: Relay, prompt: Prompt, *cells: PlannedCell, **options: bool) -> list[Any]:
    return relay.run_group([prompt], [cells], [TEXT], **options)[0]


ALL = ("fullkv", "snapkv", "adakv", "h2o@paper", "quant", "streamingllm@paper", "quest", "turboquant")
METHODS = tuple(plan_method(label) for label in ALL)


class Spec:
    """What `Relay` asks of a run's specification."""

    methods = tuple(spec for spec, _ in METHODS)


FULL = PlannedCell("fullkv", "full", Cell(FullKV(), None))
SNAP = PlannedCell("snapkv", "32", Cell(make_policy("snapkv"), Budget(32)))


def test_every_method_answers_as_in_one_process(relay: Relay, tiny: LoadedModel) -> None:
    first = prompt_of(tiny)
    prompts = [first, replace(first, ids=[*first.ids[:-3], 70, 71], answer=())]
    cells = plan_cells(METHODS, [Budget(64)])
    there = relay.run_group(prompts, [cells, cells[1:]], [TEXT, TEXT], control=True)
    for number, asked in enumerate(cells):
        alone = relay.engine.run_group(prompts, [[asked.cell]] * 2)
        theirs = [there[0][number], *there[1][number - 1 : number]]  # the second prompt has no first cell
        for mine, other in zip(alone, theirs, strict=False):
            assert other.status == "ok" and len(other.token_ids) == 6 and other.relayed and other.relayed.depends
            told = [{name: own for name, own in vars(one).items() if name not in OTHER} for one in (mine[0], other)]
            assert told[0] == told[1]  # to the bit


def test_two_labels_of_one_cell_are_answered_at_once_and_a_lost_control_costs_no_score(
    relay: Relay, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, sent = relay.receiver.ask, list[bool]()

    def counted(asked: Ask, message: bytes = b"", constants: Any = None) -> Any:
        sent.append(asked.zeroed)
        if asked.zeroed:
            raise HarnessError("lost")
        return ask(asked, message, constants)

    monkeypatch.setattr(relay.receiver, "ask", counted)
    one, other, snap = run(relay, prompt_of(tiny), FULL, replace(FULL, method="another"), SNAP, control=True)
    assert sent == [False, False, True, False, True]  # the text, and two caches
    assert one == other and one.relayed is not None and one.relayed.depends is None and one is not other
    assert (one.status, snap.status) == ("ok", "ok")


def test_the_receiver_has_nothing_but_the_cache(
    relay: Relay, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another context's cache, sent in the place of this one's, gives that one's answer."""
    prompt, pack = prompt_of(tiny), send.pack_message
    other = replace(prompt, ids=[*reversed(prompt.ids[: prompt.context]), *prompt.ids[prompt.context :]])
    first, second = (run(relay, own, FULL)[0] for own in (prompt, other))
    assert first.token_ids != second.token_ids and len(first.token_ids) == 6
    messages: list[bytes] = []
    monkeypatch.setattr(send, "pack_message", lambda left: messages.append(pack(left)) or messages[0])
    swapped = [run(relay, own, FULL)[0] for own in (other, prompt)]
    assert [own.token_ids for own in swapped] == [second.token_ids] * 2


def test_a_receiver_that_is_killed_costs_its_cell_alone(
    relay: Relay, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, ask = prompt_of(tiny), relay.receiver.ask
    known = run(relay, prompt, FULL, SNAP)

    def dying(asked: Ask, message: bytes = b"", constants: Any = None) -> Any:
        if message and relay.receiver._process is not None and not killed:
            killed.append(relay.receiver._process.own.pid)
            os.kill(killed[0], signal.SIGSTOP)  # so that it is there when it is asked
            os.kill(killed[0], signal.SIGKILL)
        return ask(asked, message, constants)

    killed: list[int] = []
    monkeypatch.setattr(relay.receiver, "ask", dying)
    monkeypatch.setattr("subprocess.Popen.poll", lambda own: None)
    failed, ok = run(relay, prompt, FULL, SNAP)
    assert killed and failed.status == "failed" and failed.relayed is None
    assert failed.error == "the receiver ended (-9)"
    assert ok.status == "ok" and ok.token_ids == known[1].token_ids
    assert relay.receiver._process is not None and relay.receiver._process.own.pid not in killed


def test_what_a_method_or_a_question_raises_is_its_own_cells(relay: Relay, tiny: LoadedModel) -> None:
    class Odd(KV):
        pass

    class Leaves(FullKV):
        def compress(self, view: PromptView, budget: int) -> list[KV]:
            return [Odd(own.keys, own.values, own.positions) for own in super().compress(view, budget)]

    odd, ok = run(relay, prompt_of(tiny), PlannedCell("odd", "full", Cell(Leaves(), None)), FULL)
    assert (odd.status, ok.status) == ("failed", "ok") and "holds a 'Odd', which is no cache known here" in odd.error
    nothing = replace(prompt_of(tiny), context=len(prompt_of(tiny).ids))
    (asked,) = run(relay, nothing, FULL)
    assert asked.status == "skipped" and "no question after" in asked.error


def test_a_receiver_that_cannot_load_the_model_says_so(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = Receiver(replace(tiny, typed="/nowhere/model"))
    with pytest.raises(HarnessError, match="the receiver cannot answer: .*nowhere/model") as caught:
        receiver.ask(Ask(text=(5, 6, 7)))
    assert "\n" not in str(caught.value) and receiver._process is None
    monkeypatch.setattr(Receiver, "_heard", lambda *_: Reply(revision="another one"))
    receiver = Receiver(tiny)
    with pytest.raises(HarnessError, match="it loaded revision another one of tiny"):
        receiver.ask(Ask(text=(5, 6, 7)))
    assert receiver._process is None


def test_one_that_died_idle_is_not_missed_and_another_ends_with_its_sender(tiny: LoadedModel) -> None:
    receiver, pids = Receiver(tiny), []
    for _ in range(2):
        reply, _ = receiver.ask(Ask(text=(5, 6, 7)))
        assert reply.text_s > 0 and receiver._process is not None
        pids.append(receiver._process.own.pid)
        if len(pids) == 1:
            os.kill(pids[0], signal.SIGKILL)
            os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
    del receiver
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_constants_of_a_model_go_to_a_receiver_once(
    relay: Relay, tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = prefill(relay.engine.model, range(5, 60), Needs(window=1)).view
    about = {"method": "recalkv", "model": "tiny", "model_revision": tiny.spec.revision, "corpus": "x", "prompts": ()}
    save_constants(Constants(ConstantsManifest(**about, seed=0), ReCalKV().neutral(view)), tmp_path)
    policy = plan_method("recalkv", {"compiled": str(tmp_path)}, revision=tiny.spec.revision).policy
    cell, packed, sent = Cell(policy, Budget(64)), client.pack_tensors, list[int]()
    monkeypatch.setattr(client, "pack_tensors", lambda named: sent.append(len(named)) or packed(named))
    (alone,) = relay.engine.run(prompt_of(tiny), [cell])
    for _ in range(2):
        (other,) = run(relay, prompt_of(tiny), PlannedCell("recalkv", "64", cell))
        assert (other.status, other.token_ids, other.nll_per_token) == ("ok", alone.token_ids, alone.nll_per_token)
        assert other.relayed.sent_bytes < other.stored_bytes + HEADER_BYTES < other.method_bytes + other.stored_bytes
    assert sent[1] > 0 == sum(sent) - sent[1]  # the text first, and the second message needs none
