"""A real link of a chosen speed on one machine: network namespaces, a veth pair, `tc ... tbf` at both ends.

    with open_network() as network:
        network.shape(10e6)
        subprocess.Popen([*network.prefix(0), "python", ...])

What was chosen, and why:

* A bucket of 4 kB, less than three packets: an idle link saves up no more than 4 % of a message of 100 kB
  that then passes at the speed of memory. Smaller buckets lose speed at 200 Mbit/s, where the kernel's timer
  wakes late.
* No packet larger than one segment (`gso_max_segs 1`). tbf is a plain queue, and the kernels this is for lack
  fair queueing (fq_codel, sfq) below it, so a message of a few bytes waits for whatever the same end queued
  before it. TCP itself keeps two packets of a connection queued, not more, but with segmentation offload a
  "packet" has up to 64 kB: 200 ms at 2.6 Mbit/s instead of 13 ms.
* A queue of 400 kB, which therefore never fills: nothing is lost.
* Socket buffers that hold 20 kB at most of a message when a blocking send returns, a seventh of the 131 kB
  that `benchmarks.links.pipeline` sends. Linux's default holds 50 kB and more, so that a blocking send would
  cost far less here than where messages have tens of MB.
* TCP with cubic, Linux's default, by route: machines differ in their own default, and bbr's probing for the
  shortest round trip would show in the times.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

DEVICE = "eth0"
SUBNET = "192.0.2.0/30"
ADDRESSES = ("192.0.2.1", "192.0.2.2")
BURST_BYTES = 4096
QUEUE_BYTES = 400_000
SEND_BUFFER_BYTES = "4096 16384 32768"
"""Least, first and most."""
TOOLS = ("ip", "tc", "taskset", "sysctl")


class Network:
    """Two ends, 0 and 1, each a namespace with one device and one core of the machine."""

    def __init__(self, namespaces: Sequence[str], cores: Sequence[int]) -> None:
        self.namespaces = namespaces
        self.cores = cores

    def shape(self, bits_per_s: float | None) -> None:
        """From now on each end sends at most so many bits per second, headers included; None: no limit."""
        discipline = (
            ["noqueue"]
            if bits_per_s is None
            else [
                "tbf",
                "rate",
                f"{round(bits_per_s)}bit",
                "burst",
                str(BURST_BYTES),
                "limit",
                str(QUEUE_BYTES),
            ]
        )
        for namespace in self.namespaces:
            run_command("tc", "-n", namespace, "qdisc", "replace", "dev", DEVICE, "root", *discipline)

    def prefix(self, end: int) -> list[str]:
        """What stands before a command that is to run in an end's namespace, on its core."""
        return ["ip", "netns", "exec", self.namespaces[end], "taskset", "-c", str(self.cores[end])]


def missing() -> list[str]:
    """What this machine lacks of what a network needs."""
    lacks = [] if os.geteuid() == 0 else ["root"]
    lacks += [tool for tool in TOOLS if shutil.which(tool) is None]
    return lacks + ([] if len(os.sched_getaffinity(0)) > 1 else ["two cores"])


def prepare(command: str) -> None:
    """Ends a command with what this machine lacks, if anything. From now on SIGTERM ends it by SystemExit, so
    that all it made is removed."""
    if lacks := missing():
        raise SystemExit(
            f"{command} makes network namespaces and shapes the link between them: it needs "
            f"root, ip and tc (iproute2), taskset, sysctl and two cores. Missing: {', '.join(lacks)}."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))


@contextmanager
def open_network() -> Iterator[Network]:
    """A network, not shaped yet; removed at the end, whatever happens.

    Raises RuntimeError with the command and its message when the kernel refuses a part of it.
    """
    namespaces = [f"clapping-{os.getpid()}-{end}" for end in range(2)]
    try:
        for namespace in namespaces:
            run_command("ip", "netns", "add", namespace)
        run_command(
            "ip", "link", "add", "name", DEVICE, "netns", namespaces[0],
            "type", "veth", "peer", "name", DEVICE, "netns", namespaces[1],
        )  # fmt: skip
        network = Network(namespaces, sorted(os.sched_getaffinity(0))[:2])
        for end, (namespace, address) in enumerate(zip(namespaces, ADDRESSES, strict=True)):
            ip = ("ip", "-n", namespace)
            run_command(*ip, "link", "set", "dev", "lo", "up")
            run_command(*ip, "link", "set", "dev", DEVICE, "up", "gso_max_segs", "1")
            run_command(*ip, "address", "add", f"{address}/30", "dev", DEVICE)
            run_command(*ip, "route", "replace", SUBNET, "dev", DEVICE, "congctl", "cubic")
            run_command(*network.prefix(end), "sysctl", "-q", "-w", f"net.ipv4.tcp_wmem={SEND_BUFFER_BYTES}")
        yield network
    finally:
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], stderr=subprocess.DEVNULL, check=False)


def run_command(*command: str) -> None:
    """Raises RuntimeError with the command and its message when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
