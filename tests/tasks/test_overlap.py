"""What prompts have in common: how it is counted, and that no two of a board file share a tenth."""

from dataclasses import replace

import pytest

from harness.models.assets import asset_folder
from tasks.base import Sample
from tests.overlap import RUN, board_prompts, boards, overlaps, prompt

WORDS = [f"word{number}" for number in range(100)]


def sample(context: str, group: str = "a", **meta: object) -> Sample:
    return Sample(
        id=group, context=context, question="Which?", answers=("x",), max_new_tokens=1, meta={"group": group, **meta}
    )


def test_shared_runs_are_counted_over_the_shorter_prompt() -> None:
    one, other = " ".join(WORDS[:40]), " ".join(WORDS[30:])
    (found,) = overlaps([prompt("t", sample(one)), prompt("t", sample(other, "b"))])
    assert found.share == (10 - RUN + 1) / (40 - RUN + 1) and {found.first, found.second} == {"t a", "t b"}


def test_needles_the_question_and_dots_are_left_out_and_so_is_a_context_of_ones_own() -> None:
    needle, asked = " ".join(WORDS[:20]), " ".join(WORDS[20:40])
    texts = [f"{' '.join(f'{name}{number} ...' for number in range(40))} {needle} {asked}" for name in "ab"]
    samples = [replace(sample(text, text[0], needles=[needle]), question=asked) for text in texts]
    assert overlaps([prompt("t", one) for one in samples]) == []
    assert len(overlaps([prompt("t", sample(text, text[0])) for text in texts])) == 1
    assert overlaps([prompt("t", sample(text)) for text in texts]) == []


def test_no_two_prompts_of_a_board_share_a_tenth_of_their_text() -> None:
    for name in ("essays", "awsdocs"):
        if not asset_folder(name).is_dir():
            pytest.skip(f"{name} is not in the cache; run `harness fetch {name}`")
    assert len(boards()) >= 5
    for board in boards():
        prompts = [*board_prompts(board, "drawn")]
        groups: dict[str, set[str]] = {}
        for one in prompts:
            groups.setdefault(one.name.split()[0], set()).add(one.group)
        assert min(map(len, groups.values())) >= 20
        assert all(found.share < 0.1 for found in overlaps(prompts)[:1]), board


def test_the_haystacks_that_protocols_fix_are_seen() -> None:
    if not asset_folder("essays").is_dir():
        pytest.skip("essays is not in the cache; run `harness fetch essays`")
    assert overlaps([*board_prompts("nightly", "protocol")])[0].share > 0.9
