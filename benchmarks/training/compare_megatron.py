"""What compression costs and saves in Megatron-Core: its GPTModel, the same seed and steps under several
`"clapping"` blocks. The counterpart of benchmarks.training.compare.

    python -m benchmarks.training.compare_megatron

Runs on CPU ranks: the few places where Megatron-Core names CUDA are changed by launch/megatron_on_cpu.py,
which is for tests and for this benchmark. So tokens/s are of no use for comparisons with Megatron-Core on
GPUs.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.run import main as torchrun

from benchmarks.files import RESULTS, write_results
from benchmarks.training.compare import block, raw_bytes_of, row
from clapping_ds.report import format_table
from launch.trainer import RunResult

STOCK = "stock Megatron-Core"
COMPARISON: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    "uncompressed, lazy": block("fu", "none"),
    "direct int4": block("direct", "int4"),
    "direct eden2": block("direct", "eden2"),
    "fc int2": block("fc", "int2"),
    "fu int2": block("fu", "int2"),
    "int8 key + int2 delta": block("key_delta", "int2", key="int8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not dist.is_torchelastic_launched():
        module = "benchmarks.training.compare_megatron"
        torchrun(["--nproc_per_node", str(options.stages), "-m", module, *sys.argv[1:]])
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from launch.megatron_on_cpu import on_cpu
    from launch.pretrain_gpt_megatron import MegatronRun, start_parallel, train

    run = MegatronRun(
        data=options.data, steps=options.steps, seed=options.seed, chunks=options.chunks,
        pipeline_size=dist.get_world_size(), dtype="float32", clip_grad=0.0,
    )  # fmt: skip
    results = {}
    with on_cpu():
        start_parallel(run)
        for name, clapping in COMPARISON.items():
            source = None if clapping is None else {"clapping": clapping}
            results[name] = train(run, source, title=name)
            if dist.get_rank() == 0:
                print(f"{name}: validation loss {results[name].validations[-1][1]:.4f}", flush=True)
    if dist.get_rank() == 0:
        report(results, vars(run), options.results)
    dist.destroy_process_group()


def report(results: dict[str, RunResult], run: dict[str, Any], folder: Path) -> None:
    """Writes megatron.csv and megatron.json, and prints the table."""
    raw_bytes = raw_bytes_of(results)
    rows = [row(name, result, raw_bytes) for name, result in results.items()]
    write_results(folder / "megatron", rows, {"megatron-core": version("megatron-core"), "run": run})
    print(format_table(rows))
    print(f"written to {folder}: megatron.csv, megatron.json")


if __name__ == "__main__":
    main()
