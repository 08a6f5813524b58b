"""A cluster that grows by itself, on this machine: Ray's autoscaler with its fake nodes, and `harness run` on it.

    python tests/ray_autoscale.py [FOLDER]

The head has no CPU and no GPU for workers. A node is made when a worker waits for one, as on a cloud; it has a logical
GPU, which is only a number. Prints what there was over time and ends with 1 when the run or the scaling failed.
Results and logs go to FOLDER, else they are not kept. Linux.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID as HEAD
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.v2.sdk import get_cluster_status

from harness.records.run_folder import find_runs, load_run

ROOT = Path(__file__).resolve().parent.parent
NODES = 2
RUN = (
    *("--ray", "auto", "--workers", str(NODES), "--gpus-per-worker", "1", "--autoscale", "--start-timeout", "120"),
    *("--device", "cpu", "--model", "tiny", "--dtype", "float32", "--methods", "fullkv,snapkv", "--tasks", "stdlib"),
    *("--budgets", "32", "--lengths", "1024", "--limit", "3", "--max-new-tokens", "8"),
)
UP_S, RUN_S, IDLE_S, END_S, EVERY_S = 120.0, 400.0, 60.0, 10.0, 0.25


def look(address: str) -> tuple[int, int, int, int]:
    """Nodes beside the head, those of them at work, those asked of the provider, and actors without a node."""
    status = get_cluster_status(address)
    nodes = [node for node in (*status.active_nodes, *status.idle_nodes) if node.total_resources().get("GPU")]
    at_work = sum(bool(node.used_resources().get("GPU")) for node in nodes)
    coming = sum(launch.count for launch in status.pending_launches) + len(status.pending_nodes)
    demand = status.resource_demands.ray_task_actor_demand
    return len(nodes), at_work, coming, sum(group.count for one in demand for group in one.bundles_by_count)


def config(address: str) -> dict[str, Any]:
    """Of the autoscaler. The fake provider goes by its class: its name needs a file that Ray's wheels lack."""
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    nothing = ("cluster_synced_files", "rsync_exclude", "rsync_filter", *(f"{name}_commands" for name in commands))
    worker = {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000}
    return {
        "cluster_name": "fake",
        "max_workers": NODES,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": address,
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0, "GPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu_worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": NODES},
        },
        "head_node_type": "ray.head.default",
        "file_mounts_sync_continuously": False,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in nothing},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """Address of a head without slots for work, with its autoscaler. At the end all its processes are ended."""
    port = free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    written = folder / "autoscaler.json"
    written.write_text(json.dumps(config(address)), encoding="utf-8")
    own = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_NODE_TYPE_NAME": "ray.head.default"}
    own |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    start += ["--num-cpus=0", "--num-gpus=0", "--object-store-memory=100000000", "--include-dashboard=false"]
    start += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", "--disable-usage-stats"]
    if find_spec("grpc"):  # else there is no server for Ray's client
        start.append(f"--ray-client-server-port={free_port()}")
    log = folder / "head.log"
    with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as near, log.open("wb") as out:
        start += [f"--autoscaling-config={written}", f"--temp-dir={near}"]  # sockets lie there, their paths are short
        head = subprocess.Popen(start, env=environment() | own, stdout=out, stderr=out, start_new_session=True)
        try:
            _wait_until_up(head, log)
            yield address
        finally:
            end_session(head.pid)
            head.wait()


def environment() -> dict[str, str]:
    """Of what is started here: this checkout's modules, and no cluster that somebody else named."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return own | {"PYTHONPATH": f"{ROOT}{os.pathsep}{own.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}


def _wait_until_up(head: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + UP_S
    while "Ray runtime started" not in (told := log.read_text(encoding="utf-8", errors="replace")):
        if head.poll() is not None or time.monotonic() > limit:
            raise RuntimeError(f"the head did not start: {told[-2000:]}")
        time.sleep(EVERY_S)


def end_session(session: int) -> None:
    """End the processes of a session: Ray's nodes lead process groups of their own, but stay in it."""
    limit = time.monotonic() + END_S
    while time.monotonic() < limit:
        left = [process for process in psutil.process_iter() if runs_in(process, session)]
        if not left:
            return
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # at SIGTERM a node drains for half a minute
        time.sleep(0.1)


def runs_in(process: psutil.Process, session: int) -> bool:
    with suppress(OSError, psutil.Error):
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    return False


def main(folder: Path) -> int:
    """Run it, with results and logs in `folder`, and watch until the nodes have gone again or would have long ago."""
    results, log, seen = folder / "results", folder / "run.log", list[tuple[int, int, int, int]]()
    print("seconds  nodes  at work  coming  waiting actors")
    with cluster(folder) as address, log.open("w", encoding="utf-8") as said:
        start = time.monotonic()

        def watch() -> None:
            now = look(address)
            if now != (seen or [None])[-1]:
                print("{:7.1f}  {:5d}  {:7d}  {:6d}  {:14d}".format(time.monotonic() - start, *now), flush=True)
                seen.append(now)
            time.sleep(EVERY_S)

        watch()
        command = [sys.executable, "-m", "harness.cli", "run", *RUN, "--out", str(results)]
        own = environment() | {"RAY_ADDRESS": address}
        run = subprocess.Popen(command, cwd=ROOT, env=own, stdout=said, stderr=subprocess.STDOUT)
        try:
            while run.poll() is None and time.monotonic() - start < RUN_S:
                watch()
        finally:
            run.kill()
            code = run.wait()
        ended = time.monotonic()
        while seen[-1][0] and time.monotonic() - ended < IDLE_S:
            watch()
    records = [record for one in (find_runs(results) if results.is_dir() else ()) for record in load_run(one)[1]]
    statuses = Counter(record.status for record in records)
    print(f"harness run ended with {code}; records: {dict(statuses)}")
    if code:
        print(log.read_text(encoding="utf-8")[-3000:])
    nodes = [there for there, *_ in seen]
    scaled = nodes[0] == 0 and max(nodes) == NODES and nodes[-1] == 0
    return int(bool(code) or set(statuses) != {"ok"} or not scaled)


if __name__ == "__main__":
    if "RAY_AUTH_MODE" not in os.environ:  # a token for this cluster alone; Ray reads the mode when it is imported
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **own})
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory(prefix="kvh-autoscale-") as folder:
        sys.exit(main(Path(folder)))
