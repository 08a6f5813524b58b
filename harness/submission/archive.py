"""The archive of a run that someone hands in: `harness submit` writes it, `harness verify` reads it.

A zip with `index.json` (names, sizes and checksums of the rest), `run.json`, the manifests kept of earlier sessions
(`run.N.json`) and `records.jsonl`. Equal runs give equal bytes: order, times and modes are fixed, and of several lines
with one key only the last is packed. Paths of the command are cut to their last name: the machine they are on is
nobody's business. References may be left out where the data must not be handed on; such a pack makes its board again,
but its scores cannot be recomputed from it.

An archive is not trusted. It is read from memory-bounded streams and nothing is ever unpacked to the disk. Its
directory is at most `DIRECTORY` bytes at the very end of the file, so there are few members and no second archive
around it; a member has one of the names above, once, is a plain file, and has the size and sha256 that the index says.
Everything is JSON text: a pickle, or an archive inside the archive, is refused before it is parsed.
"""

import hashlib
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from pydantic import Field, ValidationError

from harness import __version__
from harness.errors import HarnessError
from harness.records.atomic_files import write_bytes
from harness.records.log_folder import to_line
from harness.records.plain_files import read_plain, refused
from harness.records.ranges import Bytes, Label, Sha256
from harness.records.record import RunManifest
from harness.records.run_folder import RUNS, load_run
from harness.records.spec import SCHEMA_VERSION, Frozen

INDEX = "index.json"
MANIFEST = RUNS.manifest_file
RECORDS = RUNS.records_file
KEPT = re.compile(r"run\.([1-9][0-9]{0,3})\.json")
MEMBERS = 64
DIRECTORY = 16 << 10  # bytes
SMALL = 4 << 20  # bytes of a JSON member
LARGE = 128 << 20  # bytes of all members
LINE = 1 << 20  # bytes of one record
RECORDS_AT_MOST = 50_000
CELLS_AT_MOST = 10_000  # methods x budgets
CHUNK = 1 << 20
END = struct.Struct("<4s4H2LH")  # what a zip ends with, where it has no comment
UNSOUND = (
    BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
)
"""What a zip that was damaged makes its reader raise."""
WHEN = (1980, 1, 1, 0, 0, 0)


class PackedFile(Frozen):
    """A member of the archive, with the bytes of its contents and their sha256 in hex."""

    name: Label
    size: Bytes
    sha256: Sha256


class Index(Frozen):
    """index.json: what else is in the archive.

    harness: the version that packed it. partial: whether the run may lack records. references: whether the records have
    theirs.
    """

    kind: Literal["kv-policy-harness submission"] = "kv-policy-harness submission"
    schema_version: int = SCHEMA_VERSION
    harness: Label = __version__
    run_id: Label
    partial: bool = False
    references: bool = True
    files: Annotated[tuple[PackedFile, ...], Field(max_length=MEMBERS)]


def pack_run(folder: Path, out: Path, *, partial: bool = False, references: bool = True) -> Index:
    """Write the archive of a run to the file `out`. partial: also of a run that is not whole.

    Raises HarnessError for a damaged run, one that is not whole, or a file that cannot be written.
    """
    manifest, records = load_run(folder)
    wanted = manifest.samples * manifest.cells
    if not partial and (manifest.status != "finished" or len(records) != wanted):
        raise HarnessError(
            f"{folder} is {manifest.status} with {len(records)} of {wanted} cells; "
            "repeat its command to finish it, or pass --partial"
        )
    if not references:
        records = [record.model_copy(update={"answers": (), "prompt_tail": ""}) for record in records]
    members = {MANIFEST: _packed(manifest), **_kept(folder, manifest), RECORDS: b"".join(map(to_line, records))}
    size = sum(map(len, members.values()))
    if size > LARGE or len(members) >= MEMBERS or len(records) > RECORDS_AT_MOST:
        most = f"{LARGE >> 20} MiB in {MEMBERS} files and {RECORDS_AT_MOST:,} records"
        raise HarnessError(
            f"{folder} has {len(records):,} records of {size:,} bytes, more than {most}; make smaller runs"
        )
    files = tuple(
        PackedFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in members.items()
    )
    index = Index(run_id=manifest.run_id, partial=partial, references=references, files=files)
    write_bytes(out, zipped({INDEX: (index.model_dump_json(indent=2) + "\n").encode(), **members}))
    return index


def zipped(members: Mapping[str, bytes]) -> bytes:
    """Pack files into a zip in the order given, with fixed times and modes."""
    buffer = BytesIO()
    with ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            info = ZipInfo(name, WHEN)
            info.compress_type, info.create_system, info.external_attr = ZIP_DEFLATED, 3, (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, data, compresslevel=9)
    return buffer.getvalue()


def _kept(folder: Path, manifest: RunManifest) -> dict[str, bytes]:
    """The manifests that were kept of earlier sessions, the earliest first."""
    numbers = sorted(int(match[1]) for path in folder.iterdir() if (match := KEPT.fullmatch(path.name)))
    kept = {name: RUNS.read_manifest(folder, name) for name in (f"run.{number}.json" for number in numbers)}
    for name, earlier in kept.items():
        if earlier.spec.run_id != manifest.run_id:
            raise HarnessError(f"{folder / name} is of run {earlier.spec.run_id}, not {manifest.run_id}; move it away")
    return {name: _packed(earlier) for name, earlier in kept.items()}


