"""The doctor on ranks, as a user starts it."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clapping_ds.doctor.__main__ import CHECKS
from clapping_ds.doctor.ranks import make_endpoints
from clapping_ds.doctor.steps import KEY_DELTA, NUM_SLOTS, list_held, take_step
from clapping_ds.doctor.visit import Launch, Visit
from clapping_ds.link.groups import Control

ROOT = Path(__file__).parents[2]
NAMES = [check.name for check in CHECKS]


def start(*arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    out, error = process.communicate(timeout=150)
    return process.returncode, [line.split(maxsplit=2) for line in out.splitlines()], out + error


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_ranks_of_torchrun(tmp_path):
    (tmp_path / "ds.json").write_text('{"clapping": {}}')
    status, lines, said = finish(
        start(
            *("torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()),
            *("-m", "clapping_ds.doctor", "--config", str(tmp_path / "ds.json")),
        )
    )
    assert status == 0, said
    found = {line[0]: line[1:] for line in lines}
    assert list(found)[: len(NAMES)] == NAMES
    assert not {"FAIL"} & {status for status, _ in found.values()}
    assert found["links"][1].startswith("0>1 ")
    assert found["steps"][1].startswith(
        "2 stages, 2 steps each of direct, key_delta, key_delta with verify: "
    )
    assert found["replicas"][1].startswith(
        "2 replicas, 2 exchanges of gradients: means equal on all, error 0.07"
    )


def test_one_process_starts_two_ranks_for_the_steps():
    status, lines, said = finish(start("clapping_ds.doctor"))
    assert status == 0, said
    found = {line[0]: line[1:] for line in lines}
    assert found["links"][0] == found["replicas"][0] == "skip"
    assert "torchrun --nproc_per_node 2" in found["links"][1]
    assert found["steps"][1].startswith("on CPU ranks: 2 stages, ")


@pytest.mark.parametrize("there", [(1,), (0, 2)], ids=str)
def test_a_missing_peer_ends_every_rank_within_the_time(there):
    started_s = time.monotonic()
    world = {"WORLD_SIZE": str(max(there) + 1), "MASTER_ADDR": "127.0.0.1"}
    port = free_port()
    processes = [
        start("clapping_ds.doctor", "--timeout-s", "8", **world, MASTER_PORT=port, RANK=str(rank))
        for rank in there
    ]
    for rank, process in zip(there, processes, strict=True):
        status, _, said = finish(process)
        assert status == 1
        (line,) = [line for line in said.splitlines() if "ranks  " in line and "FAIL" in line]
        assert line.startswith("ranks" if rank == 0 else f"rank {rank}: ranks")
        wanted = "rank 0 did not answer at 127.0.0.1" if there == (1,) else "start: nothing from rank 1 of "
        assert wanted in line
        assert f"MASTER_PORT={port}" in line
        assert rank > 0 or "steps        skip  needs groups" in said
    assert time.monotonic() - started_s < 60


def take_both_steps():
    """Errors by step, share of fresh messages, most payloads of a receiving end at once, what ends hold."""
    visit = Visit(Launch(torch.distributed.get_rank(), 0, 2), control=Control(60))
    endpoints = make_endpoints(visit, KEY_DELTA)
    errors = [take_step(endpoints, visit, step) for step in range(2)]
    (stage,) = endpoints.stages
    most = max(wire.most_payloads for end, wire in stage.wires.items() if not end.sends)
    return errors, endpoints.traffic().fresh_share, most, list(list_held("any", stage))


def test_the_steps_reuse_slots_and_announce(two_ranks):
    (errors, fresh_share, most, held), (_, _, _, other) = two_ranks.run(take_both_steps)
    assert 0.002 < errors[0] < errors[1] < 0.05
    assert fresh_share == 0.75
    assert most > 1
    assert {end[1:3]: end.checksums for end in held} == {end[1:3]: end.checksums for end in other}
    assert all(len(set(end.checksums)) == NUM_SLOTS for end in held)
