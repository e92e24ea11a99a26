"""Trains a GPT over a DeepSpeed pipeline.

deepspeed --num_accelerators 2 --module launch.pretrain_gpt --deepspeed_config launch/ds_config.json
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
import tyro

import clapping_ds
from launch.trainer import RunConfig, train

AnyOptions = TypeVar("AnyOptions")


@dataclass(frozen=True)
class Options:
    """What the script is started with."""

    deepspeed_config: Path
    """JSON of DeepSpeed, with the "clapping" block."""
    run: RunConfig = field(default_factory=RunConfig)
    local_rank: int = 0
    """Passed by the launcher, and not used."""


def start_distributed() -> None:
    """Joins the process group of the launcher."""
    if not torch.cuda.is_available():
        # An op for CPU inference that would be compiled here (half a minute) and never used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(1)
    deepspeed.init_distributed()


def parse(
    options: type[AnyOptions], description: str | None, arguments: Sequence[str] | None = None
) -> AnyOptions:
    """The options of a script: every field of its nested dataclasses. None: this process's arguments."""
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed)
    return tyro.cli(options, description=description, args=arguments, config=config)


def main() -> None:
    options = parse(Options, __doc__)
    start_distributed()
    ds_config = json.loads(options.deepspeed_config.read_text())
    result = train(options.run, ds_config, clapping_ds.initialize)
    result.print()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
