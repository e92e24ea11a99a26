"""How `deepspeed.initialize` comes to heed the `"clapping"` block: its engine classes are rebound, once."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakSet

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

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
    looks its engines up; both stay subclasses of the originals. The first optimizer step of an engine whose
    block nobody heeds warns, once.
    """
    deepspeed.PipelineEngine = ClappingPipelineEngine
    deepspeed.DualPipeVEngine = DualPipeVRefusal
    if not hasattr(DeepSpeedEngine._take_model_step, "warns_if_ignored"):
        DeepSpeedEngine._take_model_step = _warning_once(DeepSpeedEngine._take_model_step)


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """As `deepspeed.initialize`, heeding the `"clapping"` block of the configuration."""
    enable()
    return deepspeed.initialize(*args, **kwargs)


def _warning_once(take_model_step: Callable[..., Any]) -> Callable[..., Any]:
    has_stepped: WeakSet[DeepSpeedEngine] = WeakSet()

    @wraps(take_model_step)
    def take(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
        if self not in has_stepped:
            has_stepped.add(self)
            _warn_if_ignored(self)
        return take_model_step(self, *args, **kwargs)

    take.warns_if_ignored = True  # type: ignore[attr-defined]
    return take


def _warn_if_ignored(engine: DeepSpeedEngine) -> None:
    block = engine._config._param_dict.get(BLOCK_NAME)
    is_enabled = block is not None and not (isinstance(block, dict) and block.get("enabled") is False)
    if not is_enabled or isinstance(engine, ClappingPipelineEngine) or engine.global_rank > 0:
        return
    name = f"{type(engine).__module__}.{type(engine).__qualname__}"
    why = (
        f"{name} was not made by deepspeed.initialize after clapping_ds.enable(): call "
        "clapping_ds.attach(engine) once it is made"
        if isinstance(engine, PipelineEngine)
        else f"{name} has no pipeline: its module is no PipelineModule"
    )
    warnings.warn(f'the "{BLOCK_NAME}" block has no effect, as {why}', stacklevel=3)
