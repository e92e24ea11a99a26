"""How `deepspeed.initialize` comes to heed the `"clapping"` block: its engine classes are rebound, once."""

from typing import Any

import deepspeed
from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine

from clapping_ds.config import BLOCK_NAME, ClappingConfig
from clapping_ds.hosts.deepspeed.engine import ClappingPipelineEngine


class DualPipeVRefusal(DualPipeVEngine):
    """The stock DualPipeV engine; with an enabled `"clapping"` block, an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if ClappingConfig.from_ds_config(kwargs["config_class"]._param_dict).enabled:
            raise ValueError(
                f'"{BLOCK_NAME}" block with a DualPipeVModule: accepted: a PipelineModule, or enabled = false'
            )
        super().__init__(*args, **kwargs)


def enable() -> None:
    """From now on `deepspeed.initialize` heeds the `"clapping"` block. Calling it again changes nothing.

    Rebinds `deepspeed.PipelineEngine` and `deepspeed.DualPipeVEngine`, where `deepspeed.initialize`
    looks its engines up; both stay subclasses of the originals.
    """
    deepspeed.PipelineEngine = ClappingPipelineEngine
    deepspeed.DualPipeVEngine = DualPipeVRefusal


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """As `deepspeed.initialize`, heeding the `"clapping"` block of the configuration."""
    enable()
    return deepspeed.initialize(*args, **kwargs)
