"""Trains a GPT over a DeepSpeed pipeline.

deepspeed --num_accelerators 2 --module launch.pretrain_gpt --deepspeed_config launch/ds_config.json
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

import clapping_ds
from launch.gpt import GPTConfig
from launch.trainer import RunConfig, train


def start_distributed() -> None:
    """Joins the process group of the launcher."""
    if not torch.cuda.is_available():
        # An op for CPU inference that would be compiled here (half a minute) and never used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(1)
    deepspeed.init_distributed()


def parse() -> tuple[RunConfig, Path]:
    """The run, and the path of the DeepSpeed JSON. Every field of RunConfig and GPTConfig is an option."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deepspeed_config", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=0)
    for config in (RunConfig, GPTConfig):
        for option in fields(config):
            if option.name in ("gpt", "vocabulary"):
                continue
            kind = Path if option.default is None else type(option.default)
            parser.add_argument(f"--{option.name.replace('_', '-')}", type=kind, default=option.default)
    options = vars(parser.parse_args())
    gpt = GPTConfig(**{f.name: options.pop(f.name) for f in fields(GPTConfig) if f.name in options})
    path = options.pop("deepspeed_config")
    options.pop("local_rank")
    return RunConfig(gpt=gpt, **options), path


def main() -> None:
    run, path = parse()
    start_distributed()
    result = train(run, json.loads(path.read_text()), clapping_ds.initialize)
    result.print()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
