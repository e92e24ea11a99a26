"""What every rank imports, before it is one: see `tests.cluster`."""
# ruff: noqa: F401

import deepspeed
import torch

import clapping_ds.engines.deepspeed
import launch.pretrain_gpt

torch.set_num_threads(1)
