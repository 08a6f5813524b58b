"""What a run says of its model: one name for one folder, what was set aside, tokens that the model does not have."""

import json
import shutil
from pathlib import Path

import pytest

from harness.models.tiny import CHAT_TEMPLATE
from tests import tiny_run
from tests.hostile import tried_command

pytestmark = pytest.mark.usefixtures("_no_pictures")
RUN = (
    "run",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    *tiny_run.PLAIN,
    *tiny_run.TASK,
    "--methods",
    "fullkv",
    "--limit",
    "1",
)


def test_a_folder_typed_in_other_ways_is_resumed_and_notes_are_in_every_record(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    held = json.loads((folder / "generation_config.json").read_text()) | {"repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(held))
    for typed in ("base", str(folder), "../" + tmp_path.name + "/base/"):
        assert tiny_run.call(*RUN, "--model", typed, "--out", "out") == 0
    assert capsys.readouterr().err.count("0 of 1 samples to do") == 2
    assert tiny_run.manifest(tmp_path / "out")["spec"]["model"]["name"] == "base"
    records = tiny_run.records(tmp_path / "out")
    assert {record["model"] for record in records} == {"base"}
    assert {tuple(record["notes"]) for record in records} == {("generation config set aside: repetition_penalty=1.5",)}


def test_two_models_of_one_name_are_two_tables(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "base"))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    for typed in (folder, other):
        assert tiny_run.call(*RUN, "--model", typed, "--out", tmp_path / "out") == 0
    capsys.readouterr()
    assert tiny_run.call("board", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("samples: ") == 2


@pytest.mark.hostile
@pytest.mark.parametrize("token", [261, 300, 2**20])
def test_a_prompt_of_tokens_that_the_model_lacks_is_refused(folder: Path, tmp_path: Path, token: int) -> None:
    core = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    core["added_tokens"].append({"id": token, "content": "<|im|>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(core))
    (folder / "chat_template.jinja").write_text("<|im|>" + CHAT_TEMPLATE)
    asked = ("--tasks", "niah/passkey", "--model", folder, "--out", tmp_path / "out")
    line = tried_command("tokens without an embedding", *RUN, *asked)
    assert "has token" in line and "embeddings for 261" in line
    assert not (tmp_path / "out").exists()
