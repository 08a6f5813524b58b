"""`harness tables show | compare | transfer` on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.cli.arguments import Parser, place
from harness.errors import HarnessError

if TYPE_CHECKING:
    from methods.compilerkv.tables import Tables


def tables_parser(parser: argparse.ArgumentParser) -> None:
    """Verbs of `harness tables`. Tables are a folder, or the name of packaged ones."""
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    show = verbs.add_parser("show", help="what tables hold, with heat maps as PNG and HTML")
    show.add_argument("tables", metavar="TABLES")
    show.add_argument("--out", type=place, help="folder for tables.png and tables.html (default: the tables' own)")
    show.set_defaults(action=_show)
    compare = verbs.add_parser("compare", help="rank agreement of two tables, with an interval")
    compare.add_argument("tables", metavar="TABLES", nargs=2)
    compare.set_defaults(action=_compare)
    transfer = verbs.add_parser("transfer", help="move tables to a model of another shape by relative depth")
    transfer.add_argument("tables", metavar="TABLES")
    transfer.add_argument("--model", required=True, help="the model to move them to, as in `harness run`")
    transfer.add_argument("--heads", action="store_true", help="move the heads too, where their number differs")
    transfer.add_argument("--out", type=place, required=True, metavar="DIR")
    transfer.set_defaults(action=_transfer)


def _show(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.compiler.heatmaps import shown, write_page
    from methods.compilerkv.policy import folder_of
    from methods.compilerkv.selection import spearman

    tables = _load(args.tables)
    manifest = tables.manifest
    print(f"{manifest.model} ({manifest.model_revision[:12]}), {manifest.shapes}; {manifest.source}; {manifest.corpus}")
    print(f"form: {manifest.form}")
    for name, table in shown(tables):
        row, column = divmod(int(table.argmax()), table.shape[1])
        print(f"{name}: {table.min():.2f} to {table.max():.2f}, most in layer {row}, column {column}")
    for i, budget in enumerate(manifest.budgets):
        print(f"slots at {budget} and importance: Spearman {spearman(tables.budget[i], tables.importance[0]):.2f}")
    for name, why in manifest.neutral.items():
        print(f"{name} left neutral: {why}")
    for path in write_page(tables, args.out or folder_of(args.tables)):
        print(f"wrote {path}")
    return 0


def _compare(args: argparse.Namespace, command: Sequence[str]) -> int:
    from methods.compilerkv.selection import spearman_interval

    one, other = (_load(name) for name in args.tables)
    if one.manifest.shapes != other.manifest.shapes:
        raise HarnessError(f"tables are for {one.manifest.shapes} and {other.manifest.shapes}; transfer one first")
    shared = [budget for budget in one.manifest.budgets if budget in other.manifest.budgets]
    if not shared:
        raise HarnessError(f"no budget in common: {one.manifest.budgets} and {other.manifest.budgets}")
    for budget in shared:
        found = spearman_interval(one.at(budget), other.at(budget), seed=0)
        print(f"budget {budget}: Spearman {found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]")
    return 0


def _transfer(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.engine.transformers_seam import AttachedModel
    from harness.models.load import describe_model
    from methods.base import PolicyError
    from methods.compilerkv.manifest import Shapes
    from methods.compilerkv.tables import save_tables, transfer

    tables = _load(args.tables)
    sizes = AttachedModel(describe_model(args.model, dtype="float32", device="cpu").model).sizes(1)
    shapes = Shapes(layers=sizes.layers, query_heads=sizes.query_heads, kv_heads=sizes.kv_heads)
    try:
        moved = save_tables(transfer(tables, shapes, heads=args.heads), args.out)
    except PolicyError as error:
        raise HarnessError(str(error).replace("pass heads=True", "add --heads")) from None
    print(f"{tables.manifest.shapes} -> {moved.manifest.shapes}; nothing was compiled for {args.model}: measure it")
    print(f"wrote {args.out}; use it with --methods compilerkv --set compilerkv.tables={args.out}")
    return 0


def _load(name: str) -> Tables:
    from methods.base import PolicyError
    from methods.compilerkv.policy import folder_of
    from methods.compilerkv.tables import load_tables

    try:
        return load_tables(folder_of(name))
    except PolicyError as error:
        raise HarnessError(str(error)) from None
