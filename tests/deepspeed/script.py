"""A user's script as the launcher runs it: `--entry` says which of the three ways in it takes."""

import argparse

import deepspeed
import torch

from launch.pretrain_gpt import start_distributed
from tests import models

parser = argparse.ArgumentParser()
parser.add_argument("--entry", choices=["initialize", "enable", "none"], default="none")
parser.add_argument("--local_rank", type=int, default=-1)
deepspeed.add_config_arguments(parser)
arguments = parser.parse_args()

start_distributed()
initialize = deepspeed.initialize
if arguments.entry != "none":
    import clapping_ds

    if arguments.entry == "enable":
        clapping_ds.enable()
        clapping_ds.enable()
    else:
        initialize = clapping_ds.initialize
model = models.pipeline(2)
engine, *_ = initialize(args=arguments, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
found = models.train(engine, 3)
if arguments.local_rank == 0:
    print("losses", type(engine).__name__, *found, flush=True)
