"""Stored nights, which of them tonight is judged by, and the report."""

from pathlib import Path
from random import Random
from typing import Any

import pytest

from harness.errors import HarnessError
from harness.records.record import Record
from leaderboards.nights.compare import compare
from leaderboards.nights.files import machine_id, read_nights, write_night
from leaderboards.nights.report import NightVerdict, headline, judge, to_markdown, to_terminal, warning
from tests.leaderboards.nights.test_compare import BARE, OPTIONS, longer, night, noisy, records, scored
from tests.pretend import record


def test_a_stored_night_is_the_night(tmp_path: Path) -> None:
    odd = record("a", "64", 'odd "id", NA', None, task="NA", meta={"group": 7}, prompt_sha256="f" * 64)
    written = night([*noisy(1), odd])
    table, about = write_night(written, tmp_path)
    (read,) = read_nights(tmp_path, "nightly")
    assert read.about == written.about
    assert compare(written, read, BARE).changes == compare(written, written, BARE).changes
    assert compare(read, written, BARE).counted == 0
    assert '"odd ""id"", NA",ffffffffffffffff,7,a,64,failed,,,100\n' in table.read_text()
    assert [*write_night(read, tmp_path)] == [table, about]
    assert read_nights(tmp_path, "nightly")[0].about == written.about
    assert read_nights(tmp_path, "other") == read_nights(tmp_path / "absent", "nightly") == []


def test_the_newest_night_comes_first_and_only_one_of_a_class_is_kept(tmp_path: Path) -> None:
    for day, changes in ((2, {}), (4, {"torch": "2.14.0"}), (3, {}), (1, {"version": 2})):
        write_night(night(records(), finished=f"2026-01-0{day}T04:00:00+00:00", **changes), tmp_path)
    assert [int(old.about.finished[8:10]) for old in read_nights(tmp_path, "nightly")] == [4, 3, 1]


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("*.json", '"format"', "", "as a night, is damaged"),
        ("*.json", '"version"', '"versoin"', "as a night, is damaged: version"),
        ("*.json", '"format": 1', '"format": 2', "as a night, is damaged: format"),
        ("*.csv", "", None, "cannot read"),
        ("*.csv", ",ok,", ",failed,", "is not the table that its .json was written with"),
    ],
)
def test_a_damaged_night_is_refused_in_one_line(
    tmp_path: Path, name: str, old: str, new: str | None, says: str
) -> None:
    """new: what stands for the first `old`; None where the file is gone."""
    write_night(night(records()), tmp_path)
    (path,) = tmp_path.glob(name)
    text = path.read_text()
    assert old in text
    path.unlink()
    if new is not None:
        path.write_text(text.replace(old, new, 1))
    with pytest.raises(HarnessError) as error:
        read_nights(tmp_path, "nightly")
    assert all(part in str(error.value) for part in (says, str(path))) and "\n" not in str(error.value)


def test_nights_without_records_and_folders_that_are_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no records"):
        night([])
    (tmp_path / "file").touch()
    with pytest.raises(HarnessError, match="is no folder"):
        read_nights(tmp_path / "file", "nightly")


def test_machine_class_is_what_chooses_kernels() -> None:
    def of(**changes: Any) -> str:
        return night(records(), **changes).about.machine_class

    assert of() == of(machine={"cores": 64}, torch="2.13.1+cpu") == "cpu, Xeon, float32, torch 2.13"
    assert of(machine={"processor": "EPYC"}) == "cpu, EPYC, float32, torch 2.13"
    assert of(torch="2.14.0") == "cpu, Xeon, float32, torch 2.14"
    cards = night(records(edit=lambda r: {"accelerator": "H100" if r.task == "ruler/vt" else "A100"}))
    assert cards.about.machine_class == "cpu, A100 + H100, float32, torch 2.13"
    assert cards.about.name.startswith("nightly-v1-cpu-a100-h100-float32-torch-2-13-")


def test_machine_ids_differ_by_host_and_by_what_is_in_it() -> None:
    assert machine_id({"cores": 2, "cuda": None}, "here") == machine_id({"cuda": None, "cores": 2}, "here")
    ids = {machine_id({"cores": cores}, host) for cores in (2, 4) for host in ("here", "there")}
    assert len(ids) == 4 and all(len(name) == 12 and "here" not in name for name in ids)


