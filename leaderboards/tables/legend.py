"""What the columns, marks and flags of a board mean, as lines that stand below it."""

from collections.abc import Sequence

import pandas as pd

from harness.records.spec import OWN
from leaderboards.stats import observing, pareto, ranks, reads, summaries, worst
from leaderboards.stats.aggregate import Table
from leaderboards.stats.bootstrap import FEW, LEVEL, MIN_PAIRS
from leaderboards.stats.eligible import CONTEXTS, LOWEST
from leaderboards.text import MIB

RANKS = (
    "rank: the places among the methods of its budget that the samples leave possible; methods that are not told apart "
    "share places. All pairs, of all budgets and of score and NLL, at once, paired: a wrong claim anywhere on the "
    f"table with a chance of {1 - LEVEL:.0%} (step-down max-t bootstrap over contexts); a cell over its bytes has no "
    f"rank, one that lacks samples is surely above nobody. Nothing is ranked with fewer than {CONTEXTS} contexts in a "
    "task that ranks.",
    f"differences under ... cannot be seen: smaller ones are found with less than {ranks.POWER:.0%}, for the pair of "
    "methods in the middle; a difference that is not found may still be there.",
)
OTHERS = (
    f"over tasks: {LEVEL:.0%} interval of the score with the tasks redrawn too. best other: the best mean of another "
    "name at that budget, chosen on the samples it is compared on, which favours it; Δ as above.",
)
TAILS = (
    f"broken %: of the samples that fullkv answers right (score >= {worst.RIGHT:.0f}) those that the method answers "
    f"wrong, mean over tasks with its {LEVEL:.0%} interval; broken: their number, of how many. NLL worst 10%: mean NLL "
    "of the tenth of each task's samples with the highest NLL, mean over tasks; Δ: less the NLL of fullkv on those "
    "samples.",
)
MEASURED = (
    "TTFT (time to the first token), TPOT (time per output token), tokens/s, peak MiB (above the model's own memory): "
    "each cell by itself in another process on the sample's prompt, batch 1, the first token chosen by the prefill as "
    "when serving, whatever is scored. Means over the n measured samples; cells with another n had other prompts.",
    "front bytes, front TPOT: the Pareto front of score against KV bytes, and against TPOT, over all budgets. *: on "
    "it, told better in score than every cell that may cost no more. =: not told apart from one of those, or lacking "
    "samples. Empty: off it, for a cell that costs no more is told better; or never measured; or the table ranks "
    f"nothing. {LEVEL:.0%} per comparison, not corrected for their number.",
)
STORED = (
    "KV are live bytes: slots that hold a token, with their positions. stored: all that is allocated for them, right "
    "after compression; pictures and the front go by it, and so does the budget: b, more than 1 % over the bytes asked "
    "for, and l, more than 1 % under them, so that equal budgets are equal stored bytes or a row is marked.",
)
READING = (
    "read: bytes of keys and values, or of the codes stored in their place, that attention reads for one decoded token "
    "right after compression, in % of the uncompressed cache; positions are not read. Mean over the decoded tokens "
    "where a method chooses slots for each of them. -: from before it was measured.",
)
OBSERVING = (
    "observe ms: prefill with what the method observes less a plain prefill of the same prompt in the same process, "
    "median over the prompts on which it was measured (observe_n in the CSV). Nothing of compression, which is "
    "compress_s of a record; below 0 by noise alone.",
)
RIVALS = (
    "against the strongest other method: per budget, family and measure, the method within its bytes that has the best "
    "mean of task means, and that is no preset of the subject. It is chosen on the samples it is compared on, which "
    "favours it.",
    "gain: subject against rival on the samples both have, mean of task means, positive where the subject is better, "
    f"with its {LEVEL:.0%} interval by redrawing the family's tasks and the samples within each; too narrow with few "
    "tasks. all families: mean of the families' gains; tasks are redrawn within families, families are not.",
    "verdict: better or worse only where the whole interval is on that side of 0; a subject that is over budget or "
    f"incomplete is not judged, nor is any where a task has fewer than {CONTEXTS} contexts. loss: NLL above that of "
    "fullkv on the same samples; loss ratio: subject's by rival's.",
)
SMALLEST = (
    "smallest cache: measured bytes, in % of fullkv's, with which a method first keeps that share of its score, mean "
    f"over the tasks of a family where fullkv has {LOWEST:g} points or more; between two budgets by interpolation over "
    f"the logarithm of bytes, with the {LEVEL:.0%} interval over contexts where they have names. ≤: the smallest "
    "budget does; >: the largest does not.",
)
VISIBLE = (
    f"smallest visible difference: what a paired comparison of two methods at one budget finds with {ranks.POWER:.0%}, "
    f"by the spread of this table's own pairs, pooled. alone: one comparison at {1 - LEVEL:.0%}, two-sided, not "
    "corrected; in the joint test: at the limit by which all pairs of a table that ranks are told apart. A family is "
    "the mean over its tasks that may rank.",
)
PAIRED = (
    "own: the budget of a method that finds in each prompt how much it keeps. Its row has no rank; its place in the "
    "pictures is the mean of its bytes. =METHOD: the budget of others run at what that one kept: of each prompt the "
    "least one whose bytes are no fewer. Baselines of its row are taken there. Δ: that method less the other one, on "
    f"the samples both have, with its {LEVEL:.0%} interval; not corrected for the number of comparisons.",
)
CLOSED = (
    "closed division: rows whose share of fullkv's score is told to be no less than the floor, by the lower end of its "
    f"{LEVEL:.0%} interval over contexts, which is never nearer to the share than what so many contexts may leave "
    f"unseen; mean over the tasks where fullkv has {LOWEST:g} points or more. In order of bytes at the end of "
    "decoding; within 1 % they share a place. not told: the interval straddles the floor; out: all of it is below. "
    f"Nothing is told with fewer than {CONTEXTS} named contexts in a task.",
)
LONG = (
    "long outputs: of tasks that tell whether an answer ended. length / fullkv: tokens generated, by those of the "
    f"uncompressed cache on the same prompts, with its {LEVEL:.0%} interval; ratio of the means of a task, geometric "
    "mean over tasks; above 1 is longer. ended %: answers that came to their end before the token limit. until error "
    "%, right %: steps right before the first error, and in all. end MiB: stored after the last token. cost / fullkv: "
    "bytes x steps, what is stored at each token summed over all, as a ratio like the length.",
)
RELAY = (
    "relay: another process answers from the cache that it is sent, and from nothing else of the context. sent MiB: "
    "the message, its description included; text MiB: the context as UTF-8. first s: from the sender's cache to the "
    "first token: sent over a pipe of one machine, read, and asked the question (each in the CSV); text first s: of "
    "the same process reading context and question as text. Medians. The sender's own prefill is in neither.",
    "link MiB/s: on a faster link the cache brings the first token before the text does; - where on none. control: "
    "messages of zeros, of those tried, that gave another answer.",
)
SUMMARIES = (
    "averages by protocol: 0-100, mean ± half of its interval. (13 of 16): the mean of the 13 tasks there are, of 16 "
    "that belong to it; (n 180/200): of 180 samples, of 200 that are expected of every method at that budget. Such "
    "a mean is no official score.",
    "LongBench: a category is the mean of its datasets, Avg the mean of the categories (the official README), 16 the "
    "plain mean over the English and code datasets. LongBench-E: mean over datasets, by length in words. RULER: plain "
    "mean of its 13 tasks. By depth: in % of the haystack, 20 belonging to 20-40 and 100 to 80-100.",
    "needle %: needle tokens still cached after compression, mean over layers, KV heads and samples with needles.",
)
BESIDE = (
    "beside the score: the other metrics of a task, 0-100. first - last: position bias, orders kept in the first place "
    "less those kept in the last, in points; more than fullkv's: what compression adds to it, paired by sample.",
)


