"""DeepSpeed's pipeline engine with `"wall_clock_breakdown": true`: no crash in the first backward pass.

On every stage but the last, `PipelineEngine._exec_backward_pass` starts and stops the backward timers
itself, and so do, since backward hooks were added, `DeepSpeedEngine._backward_prologue` and
`_backward_epilogue` for the same pass: the second start raises. Emptied lists of timers on these stages
leave the pipeline engine's own timing.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import deepspeed
from deepspeed.runtime.pipe.engine import PipelineEngine

from patches.patch import Patch, check_version

ACCEPTED = ["0.19.8"]
TIMERS = ("backward_timers", "backward_inner_timers", "backward_reduce_timers")


def _without_second_timers(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not self.is_last_stage():
            for name in TIMERS:
                getattr(self.engine_timers, name).clear()

    return init


PATCH = Patch(
    PipelineEngine, "__init__", _without_second_timers, "self, has_bool_tensors, super_args, super_kwargs"
)


def apply() -> None:
    """For engines made from now on. Raises ImportError on a DeepSpeed that is not known."""
    check_version("deepspeed", deepspeed.__version__, ACCEPTED)
    PATCH.apply()


def undo() -> None:
    PATCH.undo()
