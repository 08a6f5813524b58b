"""The checker of the Markdown pages finds what is dead, and nothing else."""

import subprocess
from pathlib import Path

import pytest

from tests.links import main, problems

README = """# A project

[heading](#two-words-and-code), [other](docs/a%20b.md#again-1), [folder](docs), [away](https://example.org/x.md#y),
![picture](docs/p.svg "title") and `docs/a b.md`, `docs/NAME.md`, `methods/there.py`.

```
[no link](nowhere.md)
```

## Two words, and `code`
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout all of whose links lead somewhere."""
    files = {"README.md": README, "docs/a b.md": "# Again\n\n# Again\n", "docs/p.svg": "", "methods/there.py": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    return tmp_path


def test_live_links_pass(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkout)]) == 0
    assert capsys.readouterr().out == "Every link leads somewhere.\n"


@pytest.mark.parametrize(
    ("added", "found"),
    [
        ("[x](docs/none.md)", "docs/none.md: git tracks no such file"),
        ("![x](none.svg)", "none.svg: git tracks no such file"),
        ("[x](../README.md)", "../README.md: git tracks no such file"),
        ("[x](untracked.md)", "untracked.md: git tracks no such file"),
        ("[x](Docs/p.svg)", "Docs/p.svg: git tracks no such file"),
        ("| a |\n| - |\n| [x](none.md) |", "none.md: git tracks no such file"),
        ("[x][r]\n\n[r]: none.md", "none.md: git tracks no such file"),
        ("[x](#none)", "#none: README.md has no such heading"),
        ("[x](docs/a%20b.md#again-2)", "docs/a%20b.md#again-2: docs/a b.md has no such heading"),
        ("[x](docs/p.svg#none)", "docs/p.svg#none: docs/p.svg has no such heading"),
        ("`methods/none.py`", "methods/none.py: git tracks no such file"),
    ],
)
def test_a_dead_link_is_told_with_its_line(
    checkout: Path, capsys: pytest.CaptureFixture[str], added: str, found: str
) -> None:
    (checkout / "untracked.md").write_text("")
    (checkout / "README.md").write_text(README + added)
    assert main([str(checkout)]) == 1
    place, _, said = capsys.readouterr().out.partition(": ")
    name, line = place.split(":")
    assert (name, said) == ("README.md", found + "\n")
    assert 0 <= len((README + added).splitlines()) - int(line) <= 2


@pytest.mark.parametrize(("name", "limit"), [("README.md", 120), ("docs/a b.md", 200)])
def test_a_page_that_is_too_long_is_told(checkout: Path, name: str, limit: int) -> None:
    text = (checkout / name).read_text()
    rest = limit - len(text.splitlines())
    (checkout / name).write_text(text + "\n" * rest)
    assert problems(checkout) == []
    (checkout / name).write_text(text + "\n" * (rest + 1))
    assert problems(checkout) == [f"{name}: {limit + 1} lines, at most {limit}; move something to another page"]


def test_a_folder_without_git_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
