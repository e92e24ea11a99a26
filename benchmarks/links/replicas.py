"""Step time of two data-parallel replicas over real links of several speeds: stock DeepSpeed against ours.

    python -m benchmarks.links.replicas [--rhos 4 16 64 256] [--rounds N]

Two ranks, a core each, in two network namespaces joined by a shaped link (`benchmarks.links.network`; needs
root). rho here: the time that stock's exchange of fp32 gradients takes on the link, divided by the time that
a step computes. At each speed all runs are alive at once and take turns, step by step.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.files import RESULTS, write_results
from benchmarks.links.network import Network, open_network, prepare
from benchmarks.links.pipeline import UNSHAPED, Ranks, started
from clapping_ds.report import format_table
from launch.gpt import GPTConfig

GPT = GPTConfig(length=64, width=256, num_blocks=4)
RHOS = (UNSHAPED, 4.0, 16.0, 64.0, 256.0)
ROUNDS = 5
WARM_UP_STEPS = 3
BF16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
NONE = {"codec": "none"}


def block_of(**plan: Any) -> dict[str, Any]:
    return {"activations": NONE, "gradients": NONE, "data_parallel": plan, "compile": True}


INT4 = {"scatter": {"name": "int4", "stochastic": True}}
CODED = {"scatter": {"name": "eden4", "scale": "unbiased"}}
RUNS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "fp32, stock": (None, {}),
    "fp32, int8": (block_of(scatter="int8"), {}),
    "fp32, eden4": (block_of(**CODED), {}),
    "fp32, sign + EF": (block_of(scatter="sign"), {}),
    "bf16 ZeRO-1, stock": (None, BF16),
    "bf16 ZeRO-1, eden4": (block_of(**CODED), BF16),
    "bf16 ZeRO-1, eden4, weights eden4": (block_of(**CODED, weights="eden4"), BF16),
    "bf16 ZeRO-1, int4, weights int4": (block_of(**INT4, weights="int4"), BF16),
}


def measure(
    ranks: Ranks, names: Sequence[str], rho: float, rate_bits_per_s: float | None, rounds: int
) -> list[dict[str, Any]]:
    """A row per run at one speed of the link."""
    runs = {run: RUNS[run] for run in names}
    num_values = ranks.ask("build_replicas", gpt=asdict(GPT), runs=runs)[0]["num_values"]
    for _ in range(WARM_UP_STEPS):
        for run in names:
            ranks.ask("step", run=run)
    before = {run: sent_bytes(ranks, run) for run in names}
    taken = [{run: ranks.ask("step", run=run) for run in names} for _ in range(rounds)]
    rows = []
    for run in names:
        steps_s = [max(answer["step_s"] for answer in answers[run]) for answers in taken]
        compute_s = [max(sum(a["forward_s"] + a["backward_s"]) for a in answers[run]) for answers in taken]
        rows.append({
            "run": run,
            "rho": rho,
            "rate_bits_per_s": rate_bits_per_s,
            "num_values": num_values,
            "payload_bytes": (sent_bytes(ranks, run) - before[run]) // rounds,
            "step_s": median(steps_s),
            "compute_s": median(compute_s),
            "rounds": rounds,
        })  # fmt: skip
    for row in rows:
        stock = next(each for each in rows if each["run"] == row["run"].split(",")[0] + ", stock")
        row["faster"] = round(stock["step_s"] / row["step_s"], 3)
    return rows


def sent_bytes(ranks: Ranks, run: str) -> int:
    """By the first replica so far, as the engine counts them; stock's are not counted."""
    rows = ranks.ask("report", run=run)[0]["rows"]
    return sum(row["payload_bytes"] for row in rows[: len(rows) // 2])


def grid(
    network: Network, names: Sequence[str], rhos: tuple[float, ...], rounds: int
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one speed after the other. The link without a limit comes first: it tells how long a step
    computes. Two replicas in a ring each send all values once."""
    compute_s = num_values = 0.0
    for rho in rhos:
        rate = None if rho == UNSHAPED else 8 * 4 * num_values / (rho * compute_s)
        network.shape(rate)
        with started(network) as ranks:
            rows = measure(ranks, names, rho, rate, rounds)
        if rho == UNSHAPED:
            compute_s, num_values = rows[0]["compute_s"], rows[0]["num_values"]
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rhos", type=float, nargs="*", default=RHOS[1:])
    parser.add_argument("--only", nargs="+", default=list(RUNS), help="names of runs, stock among them")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    prepare("benchmarks.links.replicas")
    rows = []
    with open_network() as network:
        for new in grid(network, options.only, (UNSHAPED, *options.rhos), options.rounds):
            rows += new
            print(format_table(new), flush=True)
    facts = {"gpt": asdict(GPT), "warm_up_steps": WARM_UP_STEPS, "runs": RUNS}
    write_results(options.results / "replicas_links", rows, facts)


if __name__ == "__main__":
    main()
