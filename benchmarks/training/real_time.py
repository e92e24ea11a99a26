"""Time to loss on a real link, end to end, beside what the model of a pipeline says.

    python -m benchmarks.training.real_time [--tasks NAME ...] [--rho 4] [--uncompressed-steps N]

Two ranks, a core each, in two network namespaces joined by a shaped link (`benchmarks.links.network`; needs
root), train the tasks of `benchmarks.training.curves` cut in two: stock DeepSpeed for as many steps as the
uncompressed run has there, ours for as many as reached its loss over one link. rho is that of
`benchmarks.links.pipeline`: of fp32 activations. Validation has the link without a limit. Times are those of
all training steps of a run, the first included, added up; the model's are its step time
(`benchmarks.links.simulate`, from the passes, codecs and link that were measured in the same run) times the
steps. Three to twenty minutes a run. The two uncompressed runs have the losses that `curves` found, step by
step, so that a few of their steps tell their time: with --uncompressed-steps they are cut short, and the
others count with the mean of those after the first three. SmolLM2's table of tokens, which the first and the
last stage have, is not trained here: its gradient, 113 MB, would cross the link in every step, 24 times the
bytes of all else. Writes real_time.csv.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.files import RESULTS, provenance, write_csv, write_json
from benchmarks.links.network import Network, open_network, prepare
from benchmarks.links.pipeline import BULK_S, Ranks, link_rate, started
from benchmarks.links.rows import Compute, timing, traffic
from benchmarks.links.simulate import check_row
from benchmarks.training.compare import STOCK
from benchmarks.training.curves import TASKS, UNCOMPRESSED, list_blocks, read_curves
from benchmarks.training.finetune import NUM_SLOTS
from benchmarks.training.time_to_loss import list_trained
from clapping_ds.report import format_table

OURS = dict.fromkeys(TASKS, "direct transform 2, learned")
NUM_PROBED = 3
"""Steps of stock on the link without a limit, which tell how long a stage computes."""
NUM_SETTLING = 3
"""Steps of ours in which `in_flight` is measured; they have stock's depth."""


def build(ranks: Ranks, task: str, run: str) -> int:
    """An engine for a run on both ranks; bytes of a micro-batch's activations in fp32."""
    block = None if run == STOCK else list_blocks(TASKS[task])[run]
    answers = ranks.ask("build_task", task=task, run=run, block=block)
    raw_bytes: int = answers[0]["raw_bytes"]
    return raw_bytes


def probe(network: Network, task: str, rho: float) -> tuple[float | None, float]:
    """On a link without a limit: the speed, in bits per second, that the task's shall have; the loss before
    training, which all its runs begin with."""
    network.shape(None)
    with started(network) as ranks:
        raw_bytes = build(ranks, task, STOCK)
        loss = ranks.ask("validate", run=STOCK)[1]["loss"]
        steps = [ranks.ask("step", run=STOCK) for _ in range(NUM_PROBED)]
    stage_s = Compute.of(timing(steps[1:])).slowest_s
    return link_rate(rho, raw_bytes, stage_s), loss


