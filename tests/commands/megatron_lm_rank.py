"""One rank of a script of Megatron-LM's own, on the CPU.

    torchrun ... tests/commands/megatron_lm_rank.py SCRIPT [--clapping-config FILE] [arguments of the script]

With the option it goes through `patches.megatron_lm`, without it the script runs as it is.
"""

import runpy
import sys
import typing
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import typing_extensions

from launch.megatron_on_cpu import on_cpu

NAMED = ("Stream", "empty_cache", "memory_stats", "set_device", "set_rng_state", "stream")
MEASURED = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")


def main(arguments: list[str]) -> None:
    typing.override = typing_extensions.override  # Megatron-LM asks for Python 3.12 from 0.17 on
    checkout = str(Path(arguments[0]).resolve().parent)
    sys.path.insert(0, checkout)
    cuda = {
        **{name: mock.MagicMock() for name in NAMED},
        **{name: lambda: 0 for name in MEASURED},
        "device_count": lambda: 1,
        "get_rng_state": torch.get_rng_state,
    }
    with on_cpu(), mock.patch.multiple("torch.cuda", **cuda):
        from megatron.training import initialize, training

        from patches import megatron_lm

        initialize._compile_dependencies = lambda: None
        training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)
        if megatron_lm.OPTION in arguments:
            megatron_lm.main(arguments)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
