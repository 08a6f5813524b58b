"""A folder with a manifest and an append-only log: what runs, benches and boundary searches are stored in.

The manifest says what was asked. It is written before the first line, through a temporary file that replaces it, so it
is whole or absent. The log is JSON lines and only grows: one append is one write, flushed to the disk before it
returns. What a crash can leave is a last line without its newline: a writer cuts it off, a reader ignores it, both say
so. Of several lines with one key the last wins. One process writes at a time (`flock`, which the kernel drops with the
process). No torch here: leaderboards read through this module.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from harness.errors import HarnessError
from harness.records import atomic_files as disk
from harness.records.changes import changes
from harness.records.log_layout import LogLayout, M, R, key_of
from harness.records.spec import Frozen

S = TypeVar("S")
END_CHARS = 500  # characters of the error in a manifest
log = logging.getLogger("harness")


@dataclass(frozen=True)
class Resume(Generic[S]):
    """How a folder that is there is gone on with.

    anyway: also where code, packages or machine are others than those of its first session. elsewhere: other machines
    make the records, which say which one did. left: whether anything is left to do, by what is stored; a folder with
    nothing left stays as it is.
    """

    anyway: bool = False
    elsewhere: bool = False
    left: Callable[[S], bool] = lambda _: True


class LogFolder(ABC, Generic[M, R]):
    """The one writer of a folder; close it or use it as a context."""

    changes: tuple[str, ...] = ()
    """Since the folder's first session, as every new record says."""

    def __init__(self, layout: LogLayout[M, R], folder: Path, manifest: M, resume: Resume[Any] | None = None) -> None:
        """Create or resume `folder`.

        Raises HarnessError when the folder cannot be written, another process writes to it, it holds something else,
        was made by other code or elsewhere, or a line before the last is damaged. Nothing is changed in these cases.
        """
        self.layout, self.folder, self.manifest = layout, folder, manifest
        self._path, self._intact, self._how, self._complete = folder / layout.records_file, 0, resume or Resume(), False
        stated, given = layout.ids(manifest)
        if stated != given:
            raise HarnessError(f"{layout.kind} id {stated} is not the id of its spec, {given}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = disk.lock_folder(folder)
        except OSError as error:
            raise disk.write_error(folder, error) from None
        except ValueError as error:  # a NUL in its name; refusals are ValueErrors too
            raise HarnessError(str(error)) from None
        with ExitStack() as undo:
            undo.callback(self.close)
            self._resume()
            undo.pop_all()

    @abstractmethod
    def _note(self, record: R) -> None:
        """Remember a stored record; called in the order of the log."""

    def append(self, records: Sequence[R]) -> None:
        """Store records in one write, with what changed since the first session; on return they are on the disk.

        Raises HarnessError when a record belongs to another folder, and when the disk is full or fails: the log is then
        cut back to what it was before this call.
        """
        records = [self._marked(record) for record in records]
        disk.append(self._path, self._lines(records), intact=self._intact)
        self._intact += len(records)
        for record in records:
            self._note(record)

    def _replace(self, records: Sequence[R]) -> None:
        """Replace the whole log in one step. Raises HarnessError when it cannot be written."""
        disk.write_bytes(self._path, self._lines(records))
        self._intact = len(records)

    def finish(self, status: str, *, finished: str, **more: object) -> None:
        """Rewrite a manifest that has a status with how the work ended, and with `more` of its fields.

        That of a folder in which nothing was left to do is finished at most.
        """
        if self._complete and (status != "finished" or self.manifest.model_dump()["status"] == "finished"):
            return
        ended = {**self.manifest.model_dump(), "status": status, "finished": finished, **more}
        self.manifest = type(self.manifest).model_validate(ended)
        self._write_manifest()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Let the manifest say how the work inside ended, whatever ended it."""
        try:
            yield
        except KeyboardInterrupt:
            with suppress(HarnessError):  # what ended the work is told, not that its end cannot be written
                self.finish("interrupted", finished=now())
            raise
        except BaseException as error:  # raised again: what ended the work only has to be told
            told = {"error": " ".join(str(error).split())[:END_CHARS]}
            with suppress(HarnessError):
                self.finish("failed", finished=now(), **(told if "error" in self.layout.manifest.model_fields else {}))
            raise
        self.finish("finished", finished=now())

    def close(self) -> None:
        if self._lock >= 0:
            disk.unlock_folder(self._lock)
        self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_same(self, earlier: M) -> None:
        """Raises HarnessError when the folder was made for something else than is asked for now."""
        if self.layout.ids(earlier) != self.layout.ids(self.manifest):
            kind = self.layout.kind
            raise HarnessError(f"{self.folder} holds a {kind} of another spec; move it away or choose another folder")

    def _resume(self) -> None:
        earlier = None
        if (self.folder / self.layout.manifest_file).exists():
            earlier = self.layout.read_manifest(self.folder)
            self._check_same(earlier)
        elif next(disk.whole_lines(self._path, quiet=True), None) is not None:
            missing = f"{self._path} has records but {self.layout.manifest_file} is missing"
            raise HarnessError(f"{missing}; restore it or move the folder away")
        lines, own = disk.whole_lines(self._path, quiet=True), self.layout.ids(self.manifest)[0]
        for record in self.layout.parse(self._path, lines, owner=own):
            self._note(record)
            self._intact += 1
        if earlier is not None:
            self.changes = self._changes(earlier)
            since = f"since it was begun: {'; '.join(self.changes)}"
            if not self._how.left(self):
                if self.changes:
                    log.warning("%s has nothing left to do and stays as it is, although %s", self.folder, since)
                self.manifest, self._complete = earlier, True
                return
            if self.changes and not self._how.anyway:
                advice = "add --resume-anyway to go on with it (its new records say so), or choose another --out"
                raise HarnessError(f"{self.folder} would hold two kinds of records; {since}; {advice}")
            self._keep(earlier)
        self._write_manifest()
        disk.cut(self._path)
        disk.append(self._path, b"", intact=self._intact)  # a log that cannot be written is refused before any work

    def _changes(self, earlier: M) -> tuple[str, ...]:
        """What decides numbers and is another now than in the first session."""
        kept = self._kept()
        first: Any = self.layout.read_manifest(self.folder, kept[min(kept)].name) if kept else earlier
        this: Any = self.manifest
        return changes(first, this, device=self.layout.device(this), elsewhere=self._how.elsewhere)

    def _kept(self) -> dict[int, Path]:
        """The manifests of earlier sessions, by their numbers."""
        stem = self.layout.manifest_file.removesuffix(".json")
        numbered = ((path.name.removeprefix(f"{stem}.")[:-5], path) for path in self.folder.glob(f"{stem}.*.json"))
        return {int(number): path for number, path in numbered if number.isascii() and number.isdecimal()}

    def _keep(self, earlier: M) -> None:
        """Where only the environment changed, the earlier manifest is kept beside the new."""
        fields = set(self.layout.environment)
        old, new = (manifest.model_dump(mode="json", include=fields) for manifest in (earlier, self.manifest))
        changed = [name for name in new if old[name] != new[name]]
        if changed:
            stem, number = self.layout.manifest_file.removesuffix(".json"), max(self._kept(), default=0) + 1
            kept = self.folder / f"{stem}.{number}.json"
            disk.write_text(kept, earlier.model_dump_json(indent=2) + "\n")
            told = "%s: resumed with another commit or environment (%s); the earlier one is in %s"
            log.warning(told, self.folder, ", ".join(changed), kept)

    def _marked(self, record: R) -> R:
        return record.model_copy(update={"environment_changes": self.changes}) if self.changes else record

    def _write_manifest(self) -> None:
        disk.write_text(self.folder / self.layout.manifest_file, self.manifest.model_dump_json(indent=2) + "\n")

    def _lines(self, records: Sequence[R]) -> bytes:
        own = self.layout.ids(self.manifest)[0]
        for record in records:
            if (other := self.layout.owner(record)) != own:
                kind = self.layout.kind
                raise HarnessError(f"record {key_of(record)} belongs to {kind} {other}, this is {own}")
        return b"".join(map(to_line, records))


def to_line(record: Frozen) -> bytes:
    """Write a record as its line of a log: ASCII, so that there is no line break but the last."""
    return json.dumps(record.model_dump(mode="json"), separators=(",", ":")).encode() + b"\n"


def now() -> str:
    """Return the time as manifests hold it: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
