"""What the ranks do together before they train: meet, make process groups, measure links."""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from clapping_ds.autotune.decision import Speed
from clapping_ds.autotune.measurement import probe_links
from clapping_ds.config import ClappingConfig
from clapping_ds.doctor.visit import Board, Check, Finding, Launch, Visit, fail, ok, skip
from clapping_ds.link.groups import (
    Control,
    count_ranks,
    has_backend,
    open_store,
    start_default_group,
)
from clapping_ds.stage.endpoints import Endpoints

MOST_SPEEDS = 8
KNOCK_S = 0.2


# Meeting


def check_ranks(visit: Visit) -> Finding:
    """Every rank is there. Facts: its host."""
    launch, host = visit.launch, socket.gethostname()
    if launch.address is None:
        return ok(f"one, on {host}: what needs several is skipped", host)
    if launch.world_size > 1:
        try:
            visit.board = _meet(launch, visit.timeout_s)
        except ConnectionError as error:
            where = f"MASTER_ADDR={launch.address} MASTER_PORT={launch.port}"
            advice = f"start all {launch.world_size} with {where}, and let a firewall pass them"
            return fail(str(error), advice, host)
    return ok("", host)


def compare_hosts(hosts: Sequence[str]) -> Finding | None:
    """Says who is where."""
    places = [(host, len(list(run))) for host, run in groupby(hosts)]
    texts = [f"{number} on {host}" for host, number in places]
    return ok(f"{len(hosts)} ({', '.join(texts)})") if len(hosts) > 1 else None


def _meet(launch: Launch, timeout_s: float) -> Board:
    """Raises ConnectionError if a rank is missing after so long."""
    deadline_s = time.monotonic() + timeout_s
    is_of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's
    hosts_it = launch.rank == 0 and not is_of_agent
    if not hosts_it:
        _knock(launch, timeout_s)
    store = open_store(launch.address, launch.port, hosts_it, timeout_s)
    board = Board(store, launch.rank, launch.world_size)
    try:
        board.gather("start", None, max(0.0, deadline_s - time.monotonic()))
    except ConnectionError:
        board.leave()
        raise
    return board


def _knock(launch: Launch, timeout_s: float) -> None:
    """Waits until the first rank's store answers: torch's own waiting takes twice its timeout."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        left_s = max(KNOCK_S, deadline_s - time.monotonic())
        try:
            socket.create_connection((launch.address, launch.port), timeout=left_s).close()
            return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise ConnectionError(
                    f"rank 0 did not answer at {launch.address}:{launch.port} for {timeout_s:g} s ({error})"
                ) from error
            time.sleep(KNOCK_S)


# Process groups


def check_groups(visit: Visit) -> Finding:
    """Makes the default group and a gloo group beside it; all ranks answer in both."""
    launch, backend = visit.launch, "nccl" if visit.device.type == "cuda" else "gloo"
    lacking = [name for name in {backend, "gloo"} if not has_backend(name)]
    if lacking:
        return fail(f"torch is built without {', '.join(lacking)}", "install another build")
    store = visit.board.store
    start_default_group(store, visit.board.rank, visit.board.world_size, backend, visit.timeout_s)
    visit.control = Control(visit.timeout_s)
    start_s = time.perf_counter()
    visit.control.wait_for_all()
    number = count_ranks(visit.device, visit.timeout_s)
    took_s = time.perf_counter() - start_s
    if number != launch.world_size:
        return fail(f"a sum over {launch.world_size} ranks gave {number}", "messages are lost or mixed up")
    return ok("", (backend, took_s))


def compare_times(facts: Sequence[tuple[str, float]]) -> Finding:
    """Facts: the backend, and what one collective in each group took."""
    took_s = max(took_s for _, took_s in facts)
    return ok(f"{facts[0][0]}, and gloo beside it; all ranks answered in {took_s * 1e3:.1f} ms")


# Links


def make_endpoints(visit: Visit, block: Mapping[str, Any]) -> Endpoints:
    """Every rank is a stage. A collective of all."""
    assert visit.control is not None
    config = ClappingConfig.from_ds_config({"clapping": {"timeout_s": max(1.0, visit.timeout_s), **block}})
    everyone = range(visit.launch.world_size)
    return Endpoints(config, visit.control, everyone, everyone, visit.device)


def check_links(visit: Visit) -> Finding:
    """How fast neighbouring ranks' links are. Facts: a list of (from, to, speed)."""
    if visit.is_alone:
        return skip("one rank has no link; start several: torchrun --nproc_per_node 2 -m clapping_ds.doctor")
    stage = make_endpoints(visit, {}).stages[0]
    here = stage.stage_id
    speeds = [(here, here + end.neighbour, speed) for end, speed in probe_links(stage).items()]
    stage.end_step()  # what was told last has gone
    return ok("", speeds)


def compare_speeds(facts: Sequence[Sequence[tuple[int, int, Speed]]]) -> Finding | None:
    """Says what was measured: of many links, the slowest."""
    found = sorted(
        (speed for of_rank in facts for speed in of_rank or ()), key=lambda each: each[2].bytes_per_s
    )
    if not found:
        return None
    texts = [
        f"{source}>{target} {speed.bytes_per_s * 8 / 1e6:.0f} Mbit/s {speed.latency_s * 1e3:.2f} ms"
        for source, target, speed in sorted(found[:MOST_SPEEDS])
    ]
    more = f" (the slowest of {len(found)})" if len(found) > MOST_SPEEDS else ""
    return ok(", ".join(texts) + more)


RANKS = Check("ranks", check_ranks, compare=compare_hosts)
GROUPS = Check("groups", check_groups, after=("ranks",), compare=compare_times)
LINKS = Check("links", check_links, after=("groups",), compare=compare_speeds)
