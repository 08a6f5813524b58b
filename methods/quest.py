"""Quest: keep every token, and let each decoded one read only the pages that its query may find most in.

Source: Quest, https://arxiv.org/abs/2406.10774, with its pages of 16 tokens and its first two layers read whole
(quest_attention.py:84 at Quest 01c1623). Of each page the lowest and highest number of every key channel are stored:
sum_d max(q_d low_d, q_d high_d) bounds the product of a query with the page's keys. Each query head reads the pages
whose bound is highest: a budget of N tokens is N // 16 pages, 3 at least (quest_attention.py:56). Tokens that come join
the last page. Nothing is given up: a budget is of tokens read, not of bytes stored, and its rows stand at `read N`.
Differences: the last page is always read and one of the N // 16, as in their kernels (controller.py:14 at Quest
01c1623); in their evaluation it competes. Query heads that share a KV head choose apart, as in their evaluation, so
that up to G x N tokens of a KV head are read; the record has the mean. `@shared` reads the same ones for all of them,
chosen by the highest bound. Bounds are compared in float32. Slots that are not chosen are masked: bytes read are
counted, and time is not saved. A budget of the whole prompt, or more, is that of the full cache.
"""

from dataclasses import dataclass
from typing import ClassVar

from methods.base import KV, LayerPolicy, LayerView, Sizes, at_least
from methods.pages import Pages, paged
from methods.registry import method


@method(
    "quest",
    paper="https://arxiv.org/abs/2406.10774",
    code="https://github.com/mit-han-lab/Quest at 01c1623",
    presets={"shared": {"shared": True}},
)
@dataclass(frozen=True)
class Quest(LayerPolicy):
    """All tokens stay; a decoded one reads the pages of highest bound."""

    reads_a_part: ClassVar[bool] = True

    page: int = 16
    least: int = 3
    skip: int = 2
    shared: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "page", "least")
        at_least(self, 0, "skip")

    def compress_layer(self, view: LayerView, budget: int) -> KV:
        if view.index < self.skip:
            return view.kv
        return paged(view.kv, Pages(self.page, max(self.least, budget // self.page), self.shared))

    def notes(self, budget: int, sizes: Sizes) -> tuple[str, ...]:
        if budget >= self.least * self.page:
            return ()
        return (f"reads {self.least} pages of {self.page} tokens, more than its budget of {budget}",)
