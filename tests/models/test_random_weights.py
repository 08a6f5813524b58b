"""Models with random weights by their shape: which there are, that they are the same each time, what refuses them."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.engine.packed import Packed
from harness.engine.transformers_seam import AttachedModel
from harness.errors import HarnessError
from harness.models.load import describe_model, load_model
from harness.models.source import check_model
from harness.plan.methods import plan_method
from harness.records.bench_folder import load_bench
from harness.records.spec import RunSpec
from harness.speed.one_method import Isolated
from leaderboards.tables.boundary import title
from methods.compilerkv.tables import load_tables
from tests.pretend import SPEC
from tests.tiny_run import call, only

ROOT = Path(__file__).parents[2]

COUNTS = {
    "llama-3-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "mistral-7b": 7_248_023_552,
    "gpt-oss-20b": 20_914_757_184,
    "smollm2-1.7b": 1_711_376_384,
}
"""Parameters as the hub counts those of each model's safetensors, at `SHAPES`."""
SMALL: dict[str, Any] = {
    **{"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 2048},
    **{
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 300,
        "pad_token_id": 0,
    },
}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def written(into: Path, **changes: Any) -> str:
    """A config of a small shape in a folder; the name that asks for it."""
    into.mkdir(exist_ok=True)
    (into / "config.json").write_text(json.dumps(SMALL | changes))
    return f"shape:{into}"


def test_every_known_shape_is_listed_and_has_the_parameters_of_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", "models") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {name for name in listed if name.startswith("shape:")} == {f"shape:{name}" for name in (*COUNTS, "PATH")}
    for name, count in COUNTS.items():
        known = describe_model(f"shape:{name}", dtype="bfloat16", device="cuda")
        weights = list(known.model.parameters())
        assert sum(weight.numel() for weight in weights) == count, name
        assert {(weight.device.type, weight.dtype) for weight in weights} == {("meta", torch.bfloat16)}
        assert (known.spec.name, known.spec.loaded_as) == (f"shape:{name}", ("random weights",))


def test_a_shape_is_known_by_its_config_and_has_the_same_weights_each_time(tmp_path: Path) -> None:
    name = written(tmp_path / "small")
    state = torch.get_rng_state()
    one, two = (load_model(asked, dtype="float32", device="cpu") for asked in (name, f"{name}/config.json"))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.spec == two.spec == describe_model(name, dtype="float32", device="cpu").spec
    assert one.spec.name == "shape:small" and one.context == 2048 and 300 in one.eos_ids
    pairs = list(zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert load_model(written(tmp_path / "small", rope_theta=1e6), device="cpu").spec.revision != one.spec.revision
    assert len(one.words()) == 512 - len(one.eos_ids | set(range(5)))  # every token but the special ones


def test_random_weights_are_those_of_an_untrained_model(tmp_path: Path) -> None:
    loaded = load_model(written(tmp_path / "small"), dtype="bfloat16", device="cpu").model
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, weight in loaded.named_parameters():
        assert weight.dtype == torch.bfloat16 and not weight.requires_grad
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        elif "mlp" in name or "embed" in name:
            assert 0.08 < weight.float().std() < 0.12, name


def test_experts_and_quantised_configs_get_plain_weights(tmp_path: Path) -> None:
    name = written(tmp_path / "experts", **EXPERTS, quantization_config={"quant_method": "mxfp4"})
    loaded = load_model(name, dtype="float32", device="cpu")
    assert loaded.spec.loaded_as == ("random weights",) and not hasattr(loaded.model.config, "quantization_config")
    experts = [weight for weight in loaded.model.parameters() if weight.ndim == 3]
    assert experts and all(0.08 < weight.std() < 0.12 for weight in experts)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])  # plain, with a norm of queries and keys, fused
