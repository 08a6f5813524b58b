"""Fault campaigns: of the sequential run, and of the same run on a small Ray cluster, with what it runs on killed.

Each seeded run draws one to three faults and the progress at which they strike. A driver that was killed is started
again with the same command. In the end its records must be those of an undisturbed sequential run, timings apart: none
lost, none twice, and the files of its board the same to the byte. `make faults` runs it, and `tests/faults_alone.py`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_worker_niceness", "0")  # or workers wait for whatever else this machine does

import psutil
from ray.cluster_utils import Cluster

import harness.boards.show
import harness.run.sequential  # noqa: F401 - forks of this process have it
from harness.cli import main
from tests import faults_alone
from tests.faults_alone import RUN, differences, lines, written
from tests.measured import keep
from tests.tiny_run import only

FAN = ("--workers", "2", "--gpus-per-worker", "1", "--item-timeout", "120")
KINDS = ("worker", "node", "driver")
POLL_S, GIVE_UP_S, DRIVERS = 0.05, 600.0, 8


@dataclass
class Trial:
    """One disturbed run. faults: each of a kind, after a share of the records. wrong: what differs in the end."""

    seed: int
    faults: list[tuple[str, float]]
    struck: list[str] = field(default_factory=list)
    drivers: int = 1
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def draw(cls, seed: int) -> Trial:
        dice = random.Random(seed)
        faults = [(dice.choice(KINDS), dice.random()) for _ in range(dice.randint(1, 3))]
        return cls(seed, sorted(faults, key=itemgetter(1)))

    def line(self) -> str:
        faults = ", ".join(f"{kind} at {at:.0%}" for kind, at in self.faults)
        end, struck = ", ".join(self.wrong) or "ok", len(self.struck)
        return f"{self.seed:>4}  {end}; {struck} struck of {faults}; {self.drivers} drivers, {self.seconds:.0f} s"


@contextmanager
def small_cluster() -> Iterator[Cluster]:
    """A head that runs nothing, and two nodes with one CPU and one logical GPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            _add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def _add_node(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80 * 2**20)


def sequential(folder: Path) -> Path:
    """The undisturbed run, without Ray. Returns its run folder."""
    if main(["run", *RUN, "--threads", "1", "--out", str(folder)]):
        raise RuntimeError(f"the undisturbed run in {folder} failed")
    return only(folder)


def disturbed(trial: Trial, cluster: Cluster, folder: Path, expected: Path) -> None:
    """Run one trial and write into it what came out."""
    start, pending = time.monotonic(), list(trial.faults)
    total = len(lines(expected))
    with tempfile.TemporaryFile() as said:
        driver = _driver(cluster, folder, said)
        while True:
            if time.monotonic() - start > GIVE_UP_S:
                driver.kill()
                break
            if pending and written(folder) >= pending[0][1] * total and _strike(pending[0][0], cluster, driver):
                trial.struck.append(pending.pop(0)[0])
            if driver.poll() is None:
                time.sleep(POLL_S)
            elif driver.returncode == 0 or trial.drivers == DRIVERS:
                break
            else:
                driver = _driver(cluster, folder, said)
                trial.drivers += 1
    trial.seconds = time.monotonic() - start
    trial.wrong = differences(only(folder), expected)


def _driver(cluster: Cluster, folder: Path, said: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "harness.cli", "run", *RUN, "--out", str(folder), "--ray", cluster.address, *FAN]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command, env=os.environ | own, stdout=said, stderr=said)


def _strike(kind: str, cluster: Cluster, driver: subprocess.Popen[bytes]) -> bool:
    """Kill something of that kind; False when there is none to kill right now."""
    if kind == "driver":
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            return True
        return False
    nodes = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    if kind == "node":
        cluster.remove_node(nodes[0], allow_graceful=False)
        _add_node(cluster)
        return True
    raylets = [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in nodes]
    for process in (child for raylet in raylets for child in raylet.children(recursive=True)):
        with suppress(psutil.Error):
            if "ray::Worker" in " ".join(process.cmdline()):
                process.kill()
                return True
    return False


def campaign(seeds: Sequence[int], folder: Path, keep_file: Path | None = None) -> list[Trial]:
    """Run the trials of `seeds` one after another on one cluster; prints and keeps a line for each."""
    expected, trials = sequential(folder / "sequential"), []
    with small_cluster() as cluster:
        for seed in seeds:
            trial, own = Trial.draw(seed), folder / f"run-{seed}"
            disturbed(trial, cluster, own, expected)
            print(trial.line(), flush=True)
            trials.append(trial)
            if keep_file is not None:
                result = {"struck": trial.struck, "drivers": trial.drivers, "wrong": trial.wrong}
                keep(keep_file, "make faults", {f"seed {seed}": result})
            if not trial.wrong:
                shutil.rmtree(own)
    return trials


def ask() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--out", type=Path, default=Path("build/faults"))
    parser.add_argument("--keep", type=Path, help="file of `tests/measured.py` to keep each run's outcome in")
    parser.add_argument("--only", choices=("alone", "ray"), help="one of the two campaigns (default: both)")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    campaigns = {"alone": faults_alone.campaign, "ray": campaign}  # in this order: a process with Ray does not fork
    lost = 0
    for name in (args.only,) if args.only else campaigns:
        trials = campaigns[name](range(args.seed, args.seed + args.runs), args.out.resolve(), args.keep)
        struck = Counter(kind for trial in trials for kind in trial.struck)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(struck.items()))
        wrong = sum(bool(trial.wrong) for trial in trials)
        print(f"{name}: {len(trials)} runs, {struck.total()} faults struck ({kinds}), {wrong} not as the undisturbed")
        lost += wrong
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(ask())
