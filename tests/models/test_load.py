"""Names, dtypes, devices and loading, on the tiny model and on what others leave: folders, adapters, quantised ones."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from harness.errors import HarnessError
from harness.machine import git_commit, machine, versions
from harness.models.generation import CHANGES_TEXT
from harness.models.load import LoadedModel, describe_model, load_model, resolve_device, resolve_dtype
from harness.models.prompt import wrap
from harness.models.source import resolve_model
from tasks.base import Sample

without_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
without_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="no accelerate")
IDS = torch.arange(5, 40)[None]


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    """One of these tests' own, whose attention is as transformers made it."""
    return load_model("tiny", dtype="float32", device="cpu")


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(IDS.to(loaded.model.device)).logits.cpu()  # type: ignore[no-any-return]


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_names(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    kinds = {name: resolve_model(name).kind for name in ("tiny", "smollm2-135m", "org/name-1.0")}
    assert kinds == {"tiny": "tiny", "smollm2-135m": "packaged", "org/name-1.0": "hub"}
    assert resolve_model(str(tmp_path)).kind == "folder"
    assert resolve_model(str(tmp_path / "x.gguf")).path == tmp_path / "x.gguf"


@pytest.mark.parametrize("name", ["a/b/c", "./missing", "/missing", "missing.gguf", "org/missing.gguf", "org/", ""])
def test_a_missing_path_is_no_hub_name(name: str) -> None:
    with pytest.raises(HarnessError, match="give smollm2-135m, tiny, a folder"):
        resolve_model(name)
    with pytest.raises(HarnessError, match="unknown model 'tinny'; did you mean 'tiny'"):
        resolve_model("tinny")


def test_dtype_auto_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("harness.models.load._native_bf16", lambda native=native: native)
        assert resolve_dtype("auto", cpu) == expected
    assert resolve_dtype("float16", cpu) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(HarnessError, match="unknown dtype 'fp16'; give auto, float32"):
        resolve_dtype("fp16", cpu)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name, complaint in (("gpu", "unknown device 'gpu'"), ("cuda:99", "'cuda:99' is not available")):
        with pytest.raises(HarnessError, match=complaint):
            resolve_device(name)


def test_tiny_is_the_same_every_time_and_does_not_touch_the_generator(tiny: LoadedModel) -> None:
    before = torch.get_rng_state()
    again = load_model("tiny", dtype="float32", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert again.spec == tiny.spec
    pairs = zip(again.model.parameters(), tiny.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_tiny_as_described(tiny: LoadedModel) -> None:
    config = tiny.model.config
    heads = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert (*heads, tiny.context) == (4, 4, 2, 16, 4096)
    assert tiny.eos_ids == {tiny.tokenizer.convert_tokens_to_ids("<|end|>")}
    assert not tiny.model.training and not any(parameter.requires_grad for parameter in tiny.model.parameters())


def test_bfloat16_tiny_keeps_its_rope_exact(tiny: LoadedModel) -> None:
    half = load_model("tiny", dtype="bfloat16", device="cpu")
    assert half.model.dtype == torch.bfloat16
    assert (half.spec.dtype, half.spec.revision) == ("bfloat16", tiny.spec.revision)
    assert torch.cosine_similarity(logits(half).float(), logits(tiny), dim=-1).min() > 0.99
    assert half.model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32


def test_a_folder_loads_as_what_was_saved(tiny: LoadedModel, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr().err == ""
    assert torch.equal(logits(loaded), logits(tiny))
    assert (loaded.template_tokens, loaded.context, loaded.spec.loaded_as) == (tiny.template_tokens, 4096, ())


def test_the_revision_of_a_folder_follows_its_contents(folder: Path) -> None:
    first = load_model(str(folder), device="cpu").spec.revision
    (folder / "README.md").write_text("not part of the model")
    assert load_model(str(folder), device="cpu").spec.revision == first
    edit(folder / "generation_config.json", eos_token_id=[2, 7])
    changed = load_model(str(folder), device="cpu")
    assert changed.spec.revision != first
    assert changed.eos_ids == {2, 7}


def test_a_folder_has_one_name_however_it_is_typed(
    folder: Path, tmp_path: Path, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(folder)
    typed = ("base", "./base", "base/", "base/../base/.", "~/base", "link", str(folder), f"{folder}//")
    specs = [describe_model(name, dtype="float32", device=device).spec for name in typed for device in ("cpu", "cpu:0")]
    assert {(spec.name, spec.revision) for spec in specs} == {("base", load_model("base").spec.revision)}
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abc"
    shutil.copytree(folder, snapshot)
    shutil.copytree(folder, tmp_path / "tiny")
    names = [
        describe_model(name, dtype="float32", device="cpu").spec.name for name in (str(snapshot), "./tiny", "tiny")
    ]
    assert names == ["org/name", "./tiny", "tiny"]
    other = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "base"))
    edit(other / "generation_config.json", eos_token_id=[2, 7])
    assert load_model(str(other)).spec.name == "base"  # a board tells it apart by its revision
    assert load_model(str(other)).spec.revision != load_model("base").spec.revision


def test_a_gguf_file_has_the_name_of_the_link_that_ends_in_gguf(tmp_path: Path) -> None:
    for name in ("blob", "real.gguf"):
        (tmp_path / name).touch()
        (tmp_path / f"{name}-link.gguf").symlink_to(name)
    titles = [resolve_model(str(tmp_path / f"{name}-link.gguf")).title for name in ("blob", "real.gguf")]
    assert titles == ["blob-link.gguf", "real.gguf"]


def test_a_turn_ends_at_every_token_that_a_file_names(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[4, 5])
    edit(folder / "config.json", eos_token_id=[6, 7])
    edit(folder / "tokenizer_config.json", eot_token="<|user|>", eom_token="<|no such token|>")
    assert load_model(str(folder), device="cpu").eos_ids == {2, 3, 4, 5, 6, 7}


def test_what_greedy_decoding_sets_aside_is_said(folder: Path, tiny: LoadedModel) -> None:
    asked = {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [5] * 100,
        "forced_eos_token_id": 2,
    }
    edit(folder / "generation_config.json", **asked, num_beams=1, do_sample=True, temperature=0.6, length_penalty=1.0)
    notes = load_model(str(folder), device="cpu").set_aside
    assert [note.partition("=")[0].removeprefix("generation config set aside: ") for note in notes] == sorted(
        asked, key=list(CHANGES_TEXT).index
    )
    assert notes[0].endswith("repetition_penalty=1.5") and max(map(len, notes)) < 120
    assert tiny.set_aside == ()


def test_a_token_without_an_embedding_is_refused(tiny: LoadedModel) -> None:
    assert tiny.vocabulary == 261
    tiny.check_ids([0, 260], "this")
    tiny.check_ids([], "nothing")
    with pytest.raises(HarnessError, match=r"this has token 261 .*, the model has embeddings for 261; its tokenizer"):
        tiny.check_ids([0, 261, 5], "this")


def test_attention_implementation_is_set() -> None:
    assert load_model("tiny", attn="eager", device="cpu").model.config._attn_implementation == "eager"
    with pytest.raises(HarnessError, match=r"model 'tiny' cannot be loaded: .*no_such_kernel"):
        load_model("tiny", attn="no_such_kernel", device="cpu")


EVIL = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration is not a"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is not a decoder-only"),
        ({"model_type": "no_such_model"}, "cannot be loaded: .*no_such_model"),
        (EVIL, "pass --trust-remote-code"),
        ({}, "model.safetensors has 1,000 bytes"),
    ],
)
def test_other_models_code_and_damaged_weights_are_refused(
    folder: Path, fields: dict[str, object], complaint: str
) -> None:
    (folder / "evil.py").write_text("raise SystemExit('this code ran')")
    edit(folder / "config.json", **fields)
    weights = folder / "model.safetensors"
    if not fields:
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(HarnessError, match=complaint) as caught:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_the_hub_out_of_reach_is_one_line() -> None:
    with pytest.raises(HarnessError, match=r"^model 'org/name' cannot be loaded: .*; check the name and the network$"):
        load_model("org/name", device="cpu")


