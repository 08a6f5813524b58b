"""Long outputs: work of many steps, whose answers of 256 to 1,024 tokens are decoded on a compressed cache.

    long/table     a table by the rule of another one
    long/list      a list, entry by entry
    long/sums      apples that people bring, and how many there are after each
    long/state     a box that is carried about, and where it is after each step

After "Rethinking Key-Value Cache Compression Techniques" (MLSys 2025), which found that outputs get longer, and "Hold
Onto That Thought" (https://arxiv.org/abs/2512.12008), that they go wrong; wordings, rules and scores are our own.
"""

from tasks.base import task
from tasks.long.family import LongTask
from tasks.long.kinds import KINDS

for kind in KINDS:
    task(LongTask(kind))