def _packed(manifest: RunManifest) -> bytes:
    """A manifest with its command's paths cut to their last name."""
    command = tuple(Path(word).name if Path(word).is_absolute() else word for word in manifest.command)
    return (manifest.model_copy(update={"command": command}).model_dump_json(indent=2) + "\n").encode()


@dataclass(frozen=True)
class Pack:
    """An archive that was found sound: its members are those of the index, byte for byte."""

    index: Index
    archive: ZipFile

    @property
    def manifests(self) -> list[str]:
        """Names of the kept manifests."""
        return [file.name for file in self.index.files if KEPT.fullmatch(file.name)]

    def read(self, name: str) -> bytes:
        """Read a member of at most `SMALL` bytes."""
        return b"".join(_chunks(self.archive, name))

    def lines(self) -> Iterator[bytes]:
        """Read the lines of the records. Raises HarnessError for one of more than `LINE` bytes."""
        with self.archive.open(RECORDS) as stream:
            while line := stream.readline(LINE + 1):
                if len(line) > LINE:
                    raise HarnessError(f"bad archive: a line of {RECORDS} has more than {LINE >> 20} MiB")
                yield line.rstrip(b"\n")


@contextmanager
def open_pack(path: Path) -> Iterator[Pack]:
    """Open and check an archive. Raises HarnessError, in one line, for one that is not what `pack_run` writes."""
    with ExitStack() as stack:
        try:
            data = read_plain(path, most=LARGE, remedy="name an archive of `harness submit`")
            _check_end(data[-END.size :], len(data))
            archive = stack.enter_context(ZipFile(BytesIO(data)))
            index = _checked(archive)
        except HarnessError:
            raise
        except UNSOUND as error:
            raise HarnessError(f"bad archive: {path.name} is no sound zip ({error}); ask for another copy") from None
        yield Pack(index, archive)


def _check_end(end: bytes, size: int) -> None:
    """Refuse many members, an archive around or inside of which there is another, and a comment."""
    if len(end) != END.size or not end.startswith(b"PK\5\6"):
        raise HarnessError("bad archive: it does not end as a zip without a comment does; use `harness submit`")
    _, _, _, _, members, directory, offset, _ = END.unpack(end)
    if members > MEMBERS or directory > DIRECTORY:
        raise HarnessError(f"bad archive: it has {members} members, at most {MEMBERS} are allowed")
    if offset + directory + END.size != size:
        raise HarnessError("bad archive: there is something before or behind its members; use `harness submit`")


def _checked(archive: ZipFile) -> Index:
    """Read the index, once all members are sound and as it says."""
    infos = archive.infolist()
    for info in infos:
        _check_member(info)
    names = [info.filename for info in infos]
    if len(set(names)) < len(names):
        raise HarnessError("bad archive: a name is there twice")
    if sum(info.file_size for info in infos) > LARGE:
        raise HarnessError(f"bad archive: it unpacks to more than {LARGE >> 20} MiB")
    if missing := {INDEX, MANIFEST, RECORDS} - set(names):
        raise HarnessError(f"bad archive: it lacks {', '.join(sorted(missing))}; use `harness submit`")
    try:
        index = Index.model_validate_json(b"".join(_chunks(archive, INDEX)))
    except ValidationError as error:
        raise refused(error, where=f"bad archive: {INDEX}", remedy="use `harness submit`") from None
    listed = [file.name for file in index.files]
    if sorted(listed) != sorted(set(names) - {INDEX}):
        raise HarnessError(f"bad archive: {INDEX} lists {ascii(listed)[:200]}, there are {names}")
    for file in index.files:
        _check_contents(archive, file)
    return index


def _check_member(info: ZipInfo) -> None:
    name = info.orig_filename
    shown, mode = ascii(name)[:80], info.external_attr >> 16
    if name.startswith(("/", "\\")) or ".." in name or ":" in name or "\\" in name:
        raise HarnessError(f"bad archive: {shown} leaves the archive's folder")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG) or info.is_dir():
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no plain file"
        raise HarnessError(f"bad archive: {shown} is {kind}")
    if name not in (INDEX, MANIFEST, RECORDS) and not KEPT.fullmatch(name):
        raise HarnessError(f"bad archive: {shown} is no file of a run")
    if info.flag_bits & 1 or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise HarnessError(f"bad archive: {shown} is encrypted or packed in an unusual way")
    if info.file_size > _most(name):
        raise HarnessError(f"bad archive: {shown} unpacks to {info.file_size} bytes, at most {_most(name)} are allowed")


def _most(name: str) -> int:
    return LARGE if name == RECORDS else SMALL


def _chunks(archive: ZipFile, name: str) -> Iterator[bytes]:
    """A member in pieces, whatever size it declares. Raises HarnessError when it is too large or no JSON text."""
    done = 0
    with archive.open(name) as stream:
        while chunk := stream.read(CHUNK):
            if not done and not chunk.startswith(b"{"):
                raise HarnessError(f"bad archive: {name} is not JSON")
            done += len(chunk)
            if done > _most(name):
                raise HarnessError(f"bad archive: {name} unpacks to more than {_most(name)} bytes")
            yield chunk


def _check_contents(archive: ZipFile, file: PackedFile) -> None:
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(archive, file.name):
        digest.update(chunk)
        size += len(chunk)
    if (size, digest.hexdigest()) != (file.size, file.sha256):
        raise HarnessError(f"bad archive: {file.name} was changed after it was packed (size or sha256 differ)")
