"""Boards from folders and archives, and the published ones, which must follow from their published records."""

import shutil
from pathlib import Path

import pytest

from harness.boards.sources import KEPT, PUBLISHED, collect, load_pack, options_of, published_boards
from harness.cli import main
from harness.errors import HarnessError
from harness.records.run_folder import load_run
from harness.submission.archive import pack_run
from harness.submission.verify import verify_pack
from tests.submitted import manifest, stored


@pytest.mark.parametrize("name", published_boards())
def test_a_published_board_follows_from_its_records(name: str, tmp_path: Path) -> None:
    html = ["--html"] if options_of(name).html else []
    assert main(["board", name, "--out", str(tmp_path), *html]) == 0
    made = {path.name: path for path in tmp_path.iterdir() if path.suffix != ".png"}
    kept = {path.name for path in PUBLISHED.glob(f"{name}.*") if path.suffix != ".png"}
    assert set(made) == kept
    assert [file for file in made if made[file].read_bytes() != (PUBLISHED / file).read_bytes()] == []


@pytest.mark.parametrize("pack", sorted(KEPT.glob("*/*.zip")), ids=lambda pack: f"{pack.parent.name}/{pack.stem}")
def test_published_records_can_be_scored_again(pack: Path) -> None:
    verdict = verify_pack(pack)
    refused = [check.name for check in verdict.checks if check.refused]
    assert refused == ([] if verdict.index.references else ["archive"])


def test_folders_archives_and_folders_of_archives_are_the_same_runs(tmp_path: Path) -> None:
    folder = stored(tmp_path / "results")
    packs = tmp_path / "packs"
    packs.mkdir()
    assert main(["submit", str(folder), "--out", str(packs)]) == 0
    pack = packs / f"{folder.name}.zip"
    for place in (folder, tmp_path / "results", pack, packs):
        assert collect([place]).runs == [load_run(folder)]
    assert load_pack(pack) == load_run(folder)


def test_paths_of_the_command_and_references_stay_at_home(tmp_path: Path) -> None:
    command = ("harness", "run", "--data-dir", "/home/someone/rows")
    folder = stored(tmp_path / "results", manifest(command=command))
    pack_run(folder, tmp_path / "pack.zip", references=False)
    packed, records = load_pack(tmp_path / "pack.zip")
    assert packed.command == ("harness", "run", "--data-dir", "rows")
    assert {record.answers for record in records} == {()}
    verdict = verify_pack(tmp_path / "pack.zip")
    assert not verdict.ok
    assert verdict.reasons[0] == "archive: it was packed without references: no score can be recomputed"


def test_what_is_no_board_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    bad = {
        (str(tmp_path / "absent"),): "no run in",
        (str(tmp_path / "empty"),): "no run in",
        ("quikc",): "published boards: ",
        ("--published", "--name", "x"): "leave out",
    }
    for arguments, says in bad.items():
        assert main(["board", *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


def test_an_archive_that_is_none_is_refused(tmp_path: Path) -> None:
    shutil.copy(__file__, tmp_path / "pack.zip")
    with pytest.raises(HarnessError, match="bad archive"):
        collect([tmp_path])
