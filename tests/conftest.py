"""Settings that must stand before torch or triton are imported, and the ranks that a module's tests share."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.cluster import Cluster

torch.set_num_threads(1)


HOSTS = ("deepspeed", "megatron", "torch")
ALSO_START_RANKS = ("test_doctor_ranks", "test_wire")


def pytest_collection_modifyitems(items):
    """Marks the files that start ranks, which need both cores: all others can run beside each other."""
    for item in items:
        if item.path.parent.name in HOSTS or item.path.stem in ALSO_START_RANKS:
            item.add_marker("ranks")


@pytest.fixture(scope="module")
def two_ranks():
    cluster = Cluster(2)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def four_ranks():
    cluster = Cluster(4)
    yield cluster
    cluster.close()


@pytest.fixture
def fresh_ranks():
    """Clusters of so many ranks, for tests that end or stop them."""
    started = []

    def start(world_size):
        started.append(Cluster(world_size))
        return started[-1]

    yield start
    for cluster in started:
        cluster.close()
