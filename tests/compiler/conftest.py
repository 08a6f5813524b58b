"""A corpus of made-up sentences, for compilations and tunings of the tiny model."""

import random
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "made"
    folder.mkdir()
    draw = random.Random(0)
    words = ["river", "stone", "cloud", "garden", "window", "paper", "harbour", "lantern", "meadow", "orchard"]
    sentences = (" ".join(draw.choices(words, k=draw.randint(4, 8))).capitalize() for _ in range(1200))
    (folder / "text.txt").write_text(
        "".join(s + (". " if i % 6 else ".\n\n") for i, s in enumerate(sentences, start=1))
    )
    return folder
