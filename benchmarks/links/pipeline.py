"""Step time of a two-stage pipeline over real links of several speeds: stock DeepSpeed against ours.

    python -m benchmarks.links.pipeline [--quick]

Two ranks, a core each, in two network namespaces joined by a shaped link (`benchmarks.links.network`; needs
root). The speeds are set by rho: the time that a micro-batch's uncompressed activations take on the link,
divided by the time that a stage computes on a micro-batch. At each speed all runs are alive at once and take
turns, step by step, so that what else the machine does falls on all alike.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from benchmarks.files import RESULTS, write_results
from benchmarks.links.network import (
    ADDRESSES,
    BURST_BYTES,
    DEVICE,
    QUEUE_BYTES,
    Network,
    open_network,
    prepare,
)
from benchmarks.links.rows import Compute, compared, plot, shown, timing, traffic
from benchmarks.training.compare import STOCK, block
from clapping_ds.report import format_table
from launch.gpt import GPTConfig

RUNS: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    "uncompressed": block("direct", "none"),
    "direct int4": block("direct", "int4"),
    "fc int2": block("fc", "int2"),
    "fu int4": block("fu", "int4"),
    "int8 key + int2 delta": block("key_delta", "int2", key="int8"),
    "links: auto": {**block("direct", "int4"), "links": {"ladder": ["int8", "int4", "int2"]}},
}
"""All of ours with `in_flight` "auto", the default."""
UNSHAPED = 0.0
WARM_UP_STEPS = 5
BULK_S = 1.0
"""How long a transfer takes that measures the link."""
UNSHAPED_BULK_BYTES = 1 << 26
PORT = 29500
CHECKOUT = Path(__file__).parents[2]
RANK = Path(__file__).with_name("rank.py")
TIMEOUT_S = 600


@dataclass(frozen=True)
class Size:
    """What is trained, at which speeds, how long.

    Width and depth are such that codecs cost little beside the 45 ms that a core computes on a micro-batch,
    as on real systems. The link without a limit comes first: it tells how long a stage computes.
    """

    gpt: GPTConfig = field(default_factory=lambda: GPTConfig(length=64, width=512, num_heads=8, num_blocks=4))
    micro_batches: int = 16
    rhos: tuple[float, ...] = (UNSHAPED, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
    rounds: int = 5
    compiles: bool = True

    @property
    def raw_bytes(self) -> int:
        """A micro-batch's activations, or their gradients, in fp32."""
        return 4 * self.gpt.length * self.gpt.width


QUICK = Size(
    gpt=GPTConfig(length=64, width=384, num_heads=6, num_blocks=4),
    micro_batches=8,
    rhos=(UNSHAPED, 1.0, 4.0),
    compiles=False,
)


def link_rate(rho: float, raw_bytes: int, stage_s: float) -> float | None:
    """The link's speed at a rho, in bits per second, for a stage that computes `stage_s` on a micro-batch.

    None, no limit, at UNSHAPED.
    """
    return None if rho == UNSHAPED else 8 * raw_bytes / (rho * stage_s)


