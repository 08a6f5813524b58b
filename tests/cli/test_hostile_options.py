"""Every option of every command, handed what it cannot mean. What is typed is read before anything is done."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from harness.cli.parser import COMMANDS, command_line
from tests.hostile import tried_command

pytestmark = pytest.mark.hostile

ANY = ("", " ", "a\0b", "\udcff", "\x1b[31mred", "x" * 200_000)
NO_NUMBER = (*ANY, "x", "1e3", "+5", "1_000", "٣", "５", "0x10", "10" * 500, "None", "--", "1;2", "½", "𝟙")
KINDS = {
    "whole": (*NO_NUMBER, "1.5", "nan", "inf", "1e999", str(10**30), str(-(10**30)), "-inf", "1,000"),
    "threads": (*NO_NUMBER, "1.5", "nan", "0", "-1", "5000", "100000", str(10**17), str(10**30)),
    "real": (*(text for text in NO_NUMBER if text != "1e3" and text != "+5"), "nan", "-nan", "inf", "1e999", "0.5.5"),
    "numbers": (*NO_NUMBER, ",", "1,x", "1.5", "1,,nan", "1e999", "1," + str(10**30)),
    "names": ("", " ", ",", " , ,", "a\0b", "\udcff"),
    "place": (
        *(text for text in ANY if text != "\x1b[31mred"),
        "a/" + "x" * 256,
        "x/" * 2100,
        "~nobody-here/x",
        "$NOT_SET_HERE/x",
    ),
}
"""What each type must refuse by itself."""
PLAIN = ("\0", "\udcff")
"""What no word of a command line can be."""
FIRST = {"list": ["methods"], "data": ["fetch", "longbench"]}


def options(command: str) -> Iterator[tuple[list[str], argparse.Action]]:
    """The words before an option and the option, of each option and argument of a command."""
    parser = command_line()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    with contextlib.suppress(SystemExit):  # options of a command are added as it is parsed
        commands.choices[command].parse_known_args([])
    yield from _options(commands.choices[command], [command])


def _options(parser: argparse.ArgumentParser, before: list[str]) -> Iterator[tuple[list[str], argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, own in action.choices.items():
                yield from _options(own, [*before, verb])
        elif action.nargs != 0:
            yield before, action


def kind_of(action: argparse.Action) -> str:
    return "choices" if action.choices else getattr(action.type, "__name__", "text")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "lm-eval"])
def test_every_option_refuses_what_it_cannot_mean(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    step = 1 if hypothesis.settings().max_examples > 25 else 25  # the suite tries some of each
    for number, (before, action) in enumerate(options(command)):
        values = KINDS.get(kind_of(action), (*ANY, "nope") if action.choices else PLAIN)
        for value in values[number % min(step, len(values)) :: step]:
            word = f"{action.option_strings[-1]}={value}" if action.option_strings else value
            words = [*before, word] if action.option_strings else [*before, "--", value]
            line = tried_command(f"options of type {kind_of(action)}", *words)
            assert len(line) < 700, line
    assert not list(tmp_path.iterdir())


def test_no_option_reads_numbers_paths_or_lists_in_a_way_of_its_own() -> None:
    found = {kind_of(action) for command in COMMANDS for _, action in options(command)}
    assert found <= {*KINDS, "choices", "text"}


@pytest.mark.parametrize(
    "words", [("nope",), ("x" * 100_000,), ("run", "--nope" * 1000), ("run", "\x1b[31m"), ("",), ()]
)
def test_unknown_commands_and_options_are_one_line(words: tuple[str, ...]) -> None:
    tried_command("unknown words", *words)
