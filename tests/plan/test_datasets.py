"""Fetching data sets: a local archive and local hub folders of the hub's shapes, locks, and everything refused."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import huggingface_hub
import pandas as pd
import pytest

import harness.plan.datasets
from harness.cli import main
from harness.errors import HarnessError
from harness.plan.datasets import DATA, fetch_data, find_asset, hotpotqa_json, squad_json
from tasks.base import TaskError, TaskOptions
from tasks.datafile import find_file, read_file

COMMIT = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
OTHER = "0123456789abcdef0123456789abcdef01234567"
FILES = {"trec.jsonl": b'{"n": 0}\n{"n": 1}\n', "trec_e.jsonl": b'{"n": 2}\n'}


def sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def refused(says: str, name: str = "longbench", **asked: Any) -> None:
    """A data set is not fetched, and one line says why."""
    with pytest.raises(HarnessError, match=says) as error:
        fetch_data(name, **asked)
    assert "\n" not in str(error.value)


def lock_of(folder: Path) -> Any:
    return json.loads((folder / "fetched.json").read_text())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub that has a small data.zip, pinned in place of LongBench's; it lists what was downloaded."""
    archive = tmp_path / "data.zip"

    def write(members: Mapping[str, bytes]) -> str:
        with ZipFile(archive, "w") as opened:
            for name, blob in members.items():
                opened.writestr(name, blob)
        return sha256(archive.read_bytes())

    state = SimpleNamespace(archive=archive, downloads=[], write=write)
    pinned = write({f"data/{name}": blob for name, blob in FILES.items()})

    def download(repo: str, file: str, *, repo_type: str, revision: str) -> str:
        state.downloads.append((repo, file, repo_type, revision))
        return str(archive)

    def info(repo: str, *, revision: str) -> SimpleNamespace:
        if revision != "main":
            raise type("RevisionNotFoundError", (OSError,), {})("404 Client Error.\n\nRevision Not Found")
        return SimpleNamespace(sha=OTHER)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "dataset_info", info)
    rows = {"trec.jsonl": 2, "trec_e.jsonl": 1}
    monkeypatch.setitem(DATA, "longbench", replace(DATA["longbench"], rows=rows, sha256=pinned))
    return state


def changed() -> dict[str, bytes]:
    """The archive's members with other bytes, of as many rows."""
    return {f"data/{name}": blob + b" \n" for name, blob in FILES.items()}


def test_what_is_pinned() -> None:
    """34 files and 8418 rows: 21 of LongBench with 4750, 13 of LongBench-E with 3668."""
    rows = DATA["longbench"].rows
    assert (len(rows), sum(rows.values())) == (34, 8418)
    assert (rows["multifieldqa_en.jsonl"], rows["multi_news_e.jsonl"], rows["lcc_e.jsonl"]) == (150, 294, 300)
    assert all(len(data.revision) == 40 for data in DATA.values())


def test_the_archive_is_fetched_once_and_checked_after(hub: SimpleNamespace, cache: Path) -> None:
    folder = fetch_data("longbench")
    assert folder == cache / "longbench" == find_asset("longbench")
    assert {path.name for path in folder.iterdir()} == {*FILES, "fetched.json"}
    assert all((folder / name).read_bytes() == blob for name, blob in FILES.items())
    lock = lock_of(folder)
    assert (lock["repo"], lock["commit"], lock["sha256"]) == ("THUDM/LongBench", COMMIT, DATA["longbench"].sha256)
    assert lock["files"] == {
        "trec.jsonl": {"sha256": sha256(FILES["trec.jsonl"]), "rows": 2},
        "trec_e.jsonl": {"sha256": sha256(FILES["trec_e.jsonl"]), "rows": 1},
    }
    assert fetch_data("longbench") == folder
    assert hub.downloads == [("THUDM/LongBench", "data.zip", "dataset", COMMIT)]
    read = read_file(folder / "trec.jsonl")
    assert (read.source, read.revision) == ("THUDM/LongBench", COMMIT)


