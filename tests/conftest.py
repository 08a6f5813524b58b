"""Fixtures of the whole suite. Tests run offline, on CPU unless marked `gpu`, with one thread and fixed seeds."""

import os
import random
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():  # Triton's kernels run in its interpreter where there is no GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before torch imports triton

import hypothesis
import numpy as np
import pytest
import torch

from harness.models.assets import asset_folder
from harness.models.load import LoadedModel, load_model
from tests import hostile, tiny_run

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# the suite tries the same examples each time; `make hostile` more, and others each time
hypothesis.settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("many", max_examples=150, deadline=None)
hypothesis.settings.load_profile("suite")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if hostile.TALLY:
        terminalreporter.write_line("\n".join(hostile.table()))


def pytest_configure() -> None:
    torch.set_num_threads(1)  # tiny models; more threads only wait for each other


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("xdist_group"):  # what a file makes for its tests is made once
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    """The tiny random Llama in float32 on CPU. Shared: leave it as it is."""
    return load_model("tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The packaged real model in float32 on CPU; skips when it was never fetched."""
    if not asset_folder("smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not in the cache; run `harness fetch smollm2-135m`")
    return load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real rows of LongBench, RULER's sources and prose; skips without it."""
    folder = Path(os.environ.get("KVH_TEST_DATA", DATA))
    if not folder.is_dir():
        pytest.skip("no test data; set KVH_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run of `tests.tiny_run`. Shared: only read it; see `results`."""
    root = tmp_path_factory.mktemp("finished")
    assert tiny_run.call(*tiny_run.RUN, "--out", root) == 0
    return root


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boards without their picture, which takes twice as long as a run of the tiny model."""
    monkeypatch.setattr("leaderboards.tables.picture.write_picture", lambda tables, out, name: out / f"{name}.svg")