def race(
    network: Network, task: str, run: str, rate: float | None, num_steps: int, most_steps: int | None
) -> dict[str, Any]:
    """One line of the table. num_steps: to the uncompressed loss. most_steps: that are trained; None: all."""
    timed_steps = min(num_steps, most_steps or num_steps)
    network.shape(rate)
    with started(network) as ranks:
        raw_bytes = build(ranks, task, run)
        speeds = ranks.ask("link", num_bytes=round((rate or 1e9) / 8 * BULK_S))
        steps = [ranks.ask("step", run=run) for _ in range(timed_steps)]
        network.shape(None)
        loss = ranks.ask("validate", run=run)[1]["loss"]
        after = ranks.ask("describe", run=run)[0]
    nothing = {"messages": 0, "payload_bytes": 0, "fresh_share": 0.0}
    before = {"report": [{**channel, **nothing} for channel in after["report"]]}
    row = {
        "run": run,
        "schedule": "stock" if run == STOCK else "ours",
        "rho": None,
        "bandwidth_bytes_per_s": max(speed["bandwidth_bytes_per_s"] for speed in speeds),
        "latency_s": min(speed["latency_s"] for speed in speeds),
        "buffer_bytes": max(speed["buffer_bytes"] for speed in speeds),
        "num_stages": 2,
        "micro_batches": NUM_SLOTS,
        "in_flight": after["in_flight"],
        **traffic(before, after, raw_bytes, NUM_SLOTS),
        **timing(steps),
    }
    checked = check_row({name: "" if cell is None else str(cell) for name, cell in row.items()})
    measured_s = add_up([max(answer["step_s"] for answer in answers) for answers in steps], num_steps)
    return {
        "task": task,
        "run": run,
        "Mbit/s": round(row["bandwidth_bytes_per_s"] * 8 / 1e6, 2),
        "steps to the loss": num_steps,
        "steps": timed_steps,
        "loss": round(loss, 4),
        "measured s": round(measured_s, 1),
        "model s": round(checked["predicted_s"] * num_steps, 1),
        "model/measured": round(checked["predicted_s"] * num_steps / measured_s, 4),
        "step s": round(row["step_s"], 4),
        "in_flight": after["in_flight"],
    }


def add_up(times: Sequence[float], num_steps: int) -> float:
    """Time of so many steps, those that were not made by the mean of those that came after settling."""
    missing = num_steps - len(times)
    return sum(times) + (missing * mean(times[NUM_SETTLING:]) if missing else 0.0)


def count_steps(folder: Path, task: str, run: str) -> int:
    """To the uncompressed loss over one link, else over three."""
    trained = list_trained(read_curves(folder / "time_to_loss_curves.csv"))
    for num_links in (1, 3):
        found = trained.get((task, run, num_links))
        if found is not None and found.steps is not None:
            return round(found.steps)
    raise SystemExit(f"{task}, {run}: time_to_loss_curves.csv has no run that reached the uncompressed loss")


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """With each run's time to the loss as a share of stock's, measured and by the model."""
    stock = {row["task"]: row for row in rows if row["run"] == STOCK}
    shares = {"of stock": "measured s", "of stock, model": "model s"}
    return [
        row | {share: round(row[name] / stock[row["task"]][name], 4) for share, name in shares.items()}
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--runs", nargs="+", default=None, help="names; default: all")
    parser.add_argument("--rho", type=float, default=4.0)
    parser.add_argument("--uncompressed-steps", type=int, default=None, help="default: to the loss")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.uncompressed_steps is not None and options.uncompressed_steps <= NUM_SETTLING:
        parser.error(f"--uncompressed-steps {options.uncompressed_steps}; accepted: above {NUM_SETTLING}")
    prepare("benchmarks.training.real_time")
    path = options.results / "real_time.csv"

    def is_wanted(task: str, run: str) -> bool:
        return task in options.tasks and (options.runs is None or run in options.runs)

    rows = [row for row in read_curves(path) if not is_wanted(row["task"], row["run"])]
    with open_network() as network:
        for task in options.tasks:
            rate, loss_before = probe(network, task, options.rho)
            for run in [run for run in (STOCK, UNCOMPRESSED, OURS[task]) if is_wanted(task, run)]:
                is_ours = run == OURS[task]
                num_steps = count_steps(options.results, task, run) if is_ours else TASKS[task].steps
                most_steps = None if is_ours else options.uncompressed_steps
                row = race(network, task, run, rate, num_steps, most_steps)
                rows.append({**row, "loss before": round(loss_before, 4)})
                print(rows[-1], flush=True)
                done = {row["task"] for row in rows if row["run"] == STOCK}
                write_csv(path, compare([row for row in rows if row["task"] in done]))
    write_json(path.with_suffix(".json"), {**provenance(), "rho": options.rho})
    print(format_table(compare(rows)))


if __name__ == "__main__":
    main()
