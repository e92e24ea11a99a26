"""What compression costs and saves: the same GPT, seed and steps under several `"clapping"` blocks.

    deepspeed --num_accelerators 2 --module benchmarks.training.compare

Stock DeepSpeed, fully shuffled, comes first; every other row is read against it and against the
uncompressed run with the same lazy sampling.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

import clapping_ds
from benchmarks.files import RESULTS, new_figure, read_csv, save_figure, write_csv, write_results
from clapping_ds.report import format_table
from launch.pretrain_gpt import start_distributed
from launch.trainer import RunConfig, RunResult, train

STOCK = "stock DeepSpeed"
LEARNED = {"name": "transform", "basis": "eigen", "anchors": 256, "refresh": 16}
"""Refreshed often, since a run has 1,280 messages per direction."""


def block(
    strategy: str,
    codec: str | dict[str, Any] | list[Any],
    key: str | dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A `"clapping"` block with the same codecs in both directions. codec: of all messages with `direct`,
    else of deltas."""
    if strategy == "direct":
        return {"strategy": strategy, "activations": {"codec": codec}, "gradients": {"codec": codec}}
    direction = {"delta": codec} if key is None else {"delta": codec, "key": key}
    lazy = {"p_new": 0.5, "refresh": "cycle"}
    return {"strategy": strategy, "activations": direction, "gradients": direction, "lazy": lazy}


COMPARISON: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    "uncompressed, lazy": block("fu", "none"),
    "direct int4": block("direct", "int4"),
    "direct eden4": block("direct", "eden4"),
    "direct int3, maximum scale": block("direct", {"name": "int3", "scale": "maximum"}),
    "direct eden3": block("direct", "eden3"),
    "direct eden2": block("direct", "eden2"),
    "direct int2": block("direct", "int2"),
    "direct transform 3": block("direct", {"name": "transform", "bits": 3}),
    **{f"direct transform {bits}, learned": block("direct", {**LEARNED, "bits": bits}) for bits in (2, 1)},
    "fc int2": block("fc", "int2"),
    "fu int2": block("fu", "int2"),
    "int8 key + int2 delta": block("key_delta", "int2", key="int8"),
    "eden3 key + eden1 delta": block("key_delta", "eden1", key="eden3"),
    "transform 2 key, learned + lowrank, transform 0.5 delta": block(
        "key_delta", ["lowrank", {"name": "transform", "bits": 0.5}], key={**LEARNED, "bits": 2}
    ),
}


def row(name: str, result: RunResult, raw_bytes: int) -> dict[str, Any]:
    """One line of the table. raw_bytes: what crosses the link uncompressed in as many steps."""
    sent = sum(channel["payload_bytes"] for channel in result.report) or raw_bytes
    messages = sum(channel["messages"] for channel in result.report)
    fresh = sum(channel["messages"] * channel["fresh_share"] for channel in result.report)
    return {
        "run": name,
        "validation loss": result.validations[-1][1],
        "MB on the wire": sent / 1e6,
        "of stock": f"{sent / raw_bytes:.1%}",
        "bits per value": 32 * sent / raw_bytes,
        "tokens/s": round(result.tokens_per_s),
        "memory MiB per rank": sum(channel["memory_bytes"] for channel in result.report) / 2**20,
        "fresh slots": f"{fresh / messages if messages else 1:.0%}",
    }


def raw_bytes_of(results: dict[str, RunResult]) -> int:
    """What crosses the link in a run uncompressed: as many bytes in all runs."""
    (raw_bytes,) = {sum(c["raw_bytes"] for c in r.report) for r in results.values() if r.report}
    return raw_bytes


def curves(results: dict[str, RunResult], raw_bytes: int, steps: int) -> list[dict[str, Any]]:
    """Validation loss after so many steps and megabytes, for the plot."""
    return [
        {
            "run": name,
            "step": step,
            "MB on the wire": (sent if result.report else raw_bytes * step / steps) / 1e6,
            "validation loss": loss,
        }
        for name, result in results.items()
        for step, loss, sent in result.validations
    ]


def plot(source: Path, target: Path) -> None:
    """Draws what the CSV says: loss against steps and against bytes."""
    points = read_csv(source)
    figure, axes = new_figure(1, 2, inches=(11, 4.2), sharey=True)
    for axis, x_name in zip(axes, ("step", "MB on the wire"), strict=True):
        for name in dict.fromkeys(point["run"] for point in points):
            mine = [point for point in points if point["run"] == name]
            x = [float(point[x_name]) for point in mine]
            axis.plot(x, [float(point["validation loss"]) for point in mine], marker=".", label=name)
        axis.set_xlabel(x_name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats per token")
    axes[1].set_xscale("log")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    save_figure(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=RunConfig.steps)
    parser.add_argument("--seed", type=int, default=RunConfig.seed)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    ds_config = json.loads((Path(clapping_ds.__file__).parents[1] / "launch/ds_config.json").read_text())
    ds_config.pop("clapping")
    run = RunConfig(data=options.data, steps=options.steps, seed=options.seed)

    configs = {
        name: ds_config if clapping is None else {**ds_config, "clapping": clapping}
        for name, clapping in COMPARISON.items()
    }
    for config in configs.values():
        clapping_ds.ClappingConfig.from_ds_config(config)

    start_distributed()
    results = {}
    for name, config in configs.items():
        initialize = clapping_ds.initialize if "clapping" in config else deepspeed.initialize
        results[name] = train(run, config, initialize, title=name)
        if dist.get_rank() == 0:
            print(f"{name}: validation loss {results[name].validations[-1][1]:.4f}", flush=True)
    if dist.get_rank() == 0:
        report(results, run, options.results)
    dist.destroy_process_group()


def report(results: dict[str, RunResult], run: RunConfig, folder: Path) -> None:
    """Writes comparison.csv, curves.csv, comparison.png and comparison.json, and prints the table."""
    raw_bytes = raw_bytes_of(results)
    rows = [row(name, result, raw_bytes) for name, result in results.items()]
    write_results(folder / "comparison", rows, {"steps": run.steps, "seed": run.seed, "gpt": vars(run.gpt)})
    write_csv(folder / "curves.csv", curves(results, raw_bytes, run.steps))
    plot(folder / "curves.csv", folder / "comparison.png")
    print(format_table(rows))
    print(f"written to {folder}: comparison.csv, curves.csv, comparison.png, comparison.json")


if __name__ == "__main__":
    main()