def test_heads_attend_unlike_enough_to_share_slots_out_unevenly(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = written(tmp_path / kind, model_type=kind)
    unlike = spread(name)
    monkeypatch.setattr("harness.models.random_weights.vary_heads", lambda model: None)
    assert unlike > 0.3 and unlike > 1.5 * spread(name)


def spread(name: str) -> float:
    """Standard deviation over heads of the slots that AdaKV shares out beside the window, as a share of their mean."""
    model = AttachedModel(load_model(name, dtype="float32", device="cpu").model)
    ids = torch.randint(5, 290, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    layers = Isolated(model, plan_method("adakv").policy, 96).prefill(ids).layers
    kept = [layer.kv() if isinstance(layer, Packed) else layer for layer in layers]
    slots = torch.stack([(kv.positions[0] >= 0).sum(dim=-1) for kv in kept]).float() - 32
    assert torch.equal(slots.mean(dim=1), torch.full((3,), 64.0))
    return float(slots.std(dim=1).mean() / 64)


def test_what_is_no_shape_is_refused_by_a_look(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    (tmp_path / "odd.json").write_text(json.dumps(SMALL | {"num_hidden_layers": 10**6}))
    (tmp_path / "empty").mkdir()
    refused = {
        "shape:llama-3-8": "unknown shape 'llama-3-8'; did you mean 'llama-3-8b'.* give shape: before llama-3-8b, ",
        f"shape:{tmp_path}/none.json": "none.json has no model_type",
        f"shape:{tmp_path}/odd.json": "odd.json says num_hidden_layers 1000000",
        f"shape:{tmp_path}/empty": "cannot read .*config.json",
        "llama-3-8b": "unknown model 'llama-3-8b'; did you mean 'shape:llama-3-8b'",
    }
    for name, says in refused.items():
        with pytest.raises(HarnessError, match=says):
            check_model(name)


def test_a_model_without_a_decoder_of_its_own_is_no_shape(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="cannot be loaded: t5 is not a decoder-only language model"):
        load_model(written(tmp_path / "t5", model_type="t5"), device="cpu")


def test_random_weights_have_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, out = written(tmp_path / "small"), tmp_path / "out"
    commands: dict[str, tuple[str | Path, ...]] = {
        **{
            "run": ("--methods", "snapkv", "--tasks", "stdlib"),
            "compile": ("--out", out),
            "tune": ("adakv", "--out", out),
        },
        **{"calibrate-relay": ("--receiver", "tiny", "--out", out), "calibrate-tasks": ("--out", out)},
        **{"verify": ("pack.zip",)},
        "lm-eval": ("--tasks", "lambada", "--model", "kvpolicy", "--model_args", f"pretrained={name},method=fullkv"),
    }
    for command, words in commands.items():
        option = {"verify": "--tokenizer", "lm-eval": "--device"}.get(command, "--model")
        assert call(command, *words, option, "cpu" if command == "lm-eval" else name) == 2
        told = capsys.readouterr().err
        assert "has random weights, so no score; use bench" in told and told.count("\n") == 1, command
    with pytest.raises(ValueError, match="a run of shape:small, whose weights are random, has no scores"):
        RunSpec(**{**SPEC, "model": describe_model(name, dtype="float32", device="cpu").spec})


def test_tables_move_to_a_shape(tmp_path: Path) -> None:
    assert (
        call("tables", "transfer", "smollm2-135m", "--model", "shape:smollm2-1.7b", "--heads", "--out", tmp_path / "t")
        == 0
    )
    assert load_tables(tmp_path / "t").manifest.shapes.layers == 24


ABSENT = "gguf rouge_score nltk punkt jieba rapidfuzz wonderwords datasets lm_eval ray flash_attn kvpress accelerate"
BENCH = """
import sys
from importlib.machinery import PathFinder

find, absent = PathFinder.find_spec, sys.argv.pop(1).split()
PathFinder.find_spec = classmethod(lambda cls, name, *a, **k: None if name in absent else find(name, *a, **k))

from harness.cli import main
from harness.speed import client, server


class Prober:  # in this process
    model_bytes, limit = 0, None

    def __init__(self, *, model, threads, **options):
        self.server = server.ServerReady.load(model, **options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, spec, **options):
        return self.server.answer(client.Job(spec=spec, **options)).result


client.Prober = Prober
sys.exit(main())
"""


def test_a_bench_of_a_shape_needs_few_packages_and_says_that_its_weights_are_random(tmp_path: Path) -> None:
    name, out = written(tmp_path / "small"), tmp_path / "out"
    words = ("--methods", "fullkv,snapkv", "--budgets", "16", "--lengths", "64", "--new-tokens", "3", "--rounds", "1")
    words += ("--device", "cpu", "--no-warm-up", "--out", str(out))
    done = subprocess.run(
        [sys.executable, "-c", BENCH, f"{ABSENT} peft pyarrow", "bench", "--model", name, *words],
        **{"cwd": ROOT, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    manifest, records = load_bench(only(out))
    assert [record.status for record in records] == ["ok", "ok"]
    assert manifest.spec.model == name
    page = (only(out) / "bench.md").read_text()
    assert f"bench: {name} (random weights), " in page and "score" not in page


def test_a_boundary_of_random_weights_says_so() -> None:
    model = describe_model("shape:smollm2-1.7b", dtype="float32", device="cpu").spec
    manifest = SimpleNamespace(limit_bytes=2**30, model=model)
    assert title(manifest) == r"Boundary under 1024 MiB: shape:smollm2-1.7b (random weights) (float32, cpu)"