RARE = {
    "other_samples": "x fewer samples than another budget (its means are over others)",
    "timed_on_fewer": "t timed on fewer prompts than another row",
    "resumed": "r resumed in another environment (see Notes)",
    "uncompiled": "c without what is compiled for this model: less than its name says (see Notes)",
}
"""Flags that are told of where a row has them."""


def _has(rows: pd.DataFrame, flag: str) -> bool:
    return any(flag in flags.split() for flags in rows["flags"])


def how_to_read(tables: Sequence[Table]) -> list[str]:
    """A line for each column, mark and flag that some of the tables have."""
    attrs = tables[0].rows.attrs
    rows, found = [table.rows for table in tables], [table.summaries for table in tables]
    states = max(frame.attrs["state_bytes"] for frame in rows)
    ranked = any(map(ranks.is_ranked, rows))
    return [
        f"score: 0-100, unweighted mean of task means, ± half of its {LEVEL:.0%} interval."
        + (
            " =: may be the best of its budget; *: the best, told apart from every other method within its bytes. Both "
            "by rank."
            if ranked
            else ""
        ),
        f"Δ: paired difference on the samples both have, with its {LEVEL:.0%} interval; fullkv is the uncompressed "
        f"cache, other baselines are taken at the same budget. Without brackets: fewer than {MIN_PAIRS} pairs, or one "
        "in some task. Samples that share a context count once here.",
        f"intervals: percentile bootstrap within tasks, {attrs['resamples']} resamples, seed {attrs['seed']}; "
        "samples that share a context are redrawn together; not corrected for the number of comparisons (ranks are).",
        "NLL: nats per token of the reference answer on the compressed cache, where a task has one; lower is better.",
        "KV: bytes measured right after compression, mean over samples in MiB, and in % of the uncompressed cache."
        + (f" {states / MIB:.2f} MiB of it are states of layers without keys and values." if states else ""),
        *(STORED if any("stored_bytes_mean" in frame for frame in rows) else ()),
        *(READING if any(map(reads.is_read, rows)) else ()),
        *(OBSERVING if any(map(observing.is_observed, rows)) else ()),
        "n: samples scored. first token: whether the first answer token was predicted from the compressed cache, or by "
        "the uncompressed prefill.",
        "flags: i incomplete (others of that budget have samples that this one lacks), s skipped, f failed, o out of "
        f"memory, b over budget in bytes, w fewer than {FEW} contexts in some task (its interval is too narrow), u "
        "some sample does not name its context and counts as one of its own (the interval may be far too narrow)"
        + "".join(f", {words}" for flag, words in RARE.items() if any(_has(frame, flag) for frame in rows))
        + ".",
        *(RANKS if ranked else ()),
        *(OTHERS if any((frame["best_other"] != "").any() for frame in rows) else ()),
        *(SMALLEST if any(len(table.floors) for table in tables) else ()),
        *(PAIRED if any((frame["budget"] == OWN).any() for frame in rows) else ()),
        *(VISIBLE if any(len(table.visible) for table in tables) else ()),
        *(CLOSED if any(len(table.closed) for table in tables) else ()),
        *(LONG if any(len(table.lengths) for table in tables) else ()),
        *(RELAY if any(len(table.relay) for table in tables) else ()),
        *(TAILS if any(map(worst.is_known, rows)) else ()),
        *(MEASURED if any(map(pareto.is_measured, rows)) else ()),
        *(RIVALS if any(len(table.rivals) for table in tables) else ()),
        *(SUMMARIES if any(not summaries.is_beside(frame).all() for frame in found) else ()),
        *(BESIDE if any(summaries.is_beside(frame).any() for frame in found) else ()),
    ]
