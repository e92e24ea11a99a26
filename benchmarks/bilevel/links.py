"""Step time of two sites over a real link, by strategy and codec: what overlap hides of the messages.

    python -m benchmarks.bilevel.links [--rho 1.0] [--rounds N]

Two ranks, a core each, in two network namespaces joined by a shaped link (`benchmarks.links.network`; needs
root). The lower level is a network of 68,362 parameters. rho: the time that the uncompressed y and z of a
step take on the link, divided by the time that directions take to find. All runs are alive at once and take
turns, step by step.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bilevel.quadratic import NAMES
from benchmarks.files import RESULTS, write_results
from benchmarks.links.network import open_network, prepare
from benchmarks.links.pipeline import UNSHAPED, Ranks, started
from clapping_ds.report import format_table

CODECS = ("none", "eden4")
RUNS = {f"{strategy}, {codec}": (strategy, codec) for strategy in NAMES for codec in CODECS}
ROUNDS, WARM_UP_STEPS = 9, 2


def measure(ranks: Ranks, rho: float, rate_bits_per_s: float | None, rounds: int) -> list[dict[str, Any]]:
    """A row per run."""
    ranks.ask("build_sites", runs=RUNS)
    for run in (run for _ in range(WARM_UP_STEPS) for run in RUNS):
        ranks.ask("step_sites", run=run)
    taken = [{run: ranks.ask("step_sites", run=run) for run in RUNS} for _ in range(rounds)]
    rows = []
    for run, (strategy, codec) in RUNS.items():
        steps = [answers[run] for answers in taken]
        rows.append({
            "strategy": strategy, "codec": codec, "rho": rho, "rate_bits_per_s": rate_bits_per_s,
            "bytes_per_step": steps[0][0]["num_bytes"],
            "find_s": round(median(max(answer["find_s"] for answer in step) for step in steps), 4),
            "step_s": round(median(max(answer["step_s"] for answer in step) for step in steps), 4),
            "rounds": rounds,
        })  # fmt: skip
    for row in rows:
        stock = next(each for each in rows if (each["strategy"], each["codec"]) == ("dsgd", row["codec"]))
        row["of_dsgd"] = round(row["step_s"] / stock["step_s"], 3)
    return rows


def rate_of(rows: Sequence[dict[str, Any]], rho: float) -> float:
    """Of the link, in bits per second."""
    row = next(each for each in rows if (each["strategy"], each["codec"]) == ("dsgd", "none"))
    return float(8 * row["bytes_per_step"] / (rho * row["find_s"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rho", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    prepare("benchmarks.bilevel.links")
    rows: list[dict[str, Any]] = []
    with open_network() as network:
        for rho in (UNSHAPED, options.rho):
            rate = rate_of(rows, rho) if rows else None
            network.shape(rate)
            with started(network) as ranks:
                rows += measure(ranks, rho, rate, options.rounds)
    print(format_table(rows))
    write_results(options.results / "bilevel_links", rows, {"warm_up_steps": WARM_UP_STEPS})


if __name__ == "__main__":
    main()