def test_another_version_class_or_setting_is_no_baseline() -> None:
    tonight = night(records(edit=lambda r: longer(r, 1)))
    same, elsewhere = night(records()), night(records(), torch="2.14.0")
    assert judge(tonight, [same], OPTIONS).regressions > 0
    informed = judge(tonight, [elsewhere], OPTIONS)
    assert headline(informed) == "new series: compared with no night, this one becomes its baseline"
    assert informed.publishable and len(informed.others) == 1
    assert "torch 2.14 (2026-01-02T03:10:00+00:00" in to_markdown(informed)
    assert "comparisons 12 worse and 0 better" in to_markdown(informed)
    for old, why in (
        (night(records(), version=2), "version 2 is retired, this is 1"),
        (night(records(), first_token="prefill"), "first_token was prefill, is compressed"),
        (night(records(), seed=1), "seed was 1, is 42"),
    ):
        alone = judge(tonight, [old], OPTIONS)
        assert alone.comparison is None and alone.publishable and not alone.others
        assert why in alone.aside[0] and why in to_terminal(alone, width=1000)
    both = judge(tonight, [elsewhere, same], OPTIONS)
    assert both.baseline is same and len(both.others) == 1 and not both.publishable


def test_a_new_processor_or_dtype_is_a_new_series_with_a_warning() -> None:
    old, tonight = night(records()), night(records(), machine={"processor": "EPYC"})
    new = judge(tonight, [old], OPTIONS)
    line = "the last night was on cpu, Xeon, float32, torch 2.13, this is cpu, EPYC, float32, torch 2.13;"
    assert line in warning(new) and line in to_markdown(new)
    assert (new.comparison, new.regressions, new.publishable) == (None, 0, True)
    assert "no night of this board is stored" in warning(judge(tonight, [], OPTIONS))
    assert "seed was 1, is 42" in warning(judge(tonight, [night(records(), seed=1)], OPTIONS))
    assert warning(judge(tonight, [tonight], OPTIONS)) == ""
    other = judge(night(records(edit=lambda r: {"prompt_sha256": "f" * 64})), [old], OPTIONS)
    assert other.publishable and headline(other).startswith("new series: ")
    assert "has no prompt, method or budget in common" in warning(other)


def test_a_task_at_0_fails_a_new_series_too() -> None:
    def zero(r: Record) -> dict[str, Any]:
        return {"metrics": {"score": 0.0}} if (r.method, r.task) == ("h2o", "ruler/vt") else {}

    newest, older = (
        night(records(), torch=t, finished=f"2026-01-0{d}T04:00:00+00:00") for t, d in (("2.14", 5), ("2.15", 4))
    )
    tonight = night(records(edit=zero))
    broken = judge(tonight, [newest, older], OPTIONS)
    assert broken.fallen == ("h2o at 64, ruler/vt: fell to 0 from 46.9, n 8",) and not broken.publishable
    assert headline(broken) == "new series, 1 regression" and broken.fallen[0] in to_markdown(broken)
    assert judge(night(records()), [newest, night(records(edit=zero), torch="2.15")], OPTIONS).publishable


def verdict(*, accept: bool = False) -> NightVerdict:
    def edit(r: Record) -> dict[str, Any]:
        if r.method == "h2o":
            return scored(r, 0.25)
        return {**longer(r, 0.5), "kv_bytes": 200} if r.method == "snapkv" else {}

    return judge(night(records(edit=edit)), [night(records())], OPTIONS, accept=accept)


def test_the_report_says_what_regressed_by_how_much_and_how_sure() -> None:
    page, text = to_markdown(verdict()), to_terminal(verdict())
    assert page.startswith("# nightly: 8 regressions\n") and text.startswith("nightly: 8 regressions\n")
    for part in ("10 min 0 s", "commit c0ffee", "+0.500 [+0.500, +0.500]", " 0.039 ", "kept bytes +100.00 %: 800 to"):
        assert part in page and part in text
    assert page.index("## Regressed") < page.index("## Improved") < page.index("## Seconds")
    assert "+25.0 [+25.0, +25.0]" in page.split("## Improved")[1]
    assert not verdict().publishable
    assert verdict(accept=True).publishable
    assert headline(verdict(accept=True)) == "8 regressions, accepted"


def test_the_report_of_an_equal_night_is_short() -> None:
    slow = night(records(edit=lambda r: {"prefill_s": 0.75}))
    lines = to_markdown(judge(slow, [night(records())], OPTIONS)).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# nightly: no regression", "## Seconds"]
    assert {"- prefill: 0.75 s a sample, before 0.5 s (+50.0 %)", "- the same machine; not judged"} < {*lines}


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_records_changes_nothing(seed: int) -> None:
    old, new = (Random(seed).sample(made, len(made)) for made in (noisy(4), noisy(5)))
    shuffled = judge(night(new), [night(old)], BARE)
    plain = judge(night(noisy(5)), [night(noisy(4))], BARE)
    assert to_markdown(shuffled) == to_markdown(plain)
    assert shuffled.comparison is not None and shuffled.comparison == plain.comparison
    assert shuffled.night.about == plain.night.about