def test_another_folder_is_found_by_data_dir(hub: SimpleNamespace, cache: Path, tmp_path: Path) -> None:
    assert fetch_data("longbench", to=tmp_path / "mine") == tmp_path / "mine" / "longbench"
    assert not cache.exists()
    (tmp_path / "own" / "longbench").mkdir(parents=True)
    refused("was not made by this command", to=tmp_path / "own")
    options = TaskOptions(tokenizer=None, max_tokens=1, data_dir=tmp_path / "mine")  # type: ignore[arg-type]
    assert find_file(options, "longbench", "trec.jsonl") == tmp_path / "mine" / "longbench" / "trec.jsonl"
    assert find_file(options, "x", "no*", "trec.*", also=("longbench",)).name == "trec.jsonl"
    says = r"^no a or b\* in .*mine or .*x; put it there, or run `harness data fetch x --to .*mine`"
    with pytest.raises(TaskError, match=says):
        find_file(options, "x", "a", "b*")


def test_a_changed_file_is_refused(hub: SimpleNamespace) -> None:
    folder = fetch_data("longbench")
    (folder / "trec.jsonl").write_bytes(b"{}\n{}\n")
    refused(r"^trec\.jsonl has sha256 \w{12}, \w{12} was fetched; delete .*longbench")
    (folder / "trec.jsonl").unlink()
    for error in ("cannot read .*trec", ".*fetched.json is damaged"):
        refused(rf"is damaged \({error}")
        (folder / "fetched.json").write_text("[]")


def test_another_archive_than_pinned_is_refused_and_not_kept(hub: SimpleNamespace, cache: Path) -> None:
    digest = hub.write(changed())
    refused(rf"^data\.zip of THUDM/LongBench has sha256 {digest[:12]}, .* was expected")
    assert not (cache / "longbench").exists()
    refused("is no sha256", sha256="abc")
    assert fetch_data("longbench", sha256=digest).is_dir()  # what the user trusts instead
    refused(rf"was made of sha256 {digest[:12]}, not")


def test_a_branch_is_resolved_to_its_commit_and_locked(hub: SimpleNamespace) -> None:
    hub.write(changed())  # the pin's checksum is not theirs
    folder = fetch_data("longbench", revision="main")
    lock = lock_of(folder)
    assert (lock["revision"], lock["commit"]) == ("main", OTHER)
    assert fetch_data("longbench", revision="main") == fetch_data("longbench", revision=OTHER) == folder
    assert [download[-1] for download in hub.downloads] == [OTHER]
    refused(rf"holds revision {OTHER[:12]}, not {COMMIT[:12]}; delete")
    refused(r"^THUDM/LongBench has no revision 'v9'; leave --revision out", revision="v9", to=folder.parent / "mine")
    assert len(hub.downloads) == 1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"data/trec.jsonl": FILES["trec.jsonl"]}, r"lacks data/trec_e\.jsonl; it is not LongBench's archive"),
        ({"trec.jsonl": b"", "../data/trec_e.jsonl": b""}, r"lacks data/trec\.jsonl, data/trec_e\.jsonl;"),
        ({"data/trec.jsonl": b"{}\n", "data/trec_e.jsonl": b"{}\n"}, r"^trec\.jsonl has 1 rows, 2 are official"),
        ({"data/trec.jsonl": b"{}\n{", "data/trec_e.jsonl": b"{}\n"}, r"^trec\.jsonl line 2 is not JSON"),
    ],
)
def test_an_archive_of_other_content_is_refused(
    members: dict[str, bytes], message: str, hub: SimpleNamespace, cache: Path
) -> None:
    digest = hub.write(members)
    refused(message, sha256=digest)
    assert not (cache / "longbench").exists()


