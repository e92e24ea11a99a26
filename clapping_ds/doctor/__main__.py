"""Options, the list of checks, and the exit status: 0 where nothing failed on any rank."""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path

import clapping_ds.doctor
from clapping_ds.doctor.machine import (
    check_block,
    check_connections,
    check_device,
    check_files,
    check_threads,
    check_versions,
    compare_blocks,
    compare_devices,
    compare_versions,
)
from clapping_ds.doctor.network import check_network
from clapping_ds.doctor.ranks import GROUPS, LINKS, RANKS
from clapping_ds.doctor.replicas import REPLICAS
from clapping_ds.doctor.selftest import check_codecs
from clapping_ds.doctor.steps import STEPS
from clapping_ds.doctor.visit import Check, Launch, Status, Visit, run_checks
from clapping_ds.link.groups import end_groups

CHECKS = (
    RANKS,
    Check("versions", check_versions, compare=compare_versions),
    Check("device", check_device, compare=compare_devices),
    Check("connections", check_connections, after=("device",)),
    Check("threads", check_threads, after=("ranks", "device")),
    Check("network", check_network),
    Check("block", check_block, compare=compare_blocks),
    Check("files", check_files),
    Check("codecs", check_codecs, after=("ranks", "device"), patience=10.0),  # a GPU compiles kernels
    GROUPS._replace(after=("ranks", "device")),
    LINKS,
    STEPS,
    REPLICAS,
)
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_launch(environment: Mapping[str, str], local_rank: int | None) -> Launch:
    """What the launcher says. local_rank: as an argument, which is the older way."""
    given = [name for name in LAUNCHED if name in environment]
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return Launch()
    if len(given) < len(LAUNCHED):
        lacking = ", ".join(name for name in LAUNCHED if name not in given)
        raise SystemExit(f"{', '.join(given)} are set, {lacking} not; accepted: all of them, or none")
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local = int(environment.get("LOCAL_RANK", local_rank or 0))
    return Launch(rank, local, world_size, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))


def parse(arguments: Sequence[str]) -> Visit:
    parser = ArgumentParser("python -m clapping_ds.doctor", description=clapping_ds.doctor.__doc__)
    parser.add_argument("--config", type=Path, metavar="JSON", help='file with a "clapping" block to check')
    parser.add_argument("--timeout-s", type=float, default=60.0, help="how long a rank is waited for")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by launchers")
    options = parser.parse_args(arguments)
    launch = read_launch(os.environ, options.local_rank)
    return Visit(launch, options.timeout_s, options.config)


def main(arguments: Sequence[str], checks: Sequence[Check] = CHECKS) -> int:
    visit = parse(arguments)
    is_well = run_checks(checks, visit, lambda line: print(line, flush=True))
    if visit.launch.rank == 0:
        print(count(visit), flush=True)
    visit.board.leave()
    if is_well:
        end_groups()
    return 0 if is_well else 1


def count(visit: Visit) -> str:
    """The last line."""
    found = [finding.status for finding in visit.findings.values()]
    return ", ".join(f"{found.count(status)} {status}" for status in reversed(Status) if status in found)


def leave(status: int) -> None:
    """Where something failed, ending a group could wait for messages that never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
