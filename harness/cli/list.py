"""`harness list`: what can be named on the command line."""

import argparse
from collections.abc import Sequence

from harness.errors import HarnessError

Rows = list[tuple[str, str]]


def list_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=LISTS)
    parser.add_argument("--markdown", action="store_true", help="of methods: docs/method-reference.md")
    parser.set_defaults(action=_action)


def _action(args: argparse.Namespace, command: Sequence[str]) -> int:
    if args.markdown:
        return _markdown(args.what)
    rows = LISTS[args.what]()
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())
    return 0


def _markdown(what: str) -> int:
    if what != "methods":
        raise HarnessError(f"--markdown is a page of the methods, not of {what}; write harness list methods --markdown")
    from harness.method_reference import reference

    print(reference())
    return 0


def _methods() -> Rows:
    from methods.registry import known_methods, preset_names

    known = [(name, m.summary, ", ".join(preset_names(m))) for name, m in sorted(known_methods().items())]
    return [(name, summary + (f" Presets: {presets}." if presets else "")) for name, summary, presets in known]


def _tasks() -> Rows:
    from tasks import load_tasks

    rows = []
    for name, task in sorted(load_tasks().items()):
        about = task.about
        source = f"{about.source} @ {about.revision}" if about.revision else about.source
        what = f"{task.protocol:<10} {about.samples:>3} samples  {about.metric:<18} {about.licence:<11} {source}"
        rows.append((name, what))
    return rows


def _models() -> Rows:
    from harness.models.source import KNOWN, SHAPES
    from harness.records.spec import SHAPE

    text = {"smollm2-135m": "SmolLM2-135M-Instruct, fetched once (98 MB)", "tiny": "random weights, for tests"}
    rows = [(name, text.get(name, "")) for name in KNOWN]
    rows += [("org/name", "a model of the Hugging Face hub"), ("PATH", "a folder or a .gguf file")]
    rows += [(SHAPE + name, f"random weights in the shape of {hub}") for name, hub in SHAPES.items()]
    return [*rows, (f"{SHAPE}PATH", "the same of a config.json, or of a folder with one")]


def _boards() -> Rows:
    from harness.boards.sources import BOARDS, read_config

    return [(path.stem, read_config(path.stem).get("model", "")) for path in sorted(BOARDS.glob("*.toml"))]


LISTS = {"methods": _methods, "tasks": _tasks, "models": _models, "boards": _boards}
