"""`harness verify`: score a submitted run again and check it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.cli.arguments import place

if TYPE_CHECKING:
    from harness.submission.verify import Decode


def verify_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("pack", type=place, metavar="PACK", help="archive that `harness submit` wrote")
    add("--partial", action="store_true", help="missing cells are no fault")
    add("--tokenizer", metavar="MODEL", help="decode the stored tokens too, with this model's tokenizer")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.submission.verify import verify_pack

    verdict = verify_pack(args.pack, partial=args.partial, decode=_decoder(args.tokenizer))
    print("\n".join(verdict.told()))
    return 0 if verdict.ok else 1


def _decoder(model: str | None) -> Decode | None:
    if model is None:
        return None
    from harness.models.load import describe_model
    from harness.models.prompt import TaskTokenizer

    return TaskTokenizer(describe_model(model, dtype="float32", device="cpu").tokenizer).decode
