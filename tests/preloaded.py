"""What every rank imports, before it is one: see `tests.cluster`."""
# ruff: noqa: F401

import deepspeed
import torch

import clapping_ds.hosts.deepspeed.engine
import launch.pretrain_gpt
import tests.megatron.on_cpu

torch.set_num_threads(1)
