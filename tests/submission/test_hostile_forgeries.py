"""Forged submissions: a true run of the tiny model, edited with care, under checksums and run ids made anew.

Each is refused by an option of `harness verify`, or is one of those that stay possible; docs/records.md names those.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.models.load import LoadedModel
from harness.models.prompt import TaskTokenizer
from harness.submission.archive import MANIFEST, RECORDS, pack_run
from harness.submission.check_again import Again
from harness.submission.check_prompts import draw_again
from harness.submission.verify import verify_pack
from tests.hostile import TALLY
from tests.submission.forgeries import FORGERIES, Forged
from tests.submitted import members_of
from tests.tiny_run import only

pytestmark = pytest.mark.hostile


@pytest.fixture(scope="module")
def tiny_pack(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pack = tmp_path_factory.mktemp("forged") / "pack.zip"
    pack_run(only(finished), pack)
    return pack


@pytest.fixture
def options(tiny: LoadedModel) -> dict[str, dict[str, Any]]:
    """What `verify_pack` is given for each option; each has those before it."""
    with_tokenizer = {
        "decode": TaskTokenizer(tiny.tokenizer).decode,
        "draw": lambda manifest: draw_again(manifest, tiny),
    }
    again = {"again": lambda manifest, drawn: Again(manifest, drawn, lambda: tiny, seed=3)}
    return {"none": {}, "tokenizer": with_tokenizer, "rescore": with_tokenizer | again}


def copied(pack: Path, to: Path) -> tuple[Path, Forged]:
    to.write_bytes(pack.read_bytes())
    members = members_of(pack)
    lines = [json.loads(line) for line in members[RECORDS].splitlines()]
    return to, Forged(json.loads(members[MANIFEST]), lines)


def test_the_true_run_passes_with_every_option(tiny_pack: Path, options: dict[str, dict[str, Any]]) -> None:
    for given in options.values():
        verdict = verify_pack(tiny_pack, **given)
        assert verdict.ok, verdict.reasons
    assert verdict.checks[-1].name == "again" and verdict.checks[-1].counted == 2  # of 15 cells
    assert [check.counted for check in verdict.checks if check.name == "prompts"] == [15]


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_refused_by_its_option_and_passes_those_before(
    tiny_pack: Path, options: dict[str, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    by, change = FORGERIES[name]
    pack, run = copied(tiny_pack, tmp_path / "pack.zip")
    change(run)
    run.packed(pack)
    for option, given in options.items():
        told = refusal(pack, given)
        TALLY["forgeries", "refused" if told else "taken"] += option == (by if by != "stays" else "rescore")
        assert bool(told) == (option == by), f"{option}: {told}"
        assert "\n" not in told and told.isascii() and "Traceback" not in told
        if told:
            return


def refusal(pack: Path, given: dict[str, Any]) -> str:
    """The first reason, or the error that ends it; empty for an archive that passes."""
    try:
        verdict = verify_pack(pack, **given)
    except ValueError as error:
        return str(error)
    return "" if verdict.ok else verdict.reasons[0]


def test_most_kinds_are_refused() -> None:
    refused = [name for name, (by, _) in FORGERIES.items() if by != "stays"]
    assert len(FORGERIES) >= 33 and len(refused) >= 28
