"""`ray_cluster.yaml`: what Ray makes of it and of its on-premise half, and that its recipes can be typed as they stand.

No cloud is asked: Ray's schema, defaults and parsers need none.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")

import click
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_command

from harness.cli.parser import command_line
from harness.cli.ray import fan_out
from harness.plan.names import sweep_of
from harness.plan.sweep import plan_methods
from harness.records.run_folder import find_runs, load_run
from harness.run.fan import FanOut
from tasks import load_tasks
from tasks.base import find_tasks

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "ray_cluster.yaml"
TEXT = FILE.read_text(encoding="utf-8")
SETUP = ("initialization", "setup", "head_setup", "worker_setup")
COMMANDS = [f"{name}_commands" for name in (*SETUP, "head_start_ray", "worker_start_ray")]
Config = dict[str, Any]


def recipes() -> list[list[str]]:
    """The commands in the comments, in words, without what they are redirected to."""
    lines = re.findall(r"^# {5}(\S.*|  .*)$", TEXT, re.MULTILINE)
    text = "\n".join(lines).replace("\\\n", " ")
    return [shlex.split(line.partition(" > ")[0]) for line in text.splitlines()]


def recipe(*start: str) -> list[str]:
    (found,) = [words for words in recipes() if tuple(words[: len(start)]) == start]
    return found


@cache
def aws() -> Config:
    """As it stands."""
    return dict(yaml.safe_load(TEXT))


@cache
def on_premise() -> Config:
    """As its own recipe makes it."""
    done = subprocess.run(recipe("sed"), cwd=ROOT, check=True, capture_output=True, text=True)
    return dict(yaml.safe_load(done.stdout))


@pytest.fixture(params=[aws, on_premise])
def either(request: pytest.FixtureRequest) -> Config:
    return dict(request.param())


def resolved(config: Config) -> Config:
    """What the launcher makes of it before it talks to a provider. Raises what Ray raises."""
    found: Config = prepare_config(deepcopy(config))
    validate_config(found)
    return found


def test_ray_takes_both(either: Config) -> None:
    found = resolved(either)
    for name in COMMANDS:
        if name in either:  # the launcher puts the common set-up before that of head and workers
            assert found[name][-len(either[name]) :] == either[name]
    assert found["head_setup_commands"][: len(either["setup_commands"])] == either["setup_commands"]
    assert found["max_workers"] >= 1 and found["idle_timeout_minutes"] > 0 and found["upscaling_speed"] > 0


def test_both_halves_do_the_same_and_on_premise_keeps_the_machines_it_names() -> None:
    shared = ("cluster_name", "file_mounts", "setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    assert {name: aws()[name] for name in shared} == {name: on_premise()[name] for name in shared}
    provider = on_premise()["provider"]
    assert (aws()["provider"]["type"], provider["type"]) == ("aws", "local") and provider["head_ip"]
    (node,) = resolved(on_premise())["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == len(provider["worker_ips"]) >= 1


def test_head_without_gpu_and_workers_from_none_to_many() -> None:
    found = resolved(aws())
    types = dict(found["available_node_types"])
    head = types.pop(found["head_node_type"])
    instance = head["node_config"]
    assert head["max_workers"] == 0 and head["resources"].get("GPU") == head["resources"].get("CPU") == 0
    assert not re.match(r"(g|p)\d", instance["InstanceType"]) and "InstanceMarketOptions" not in instance
    for worker in types.values():
        own = worker["node_config"]
        assert worker["min_workers"] == 0 < worker["max_workers"] <= found["max_workers"]
        assert worker["resources"]["GPU"] >= 1 and re.match(r"(g|p)\d", own["InstanceType"])
        assert own["InstanceMarketOptions"] == {"MarketType": "spot"} and own["ImageId"] == instance["ImageId"]
    assert found["provider"]["cache_stopped_nodes"] is False  # a spot instance cannot be stopped


def test_set_up_installs_this_project(either: Config) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = set(project["project"]["optional-dependencies"])
    asked = [set(found.split(",")) for found in re.findall(r"-e '\.\[([^\]]*)\]'", " ".join(either["setup_commands"]))]
    assert asked and all(names <= extras for names in asked)
    assert set[str]().union(*asked) >= {"ray", "cuda"}
    ((remote, local),) = either["file_mounts"].items()
    installs = [line for line in either["setup_commands"] if " -c " in line]
    assert local == "." and all(line.startswith(f"cd {remote} && ") for line in installs)
    assert all((ROOT / file).is_file() for line in installs for file in re.findall(r"-c (\S+)", line))
    assert all((ROOT / file).is_file() for file in either["rsync_filter"])


def test_the_shell_and_the_harness_take_every_command(either: Config) -> None:
    lines = [line for name in COMMANDS for line in either.get(name, [])]
    for line in lines:
        subprocess.run(["bash", "-n", "-c", line], check=True, capture_output=True)
    ours = [shlex.split(line)[1:] for line in lines if line.startswith("harness ")]
    assert ours
    for words in ours:
        command_line().parse_args(words)


def test_ray_starts_with_room_for_files_and_models_in_the_node_s_cache(either: Config) -> None:
    found = resolved(either)
    assert any("HF_HOME=" in line for line in found["setup_commands"])
    given = {}
    for role in ("head", "worker"):
        stop, start = found[f"{role}_start_ray_commands"]
        limit, _, words = start.partition("; ")
        assert (stop, limit) == ("ray stop", "ulimit -n 65536")
        given[role] = parsed_by_ray(shlex.split(words))
    head, worker = given.values()
    assert head["head"] and head["autoscaling_config"] and head["num_gpus"] == head["num_cpus"] == 0
    assert head["dashboard_host"] == "127.0.0.1" and worker["address"] == f"$RAY_HEAD_IP:{head['port']}"


def parsed_by_ray(words: list[str]) -> dict[str, Any]:
    """Options of a `ray ...` command as Ray understands them. Fails on one that it doesn't know."""
    command: click.Command = ray_command
    assert words[0] == "ray"
    rest = words[1:]
    while isinstance(command, click.Group):
        command, rest = command.commands[rest[0]], rest[1:]
    return command.make_context(command.name, rest).params


