"""What a compilation has done so far: one JSON line a roll-out, and the state of every estimate.

`compile.json` says what the folder belongs to; another specification in the same folder is refused.
"""

import json
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, Self, TypeVar

import torch

from harness.errors import HarnessError
from harness.records.atomic_files import append, cut, whole_lines, write_text

ROLLOUTS, IDENTITY = "rollouts.jsonl", "compile.json"


class Estimate(Protocol):
    """What is found step by step. state: what `at` goes on from, tensors, numbers and lists."""

    def state(self) -> dict[str, Any]: ...

    def at(self, state: dict[str, Any]) -> Self: ...


Kind = TypeVar("Kind", bound=Estimate)


class SavedState:
    """Reads and writes the folder of one compilation. found: values by stage and prompt.

    identity: everything that decides the numbers, JSON values. Raises HarnessError when the folder belongs to another
    compilation, or is damaged.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.found: dict[tuple[str, str], Any] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HarnessError(f"cannot create {folder}: {error.strerror}; choose another folder") from None
        path, text = folder / IDENTITY, json.dumps(identity, indent=2, sort_keys=True) + "\n"
        if not path.is_file():
            write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise HarnessError(f"{folder} holds another compilation (see {path.name}); choose another --out")
        self._read(folder / ROLLOUTS)

    def add(self, stage: str, prompt: str, values: Any) -> None:
        """Store one roll-out; on return it is on the disk."""
        line = json.dumps({"stage": stage, "prompt": prompt, "values": values}, separators=(",", ":"))
        append(self.folder / ROLLOUTS, f"{line}\n".encode())
        self.found[stage, prompt] = values

    def keep(self, name: str, descent: Estimate) -> None:
        """Store the state of an estimate in one step."""
        path = self.folder / f"{name}.state"
        part = path.with_suffix(".part")
        torch.save(descent.state(), part)
        os.replace(part, path)

    def restore(self, name: str, fresh: Kind) -> Kind:
        """Return the estimate as it was kept last, or `fresh`. Raises HarnessError when it cannot be read."""
        path = self.folder / f"{name}.state"
        if not path.is_file():
            return fresh
        try:
            return fresh.at(torch.load(path, weights_only=True))
        except (OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError, UnpicklingError) as error:
            reason = " ".join(str(error).split())[:120]
            raise HarnessError(f"{path} is damaged ({reason}); delete it and repeat the command") from None

    def _read(self, path: Path) -> None:
        for number, line in enumerate(whole_lines(path, quiet=True), start=1):
            try:
                entry = json.loads(line)
                self.found[entry["stage"], entry["prompt"]] = entry["values"]
            except (ValueError, KeyError, TypeError, RecursionError):
                advice = "delete that line and repeat the command"
                raise HarnessError(f"{path} line {number} is damaged; {advice}") from None
        cut(path)
