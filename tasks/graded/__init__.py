"""Tasks of our own whose difficulty has a dial, so that a model's full cache is neither always right nor always wrong.

    retrieval, keys   one fact among others like it; several facts
    tracking          what is true after several steps
    ordering          what came first, last, next, and in which order
    aggregation       what many statements say together
    copying           a marked list, word for word

`harness calibrate-tasks` finds the setting of each dial for a model (`tasks.graded.settings`).
"""

from tasks.base import task
from tasks.graded import lists, retrieval, steps
from tasks.graded.family import GradedTask

for _kind in (*retrieval.KINDS, *steps.KINDS, *lists.KINDS):
    task(GradedTask(_kind))