def test_a_damaged_archive_is_refused(hub: SimpleNamespace) -> None:
    blob = bytearray(hub.archive.read_bytes())
    blob[blob.index(b'{"n": 1}') + 6] ^= 1
    for data, says in ((bytes(blob), r"is damaged \(Bad CRC"), (b"not a zip", "is damaged")):
        hub.archive.write_bytes(data)
        refused(r"data\.zip of THUDM/LongBench " + says, sha256=sha256(data))


def test_no_path_of_the_archive_is_followed(hub: SimpleNamespace, tmp_path: Path) -> None:
    members = {f"data/{name}": blob for name, blob in FILES.items()}
    members |= {"data/../../../evil": b"x", "/evil": b"x", "data/extra.jsonl": b"x"}
    folder = fetch_data("longbench", sha256=hub.write(members))
    assert {path.name for path in folder.iterdir()} == {*FILES, "fetched.json"}
    assert not list(tmp_path.rglob("evil"))


def test_no_network_is_one_line(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nand a long trace")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    says = r"^THUDM/LongBench cannot be fetched: no route to host; check the network"
    refused(says)


def test_a_run_never_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DATA:
        with pytest.raises(TaskError, match=rf"^{name} is not here; run `harness data fetch {name}`"):
            find_asset(name)
    monkeypatch.setattr("harness.models.assets.fetch", lambda name: Path(name))
    assert find_asset("essays") == Path("essays")


QUESTIONS = [
    ("a1", "Normans", "First.", "Who?", ["I", "me"], [0, 3]),
    ("a2", "Normans", "First.", "Why?", [], []),
    ("a3", "Normans", "Second.", "When?", ["now"], [1]),
    ("b1", "Oxygen", "Air.", "What?", ["O"], [0]),
]
SQUAD = [
    {"id": id_, "title": title, "context": text, "question": asked, "answers": {"text": texts, "answer_start": starts}}
    for id_, title, text, asked, texts, starts in QUESTIONS
]
SAME = {"question": "Same?", "answer": "yes", "type": "comparison", "level": "hard"}
HOTPOT = [
    {
        "id": "h1",
        **SAME,
        "supporting_facts": {"title": ["A", "B"], "sent_id": [0, 2]},
        "context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]},
    }
]


def test_squad_and_hotpotqa_get_their_official_shapes() -> None:
    made = squad_json(SQUAD)
    assert [(own["title"], len(own["paragraphs"])) for own in made["data"]] == [("Normans", 2), ("Oxygen", 1)]
    answers = [{"text": "I", "answer_start": 0}, {"text": "me", "answer_start": 3}]
    first = {"question": "Who?", "id": "a1", "answers": answers, "is_impossible": False}
    second = {"question": "Why?", "id": "a2", "answers": [], "is_impossible": True}
    assert made["data"][0]["paragraphs"][0] == {"context": "First.", "qas": [first, second]}
    context, facts = [["A", ["One.", " Two."]], ["B", ["Three."]]], [["A", 0], ["B", 2]]
    assert hotpotqa_json(HOTPOT) == [{"_id": "h1", **SAME, "supporting_facts": facts, "context": context}]


def test_real_squad_comes_back_from_the_hub_s_rows(shared_data: Path) -> None:
    official = json.loads((shared_data / "ruler" / "squad_dev_v2_half.json").read_text(encoding="utf-8"))
    rows = []
    for article in official["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                qa.pop("plausible_answers", None)
                answers = {key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")}
                row = {"id": qa["id"], "title": article["title"], "context": paragraph["context"]}
                rows.append(row | {"question": qa["question"], "answers": answers})
    assert squad_json(rows)["data"] == official["data"]


def test_real_hotpotqa_comes_back_from_the_hub_s_rows(shared_data: Path) -> None:
    official = json.loads((shared_data / "ruler" / "hotpot_dev_distractor_100.json").read_text(encoding="utf-8"))
    rows = []
    for row in official:
        facts, context = (list(zip(*row[name], strict=True)) for name in ("supporting_facts", "context"))
        columns = {"supporting_facts": {"title": facts[0], "sent_id": facts[1]}}
        columns["context"] = {"title": context[0], "sentences": context[1]}
        rows.append(row | columns | {"id": "h"})
    assert hotpotqa_json(rows) == [{**row, "_id": "h"} for row in official]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Sequence[Any]], None]:
    """Makes a local folder with the hub's configs and parquet files stand for a data set; `load_dataset` reads it."""

    def make(name: str, config: str, rows: Sequence[Any]) -> None:
        folder = tmp_path / f"{name}-repository"
        (folder / config).mkdir(parents=True)
        for split in ("train", "validation"):
            table = pd.DataFrame(rows if split == "validation" else rows[:1])
            table.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
        files = "".join(f"  - split: {s}\n    path: {config}/{s}-*\n" for s in ("train", "validation"))
        card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n"
        (folder / "README.md").write_text(card)
        ((file, _),) = DATA[name].rows.items()
        monkeypatch.setitem(DATA, name, replace(DATA[name], repo=str(folder), rows={file: len(rows)}))

    return make


@pytest.mark.parametrize(
    ("name", "config", "rows", "file", "shape"),
    [
        ("squad", "squad_v2", SQUAD, "squad-dev-v2.0.json", squad_json),
        ("hotpotqa", "distractor", HOTPOT, "hotpot_dev_distractor_v1.json", hotpotqa_json),
    ],
)
def test_rows_are_read_through_datasets(
    name: str, config: str, rows: list[Any], file: str, shape: Callable[..., Any], repository: Callable[..., None]
) -> None:
    repository(name, config, rows)
    path = fetch_data(name) / file
    assert json.loads(path.read_text()) == shape(rows)
    assert read_file(path).revision == DATA[name].revision
    lock = lock_of(path.parent)
    assert lock["sha256"] == sha256(path.read_bytes())
    assert lock["files"][file] == {"sha256": lock["sha256"], "rows": len(rows)}
    refused("was made of sha256", name, sha256="0" * 64)


def test_rows_of_another_number_shape_or_checksum_are_refused(
    repository: Callable[..., None], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    repository("squad", "squad_v2", [row | {"answers": {"text": ["x"]}} for row in SQUAD])
    refused(r"do not have the known columns \(KeyError 'answer_start'\)", "squad")
    monkeypatch.setitem(DATA, "squad", replace(DATA["squad"], rows={"squad-dev-v2.0.json": 11_873}))
    refused(r"^squad-dev-v2\.0\.json has 4 rows, 11873 are official", "squad")
    repository("hotpotqa", "distractor", HOTPOT)
    says = r"hotpot_dev_distractor_v1\.json of .* has sha256 .*, 000000000000 was expected"
    refused(says, "hotpotqa", sha256="0" * 64)
    assert not list(cache.glob("[a-z]*"))


@pytest.mark.usefixtures("hub")
def test_the_command_line(capsys: pytest.CaptureFixture[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["data", "fetch", "longbench"]) == 0
    assert capsys.readouterr().out == f"{cache / 'longbench'}\n"
    refused = {
        ("data", "fetch", "longbench", "sqad"): "harness: unknown data set 'sqad'; did you mean 'squad'? known: ",
        (
            "data",
            "fetch",
            "longbench",
            "squad",
            "--revision",
            "main",
        ): "harness: --revision pins one data set, 2 are named",
    }
    monkeypatch.setattr(harness.plan.datasets, "fetch_data", lambda *_, **__: pytest.fail("it went on to fetch"))
    for command, message in refused.items():
        assert main(command) == 2
        told = capsys.readouterr().err
        assert told.startswith(message) and told.count("\n") == 1
    for command in (("data",), ("data", "fetch")):
        with pytest.raises(SystemExit, match="2"):
            main(command)
