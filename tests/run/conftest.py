"""One Ray cluster for all tests of this folder."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("RAY_worker_niceness", "0")  # or workers wait for whatever else this machine does


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster with two CPU slots and two GPUs that are only counted."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False})
    yield str(found.address)
    found.shutdown()