class RankProcess:
    """A running `benchmarks.links.rank` at one end of the link."""

    def __init__(self, network: Network, end: int, log: IO[str], checkout: Path, port: int) -> None:
        environment = {
            "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(end),
            "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }  # fmt: skip
        reading, writing = os.pipe()
        self.log = log
        self.answers = os.fdopen(reading)
        self.process = subprocess.Popen(
            [*network.prefix(end), sys.executable, "-P", str(RANK), str(writing)],
            stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[writing], text=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        os.close(writing)

    def order(self, do: str, arguments: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # a dead rank: `answer` says why
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """Raises RuntimeError, with the end of the ranks' log, if the rank is dead or hangs."""
        ready, _, _ = select.select([self.answers], [], [], TIMEOUT_S)
        line = self.answers.readline() if ready else ""
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"a rank gave no answer; its log ends:\n{self.log.read()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.answers.close()


class Ranks:
    """The two stages."""

    def __init__(self, processes: Sequence[RankProcess]) -> None:
        self.processes = processes

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Both stages' answers to one order."""
        for process in self.processes:
            process.order(do, arguments)
        return [process.answer() for process in self.processes]


@contextmanager
def started(network: Network, checkout: Path = CHECKOUT, port: int = PORT) -> Iterator[Ranks]:
    """New ranks: nothing that earlier engines left, threads, connections or memory, is in their times.

    checkout: whose `clapping_ds` and `launch` they import. port: where they meet; two that are alive at once
    need two.
    """
    with tempfile.TemporaryFile("w+") as log, ExitStack() as stack:
        processes = []
        for end in range(2):
            processes.append(RankProcess(network, end, log, checkout, port))
            stack.callback(processes[end].close)
        yield Ranks(processes)


def measure(ranks: Ranks, size: Size, rho: float, rate_bits_per_s: float | None) -> list[dict[str, Any]]:
    """A row per run at one speed of the link."""
    blocks = {run: block and {**block, "compile": size.compiles} for run, block in RUNS.items()}
    ranks.ask("build", gpt=asdict(size.gpt), micro_batches=size.micro_batches, runs=blocks)
    bulk_bytes = UNSHAPED_BULK_BYTES if rate_bits_per_s is None else round(rate_bits_per_s / 8 * BULK_S)
    speeds = ranks.ask("link", num_bytes=bulk_bytes)
    warm_ups = {run: [ranks.ask("step", run=run) for _ in range(WARM_UP_STEPS)] for run in RUNS}
    before = {run: ranks.ask("describe", run=run)[0] for run in RUNS}
    rounds = [{run: ranks.ask("step", run=run) for run in RUNS} for _ in range(size.rounds)]
    rows = []
    for run, clapping in RUNS.items():
        after = ranks.ask("describe", run=run)[0]
        steps = [answers[run] for answers in rounds]
        rows.append({
            "run": run,
            "schedule": "stock" if clapping is None else "ours",
            "rho": rho,
            "rate_bits_per_s": rate_bits_per_s,
            "bandwidth_bytes_per_s": max(speed["bandwidth_bytes_per_s"] for speed in speeds),
            "latency_s": min(speed["latency_s"] for speed in speeds),
            "buffer_bytes": max(speed["buffer_bytes"] for speed in speeds),
            "num_stages": 2,
            "micro_batches": size.micro_batches,
            **{name: after[name] for name in ("in_flight", "codecs", "most_payloads")},
            "raw_bytes": size.raw_bytes,
            **traffic(before[run], after, size.raw_bytes, size.micro_batches),
            **timing(steps),
            "rounds": size.rounds,
            "train_losses": " ".join(f"{step[0]['loss']:.9g}" for step in warm_ups[run] + steps),
        })  # fmt: skip
    return compared(rows)


def grid(network: Network, size: Size) -> Iterator[list[dict[str, Any]]]:
    """The rows of one speed after the other."""
    stage_s = 0.0
    for rho in size.rhos:
        rate = link_rate(rho, size.raw_bytes, stage_s)
        network.shape(rate)
        with started(network) as ranks:
            rows = measure(ranks, size, rho, rate)
        if rho == UNSHAPED:
            stage_s = Compute.least(rows).slowest_s
        yield rows


def report(rows: list[dict[str, Any]], size: Size, folder: Path) -> None:
    """Writes pipeline.csv, pipeline.json and pipeline.png."""
    shaping = {"burst_bytes": BURST_BYTES, "queue_bytes": QUEUE_BYTES}
    facts = {**asdict(size), **shaping, "warm_up_steps": WARM_UP_STEPS, "runs": RUNS}
    write_results(folder / "pipeline", rows, facts)
    plot(folder / "pipeline.csv", folder / "pipeline.png")
    print(f"written to {folder}: pipeline.csv, pipeline.json, pipeline.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three speeds, fewer micro-batches: 3 minutes")
    parser.add_argument("--rhos", type=float, nargs="*", help="speeds besides the link without a limit")
    parser.add_argument("--rounds", type=int, help="measured steps of each run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    size = QUICK if options.quick else Size()
    size = replace(
        size,
        rhos=size.rhos if options.rhos is None else (UNSHAPED, *options.rhos),
        rounds=options.rounds or size.rounds,
    )
    prepare("benchmarks.links.pipeline")
    rows = []
    with open_network() as network:
        for new in grid(network, size):
            rows += new
            print(format_table([shown(row) for row in new]), flush=True)
    report(rows, size, options.results)


if __name__ == "__main__":
    main()