def test_every_recipe_is_one_that_ray_knows() -> None:
    verbs = [words[1] for words in recipes() if words[0] == "ray"]
    assert {"up", "job", "dashboard", "attach", "rsync-down", "down"} <= set(verbs)
    for words in recipes():
        if words[0] == "ray" and words[1] in ray_command.commands:  # `ray job` only with ray[default]
            assert parsed_by_ray(words).get("cluster_config_file") in (None, FILE.name, "on_premise.yaml")


def test_the_job_s_run_fits_the_cluster() -> None:
    submit = recipe("ray", "job", "submit")
    shell, flag, line = submit[submit.index("--") + 1 :]
    assert (shell, flag) == ("bash", "-c")
    args = command_line().parse_args(shlex.split(line)[1:])
    fan = fan_out(args)
    assert fan == FanOut(workers=8, cpus=4, gpus=1, autoscale=True, start_s=3600)
    node = aws()["available_node_types"]["gpu_worker"]["resources"]
    each = min(node["GPU"] // fan.gpus, node["CPU"] // fan.cpus)
    assert fan.workers <= each * aws()["max_workers"]
    sweep = sweep_of(args, {})
    load_tasks()
    assert plan_methods(sweep) and find_tasks(sweep.tasks)
    assert args.out in [Path(word).expanduser() for word in recipe("ray", "rsync-down")]


def test_nothing_in_it_is_of_one_machine() -> None:
    urls = re.findall(r"\w+://[^\s'\"]+", TEXT)
    assert urls and all(url.startswith("http://127.0.0.1:") for url in urls)
    assert not re.search(r"/(home|root|work|tmp|Users|mnt|opt)/", TEXT)
    assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host| -i ", TEXT)
    assert set(re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", TEXT)) == {"127.0.0.1"}
    assert not re.search(r"\bami-[0-9a-f]{8,}|AKIA", TEXT)


@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="sessions of processes are looked up in /proc")
def test_nodes_come_for_a_run_and_go_after_it(tmp_path: Path) -> None:
    own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "tests/ray_autoscale.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line[:1] == " "]
    assert any(nodes == "0" and waiting != "0" for _, nodes, *_, waiting in rows)  # asked for before there is any
    (folder,) = find_runs(tmp_path / "results")
    manifest, records = load_run(folder)
    assert [record.status for record in records] == ["ok"] * (manifest.samples * manifest.cells)
