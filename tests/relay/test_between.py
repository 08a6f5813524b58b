"""Two models of one cache shape: moments against plain loops, what is refused, and a run that another model answers."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from harness.cli import main
from harness.compiler.asked import RelaySpec
from harness.compiler.relay import calibrate_relay
from harness.engine.prefill import prefill
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.models.load import LoadedModel, load_model
from harness.models.tiny import tiny_model, tiny_tokenizer
from harness.plan.receivers import MOMENTS, plan_receiver
from harness.records.run_folder import load_run
from harness.records.spec import Sweep
from harness.relay.between import Between, Moments
from harness.run.sequential import run_sweep
from methods.base import KV, Needs
from methods.quant import Quant
from tests.tasks.test_multiquery import longbench
from tests.tiny_run import call

CPU = torch.device("cpu")
TEXTS = [[5 + (at * step) % 250 for at in range(60 + step)] for step in (7, 11, 13)]


def saved(folder: Path, **changes: int) -> Path:
    """A folder with a tiny model of other weights, and of another shape where asked for."""
    tokenizer = tiny_tokenizer()
    config = tiny_model(len(tokenizer)).config
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def between(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was calibrated from tiny to it. Only read."""
    folder = tmp_path_factory.mktemp("map")
    spec = RelaySpec(receiver=str(other), prompts=4, lengths=(1200, 1500), corpora=("pydoc",), **TINY)
    assert calibrate_relay(spec, folder, ("harness",)).prompts == 4
    return folder


TINY = {"model": "tiny", "dtype": "float32", "device": "cpu"}


def sweep(**options: object) -> Sweep:
    return Sweep.model_validate({**TINY, "methods": ("fullkv",), "tasks": ("relay/qa/longbench",), **options})


def caches(model: AttachedModel) -> list[list[KV]]:
    return [[layer.kv() for layer in prefill(model, ids, Needs()).layers] for ids in TEXTS]


def test_a_senders_cache_has_the_receivers_moments_afterwards(tiny: LoadedModel, other: Path) -> None:
    models = [
        AttachedModel(copy.deepcopy(tiny.model)),
        AttachedModel(load_model(str(other), dtype="float32", device="cpu").model),
    ]
    tensors = {}
    for side, model in zip(("sender", "receiver"), models, strict=True):
        moments = Moments()
        for ids in TEXTS:
            moments.see(model, ids)
        tensors |= moments.tensors(side)
    taken = [Between(tensors, CPU).taken(kvs) for kvs in caches(models[0])]
    for layer in range(4):
        for what in ("keys", "values"):
            mine, theirs = (
                torch.cat([getattr(kvs[layer], what)[0] for kvs in found], dim=1).double()
                for found in (taken, caches(models[1]))
            )
            assert torch.allclose(mine.mean(dim=1), theirs.mean(dim=1), atol=1e-4)
            deviations = [x.std(dim=1, correction=0) for x in (mine, theirs)]
            assert torch.allclose(*deviations, rtol=1e-3, atol=1e-5)


def test_between_a_model_and_itself_nothing_moves(tiny: LoadedModel) -> None:
    model, moments = AttachedModel(copy.deepcopy(tiny.model)), Moments()
    for ids in TEXTS:
        moments.see(model, ids)
    own = Between(moments.tensors("sender") | moments.tensors("receiver"), CPU)
    for kvs in caches(model):
        coded = [*Quant().compress(prefill(model, TEXTS[0], Needs()).view, 0)]
        for kv, moved in zip([*kvs, *coded], [*own.taken(kvs), *own.taken(coded)], strict=True):
            assert type(moved) is KV and torch.equal(moved.positions, kv.positions)
            assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(kv.load(), moved.load(), strict=True))


def test_what_cannot_be_is_refused_before_anything_runs(
    tiny: LoadedModel, other: Path, between: Path, tmp_path: Path
) -> None:
    wide = saved(tmp_path / "wide", num_key_value_heads=4)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in between.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes() + b" ")
    for options, why in (
        ({"receiver": str(wide)}, "has 4 layers of 2 KV heads of 16 channels, the receiver wide has 4 layers of 4"),
        ({"receiver": str(other)}, f"nothing is calibrated between tiny and the receiver {other.name}; run `harness"),
        ({"receiver": str(other), "receiver_map": str(tmp_path)}, "manifest.json.*No such file"),
        ({"receiver": str(other), "receiver_map": str(damaged)}, f"{MOMENTS}' is not what its manifest.json says"),
    ):
        with pytest.raises(HarnessError, match=why) as caught:
            plan_receiver(sweep(**options), tiny)
        assert "\n" not in str(caught.value)
    strange = replace(tiny, spec=tiny.spec.model_copy(update={"revision": "f" * 64}))
    with pytest.raises(HarnessError, match="is from tiny .* to .*; run `harness calibrate-relay"):
        plan_receiver(sweep(receiver=str(other), receiver_map=str(between)), strange)
    assert plan_receiver(sweep(receiver="tiny"), tiny) is None  # it answers itself
    with pytest.raises(ValueError, match="--receiver-map without --receiver"):
        sweep(receiver_map=str(between))
    found = call("run", "--model", "tiny", "--tasks", "stdlib", "--methods", "fullkv", "--receiver", other)
    assert found == 2


def test_another_model_answers_from_the_cache(other: Path, between: Path, tmp_path: Path) -> None:
    text = "The town of Ash lies by the river. " * 6
    options = {"data_dir": str(longbench(tmp_path, (text, "Which town?"), (text, "Which river?"))), "budgets": ("64",)}
    options |= {"methods": ("quant",), "max_new_tokens": 3, "observe": 1, "nll_tokens": 8}
    options |= {"receiver": str(other), "receiver_map": str(between)}
    manifest, records = load_run(run_sweep(sweep(**options), root=tmp_path / "run", command=()))
    assert manifest.spec.answered_by is not None and manifest.spec.answered_by.name == other.name
    assert len(manifest.spec.answered_map) == 64 and [record.status for record in records] == ["ok"] * 2
    assert all(r.relayed and r.relayed.depends and r.relayed.sent_bytes > r.kv_bytes for r in records)
    same = manifest.spec.model_copy(update={"answered_by": None, "answered_map": ""})
    assert same.run_id != manifest.run_id and "answered_by" in manifest.spec.model_dump()


def test_the_command_says_how_to_go_on(other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompts", "2", "--lengths", "1200,1500", "--corpus", "pydoc", "--dtype", "float32", "--device", "cpu"]
    run = ["calibrate-relay", "--model", "tiny", "--receiver", str(other), "--out", str(tmp_path / "map"), *words]
    assert main(run) == 0
    assert f"use it with --tasks relay --receiver {other} --receiver-map" in capsys.readouterr().out
    assert main([*run[:3], "--receiver", "tiny-no", *run[5:]]) == 2
    assert "unknown model 'tiny-no'" in capsys.readouterr().err
