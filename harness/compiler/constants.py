"""`harness compile METHOD`: constants of a model that a method reads, of whatever kind, as an artefact."""

import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from harness.compiler.asked import ConstantsSpec
from harness.compiler.stage import Workbench
from harness.errors import HarnessError, shown
from harness.machine import git_commit, machine, versions
from harness.models.prompt import token_sha256
from methods.artefact import Constants, ConstantsManifest, save_constants
from methods.label import nearest

COMPILERS = {
    "kvzap": "harness.compiler.kvzap",
    "matryoshkakv": "harness.compiler.matryoshka",
    "qkvcomm": "harness.compiler.qkvcomm",
    "recalkv": "harness.compiler.recalkv",
}
"""Module of each method's `compile_constants(bench, steps)`, which returns tensors and a report."""


def compiler_of(method: str) -> str:
    """Return the module that makes a method's constants. Raises HarnessError where there is none."""
    if method not in COMPILERS:
        raise HarnessError(f"{shown(method)} has no constants to compile{nearest(method, ['compilerkv', *COMPILERS])}")
    return COMPILERS[method]


def compile_method(spec: ConstantsSpec, folder: Path, command: Sequence[str]) -> Constants:
    """Make the constants of `spec.method` and write them to a folder, which holds what a resumed run goes on from."""
    made_by = import_module(compiler_of(spec.method))
    bench, start = Workbench(spec, folder), time.perf_counter()
    tensors, report = made_by.compile_constants(bench, spec.steps)
    named = ", ".join(f"{name} ({sha256[:12]})" for name, sha256 in bench.corpora.items())
    manifest = ConstantsManifest(
        method=spec.method,
        model=bench.loaded.spec.name,
        model_revision=bench.loaded.spec.revision,
        corpus=f"{len(bench.prompts)} prompts of {named}",
        prompts=tuple(sorted(token_sha256(prompt.ids) for prompt in bench.prompts)),
        seed=spec.seed,
        report=report,
        seconds=round(time.perf_counter() - start, 1),
        command=tuple(command),
        git_commit=git_commit(),
        made_on={**machine(), "versions": versions()},
    )
    return save_constants(Constants(manifest, tensors), folder)
