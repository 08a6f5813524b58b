"""`harness claims`: a table that fits, JSON, the page, and one line for what there is not."""

import json

import pytest

from harness.cli import main

Output = pytest.CaptureFixture[str]


def test_the_table_fits_a_terminal(capsys: Output) -> None:
    assert main(["claims"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 120
    assert "compilerkv-golden " in told and "claims: " in told.splitlines()[-1]


def test_one_claim_is_shown_in_whole(capsys: Output) -> None:
    assert main(["claims", "compilerkv-batch-16"]) == 0
    told = capsys.readouterr().out
    assert "cannot be checked here" in told and "why: needs a GPU of 80 GB" in told
    assert "check: harness boundary --model shape:llama-3-8b" in told


def test_json_has_the_data_the_verdict_and_what_was_found(capsys: Output) -> None:
    assert main(["claims", "--paper", "qkvcomm", "--json"]) == 0
    first, second, _ = json.loads(capsys.readouterr().out)
    assert (first["verdict"], second["verdict"]) == ("holds", "does not hold")
    assert (
        first["found"]["value"] == pytest.approx(5.733, abs=0.001)
        and second["found"]["high"] < second["check"]["at_least"]
    )
    assert main(["claims", "quest-speed", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["found"]["value"] is None and one["found"]["why"]


def test_the_page_is_printed(capsys: Output) -> None:
    assert main(["claims", "--paper", "qkvcomm", "--markdown"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("# Published claims") and "| 2.67 | does not hold |" in told
    with pytest.raises(SystemExit, match="2"):
        main(["claims", "--json", "--markdown"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compilerkv-goldn"], "no claim 'compilerkv-goldn'; did you mean 'compilerkv-golden'?"),
        (["zzz"], "no claim 'zzz'; `harness claims` lists them"),
        (["--paper", "snapk"], "no claim of paper 'snapk'; did you mean 'snapkv'?"),
        (["--paper", "1234.5"], "no claim of paper '1234.5'; papers, by their methods: "),
        (["gqa-ratio", "--paper", "snapkv"], "no claim of paper 'snapkv'"),
    ],
)
def test_what_there_is_not_is_one_line(words: list[str], told: str, capsys: Output) -> None:
    assert main(["claims", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harness: ") and told in line
