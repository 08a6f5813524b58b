"""lm-eval's own command line with one model more, `kvpolicy`. Names are registered without importing torch."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from harness.errors import HarnessError, shown
from harness.models.source import resolve_model
from methods.budget import PolicyError

ALIAS = "kvpolicy"
CLASS = "harness.lm_eval.plugin:KVPolicyLM"


def register() -> None:
    """Make `kvpolicy` known to lm-eval in this process; imports neither torch nor the model.

    lm-eval fills its registry only while that is empty: its own models go first.
    """
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if ALIAS not in model_registry:
        model_registry.register(ALIAS, target=CLASS)


def run_lm_eval(arguments: Sequence[str]) -> int:
    """lm-eval's own command line with our model in it. Raises HarnessError for what lm-eval or our model refuses."""
    if not arguments:
        arguments = ["--help"]
    register()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    before, sys.argv = sys.argv, ["lm-eval", *arguments]  # its parser reads them there
    try:
        parser = HarnessCLI()
        args = parser.parse_args()
        if getattr(args, "command", None) == "run":
            _complete(args)
        parser.execute(args)
    except (HarnessError, PolicyError):
        raise
    except (ValueError, OSError) as error:  # how lm-eval says what it cannot take, an unknown task above all
        raise HarnessError(f"lm-eval: {error}; see `harness lm-eval {arguments[0]} --help`") from error
    finally:
        sys.argv = before
    return 0


def _complete(args: argparse.Namespace) -> None:
    """For our model: a device that is here, and a tokenizer that tasks which size their prompts can read."""
    from harness.lm_eval.requests import check_arguments

    config = _config(args.config)
    if (args.model or config.get("model")) != ALIAS:
        return
    given = _arguments(config.get("model_args")) | _arguments(args.model_args)
    check_arguments(given)
    if args.device is None and not config.get("device"):
        args.device = "auto"
    name = given.get("pretrained", "smollm2-135m")
    metadata = _arguments(config.get("metadata")) | _arguments(args.metadata)
    by_name = {"hub", "folder"}  # whose tokenizer transformers finds by the model's name
    if "tokenizer" not in given | metadata and resolve_model(name).kind not in by_name:
        args.metadata = {"tokenizer": tokenizer_of(name), **metadata}


def tokenizer_of(name: str) -> str:
    """A folder with the tokenizer of that model, in a form that transformers reads."""
    from harness.lm_eval.requests import tokenizer_folder
    from harness.models.load import describe_model

    return tokenizer_folder(describe_model(name, dtype="float32", device="cpu"))


def _config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    from lm_eval.config.evaluate_config import EvaluatorConfig

    try:
        return dict(EvaluatorConfig.load_yaml_config(path))
    except (OSError, ValueError, TypeError) as error:
        raise HarnessError(f"--config {path}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise HarnessError(f"--config {path} is nested too deep; give another file") from None


def _arguments(given: Any) -> dict[str, Any]:
    """`a=1,b=2`, or a mapping; empty for nothing."""
    from lm_eval.utils import simple_parse_args_string

    found = simple_parse_args_string(given) if isinstance(given, str) else given or {}
    if not isinstance(found, dict):
        raise HarnessError(f"arguments are `a=1,b=2` or a mapping, got {shown(found)}; write them so")
    return found