def test_manifest_facts_are_json_and_name_what_runs() -> None:
    facts, commit = machine(), git_commit()
    assert json.loads(json.dumps(facts)) == facts and facts["cores"] >= 1
    assert (facts["torch_threads"], versions()["torch"]) == (torch.get_num_threads(), torch.__version__)
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


@pytest.fixture
def adapter(folder: Path) -> Path:
    """A folder as peft writes it, without its weights."""
    into = folder.parent / "adapter"
    into.mkdir()
    (into / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)}))
    return into


def test_a_missing_package_is_one_line(folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.models.readers.find_spec", lambda name: None)
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    for path, device, line in (
        (adapter, "cpu", r"is a peft adapter of .*base, and peft is not installed; `pip install peft`, or merge it"),
        (
            folder,
            "cpu",
            r"with bitsandbytes, and bitsandbytes is not installed; `pip install bitsandbytes`, or give one",
        ),
        (folder, "auto-map", "device_map=auto spreads a model, and accelerate is not installed"),
    ):
        with pytest.raises(HarnessError, match=line):
            load_model(str(path), device=device)


def test_an_adapter_without_a_base_or_beside_a_whole_model_is_refused(adapter: Path, folder: Path) -> None:
    nameless, whole = "that names no base model", "and a config.json of a whole model; keep the one"
    named = '{"base_model_name_or_path": "org/name"}'
    texts = {"{}": nameless, "[]": "is no JSON object", "{": "is not JSON"}
    for path, text, complaint in (*((adapter, *pair) for pair in texts.items()), (folder, named, whole)):
        (path / "adapter_config.json").write_text(text)
        with pytest.raises(HarnessError, match=complaint):
            load_model(str(path), device="cpu")


@without_peft
def test_an_adapter_is_merged(folder: Path, tmp_path: Path, tiny: LoadedModel) -> None:
    from peft import LoraConfig, get_peft_model

    own = load_model(str(folder), dtype="float32", device="cpu").model
    wrapped = get_peft_model(own, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    into = tmp_path / "lora"
    wrapped.save_pretrained(str(into))
    loaded = load_model(str(into), dtype="float32", device="cpu")
    with torch.inference_mode():
        expected = wrapped(IDS).logits
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(loaded), logits(tiny), atol=1e-2)
    assert loaded.spec.loaded_as == (f"peft adapter merged into {folder.name}",)
    assert type(loaded.model) is type(tiny.model)
    described = describe_model(str(into), dtype="float32", device="cpu")
    assert described.spec == loaded.spec
    weights = into / "adapter_model.safetensors"
    held = load_file(weights)
    less = {name: tensor for name, tensor in held.items() if ".layers.2." not in name}
    more = {**held, next(iter(held)).replace(".layers.0.", ".layers.9."): next(iter(held.values())).clone()}
    for changed, complaint in ((less, "missing adapter keys"), (more, "has no place for")):
        save_file(changed, weights)
        with pytest.raises(HarnessError, match=complaint):
            load_model(str(into), dtype="float32", device="cpu")
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(tmp_path / "merged")
    plain = load_model(str(tmp_path / "merged"), dtype="float32", device="cpu")
    assert torch.equal(logits(plain), logits(loaded)) and plain.spec.loaded_as == ()


@without_accelerate
def test_a_device_map_is_passed_on_and_recorded(folder: Path, tiny: LoadedModel) -> None:
    loaded = load_model(str(folder), dtype="float32", device="auto-map")
    torch.testing.assert_close(logits(loaded), logits(tiny))
    assert loaded.spec.loaded_as[0].startswith(f"device_map auto: {loaded.spec.device}")
    assert loaded.spec.device in ("cpu", "cuda")
    assert load_model("tiny", device="auto-map").spec.loaded_as == ()


@pytest.mark.model
def test_the_packaged_model_talks(smollm2: LoadedModel) -> None:
    sample = Sample("0", "Complete the sentence: the capital of France is", " ...", ("Paris",), max_new_tokens=8)
    assert smollm2.tokenizer("hello world is ...")["input_ids"] == [28120, 905, 314, 4563]  # whatever the transformers
    assert smollm2.eos_ids == {2}
    ids, border, *_ = wrap(smollm2.tokenizer, sample)
    assert str(smollm2.tokenizer.decode(ids[:border])).endswith("the capital of France is")
    said: list[int] = []
    with torch.inference_mode():
        for _ in range(8):
            said.append(int(smollm2.model(torch.tensor([ids + said])).logits[0, -1].argmax()))
    assert "Paris" in smollm2.tokenizer.decode(said)


@pytest.mark.gpu
def test_tiny_on_the_accelerator(tiny: LoadedModel) -> None:
    loaded = load_model("tiny", dtype="float32")
    assert loaded.spec.device == "cuda"
    torch.testing.assert_close(logits(loaded), logits(tiny), rtol=1e-3, atol=1e-3)
