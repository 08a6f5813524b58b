"""`python -m tests.architectures [TYPE ...]` runs every architecture, or some, and prints a row for each.

`--write` writes docs/architectures.md, of all of them.
"""

import argparse
import sys

import torch
import transformers

from tests.architectures.check import WrongError, check
from tests.architectures.page import PAGE, kinds, page, row_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="TYPE")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    lines, wrong = [], 0
    for kind in args.kinds or kinds():
        try:
            lines.append(row_of(check(kind)))
            print(lines[-1], flush=True)
        except WrongError as error:
            wrong += 1
            print(f"WRONG {error}", flush=True)
    if args.write and not args.kinds and not wrong:
        PAGE.write_text(page(lines), encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
