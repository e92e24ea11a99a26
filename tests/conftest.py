"""Settings that must stand before torch or triton are imported, and the ranks that a module's tests share."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.cluster import Cluster

torch.set_num_threads(1)


RANK_FILES = (
    *("checkpoints", "deepspeed", "engine_properties", "faults", "fp16", "launch", "megatron", "patches"),
    *("run", "torch_pipelining", "transport"),
)


def pytest_collection_modifyitems(items):
    """Marks the files that start ranks, which need both cores: all others can run beside each other."""
    for item in items:
        if item.path.stem.removeprefix("test_").startswith(RANK_FILES):
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
