"""The pipeline's model against what was measured, then what it says of pipelines that are not at hand.

    python -m benchmarks.links.simulate

`results/pipeline.csv`, where it exists, has a measured pipeline per row, in these columns:

    run                            name of the row
    schedule, in_flight            "stock" or "ours", and the depth; empty for stock
    num_stages, micro_batches
    bandwidth_bytes_per_s, latency_s
    mean_forward_s_0 ...           per stage and micro-batch, of a step
    mean_backward_s_0 ...
    encode_s, decode_s             per message, of a step
    overhead_s                     per step, after the last backward
    key_bytes, delta_bytes         of a fresh slot's message and of a reused slot's
    fresh_share                    of slots, which are fresh as with `refresh` "cycle"
    step_s                         measured
    buffer_bytes                   may be missing: of the link, see `clapping_ds.plan.timeline.Link`

The model's step time for each row goes to `results/simulate_check.csv`; the exit status is 1 where it is
more than 10 % off. Planning is in `benchmarks.links.plan`.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from benchmarks.files import RESULTS, read_csv, write_csv
from benchmarks.links import plan
from clapping_ds.plan.bounds import bound_s
from clapping_ds.plan.timeline import Link, Order, Stage, Step, simulate
from clapping_ds.report import format_table
from clapping_ds.stage.sampling import Coin

MOST_WRONG = 0.10
SOCKET_BUFFER_BYTES = 1.2e6
"""Measured between two network namespaces at 20 and 100 Mbit/s, messages of 2 to 8 MB: gloo's blocking
send returns when 1.1 to 1.3 MB have yet to cross the link. At 200 Mbit/s and 1 Gbit/s up to 2.5 MB."""


def measured_step(row: Mapping[str, str]) -> Step:
    """The model's input for one row of pipeline.csv."""
    num_stages = int(row["num_stages"])
    codec_s = float(row["encode_s"]), float(row["decode_s"])
    stages = tuple(
        Stage(float(row[f"mean_forward_s_{i}"]), float(row[f"mean_backward_s_{i}"]), *codec_s)
        for i in range(num_stages)
    )
    buffer_bytes = float(row.get("buffer_bytes") or SOCKET_BUFFER_BYTES)
    link = Link(float(row["bandwidth_bytes_per_s"]), float(row["latency_s"]), buffer_bytes)
    fresh = Coin(float(row["fresh_share"]), "cycle", seed=0).toss(1, int(row["micro_batches"]))
    messages = tuple(float(row["key_bytes"] if is_fresh else row["delta_bytes"]) for is_fresh in fresh)
    return Step(stages, (link,) * (num_stages - 1), messages, messages, float(row["overhead_s"]))


def check_row(row: Mapping[str, str]) -> dict[str, Any]:
    """Measured and predicted, side by side."""
    step, measured_s = measured_step(row), float(row["step_s"])
    predicted = simulate(step, cast(Order, row["schedule"]), int(row["in_flight"] or 0))
    return {
        "run": row["run"],
        "rho": row.get("rho"),
        "schedule": row["schedule"],
        "in_flight": row["in_flight"],
        "measured_s": measured_s,
        "predicted_s": predicted.step_s,
        "predicted/measured": predicted.step_s / measured_s,
        "bound_s": bound_s(step),
        "efficiency": bound_s(step) / measured_s,
    }


def check(folder: Path) -> bool:
    """Writes simulate_check.csv and prints it. Whether every prediction holds."""
    source = folder / "pipeline.csv"
    if not source.exists():
        print(f"{source} is missing: the model is not checked against measured steps")
        return True
    rows = [check_row(row) for row in read_csv(source)]
    write_csv(folder / "simulate_check.csv", rows)
    print(format_table(rows))
    wrong = [row["run"] for row in rows if abs(row["predicted/measured"] - 1) > MOST_WRONG]
    print(f"{len(rows) - len(wrong)} of {len(rows)} within {MOST_WRONG:.0%}", *wrong, sep="\n  off: ")
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    holds = check(options.results)
    plan.report(options.results)
    sys.exit(not holds)


if __name__ == "__main__":
    main()
