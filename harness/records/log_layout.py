"""How a folder with a manifest and a log is read: what it holds, and how its files are checked.

Damage of any kind is a HarnessError of one line with the file, the line and what to do about it.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from harness.errors import HarnessError, shown
from harness.records import atomic_files as disk
from harness.records.plain_files import parse_json, read_plain, refused
from harness.records.spec import Frozen

AnyFrozen = TypeVar("AnyFrozen", bound=Frozen)
M = TypeVar("M", bound=Frozen)
R = TypeVar("R", bound=Frozen)
key_of: Callable[[Frozen], Hashable] = attrgetter("key")
version_of: Callable[[Frozen], int] = attrgetter("schema_version")


@dataclass(frozen=True)
class LogLayout(Generic[M, R]):
    """What a folder of one kind holds."""

    kind: str  # the command that writes it is `harness KIND`
    manifest_file: str
    records_file: str
    manifest: type[M]
    record: type[R]  # has a property `key`; of several records with one key the last counts
    ids: Callable[[M], tuple[str, str]] = lambda _: ("", "")  # that a manifest states, and that its contents give
    owner: Callable[[R], str] = lambda _: ""  # the id that a record states
    environment: tuple[str, ...] = ("git_commit", "versions", "sources")  # where it changed, the earlier one is kept
    device: Callable[[M], str] = lambda _: "cpu"  # that a manifest's numbers are made on

    def find(self, root: Path) -> list[Path]:
        """The folders below `root` in name order, or `root` itself when it is one. Raises HarnessError for none."""
        try:
            if (root / self.manifest_file).exists():
                return [root]
            found = sorted(path.parent for path in root.glob(f"*/{self.manifest_file}"))
        except (OSError, ValueError) as error:  # a name that is too long, or has a NUL
            told = error.strerror if isinstance(error, OSError) else error
            raise HarnessError(f"cannot read {shown(str(root))}: {told}; give another folder") from None
        if not found:
            missing = f"no {self.kind} in {root}: no folder there holds a {self.manifest_file}"
            raise HarnessError(f"{missing}; run `harness {self.kind}` first")
        return found

    def load(self, folder: Path) -> tuple[M, list[R]]:
        """Read a folder as stored: of each key the last record, in order of first appearance.

        An unfinished last line is ignored with a warning. Raises HarnessError for a missing manifest and other damage.
        """
        manifest = self.read_manifest(folder)
        return manifest, list({key_of(record): record for record in self.records(folder, manifest)}.values())

    def read_manifest(self, folder: Path, name: str = "") -> M:
        """Read the manifest of a folder, or the one of an earlier session that was kept there under `name`.

        Raises HarnessError when it is missing, damaged or was edited.
        """
        path = folder / (name or self.manifest_file)
        ask = f"is this a {self.kind} folder? If there is none, run `harness {self.kind}` first"
        data = read_plain(path, remedy=ask)
        manifest = _validate(self.manifest, data, where=str(path), remedy="restore it or move the folder away")
        stated, given = self.ids(manifest)
        if stated != given:
            raise HarnessError(f"{path} was edited: its id is {stated}, but its contents give {given}")
        return manifest

    def records(self, folder: Path, manifest: M) -> Iterator[R]:
        """Read the records of a folder one by one, all that there are of a key. Raises HarnessError as `parse` does."""
        path = folder / self.records_file
        return self.parse(path, disk.whole_lines(path), owner=self.ids(manifest)[0])

    def parse(self, path: Path, lines: Iterable[bytes], *, owner: str) -> Iterator[R]:
        """Read the records of `lines`. Raises HarnessError for a damaged one, or one of another folder than `owner`."""
        current = b'{"schema_version":%d,' % _version(self.record)
        for number, line in enumerate(lines, start=1):
            record = _quick(self.record, line) if line.startswith(current) else None
            if record is None:  # the slow way says why, or reads what another writer wrote
                where, remedy = f"{path}:{number}", "remove that line to run it again"
                record = _validate(self.record, line, where=where, remedy=remedy)
            if (stated := self.owner(record)) != owner:
                raise HarnessError(f"{path}:{number} belongs to {self.kind} {stated}, not {owner}; remove that line")
            yield record


def _quick(kind: type[AnyFrozen], line: bytes) -> AnyFrozen | None:
    """Parse a line that begins as this version writes it; None for a damaged one."""
    try:
        record = kind.model_validate_json(line)
    except ValidationError:
        return None
    return record if version_of(record) == _version(kind) else None


def _version(kind: type[Frozen]) -> int:
    version: int = kind.model_fields["schema_version"].default
    return version


def _validate(kind: type[AnyFrozen], data: bytes, *, where: str, remedy: str) -> AnyFrozen:
    current = _version(kind)
    raw: Any = parse_json(data, where=where, remedy=remedy)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version == current or (version is None and isinstance(raw, dict)):
        try:
            found = kind.model_validate(raw)
        except ValidationError as error:
            raise refused(error, where=where, remedy=remedy) from None
    if version != current:
        raise HarnessError(
            f"{where} has schema_version {shown(version)}, this version reads {current}; "
            "read it with the version that wrote it, or run again into another folder"
        )
    return found
