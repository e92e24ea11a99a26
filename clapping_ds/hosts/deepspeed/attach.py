"""Channels for an engine that somebody else's code makes: a subclass of `PipelineEngine` with a `train_batch`
of its own, or one that does not come from `deepspeed.initialize`.

The engine's class becomes a subclass of its own class, as torch's `fully_shard` does it with modules.
"""

from collections.abc import Mapping
from functools import cache, wraps
from typing import Any, TypeVar

from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from clapping_ds.hosts.deepspeed.engine import ClappingPipelineEngine, agree

EngineOrClass = TypeVar("EngineOrClass")


def attach(engine: EngineOrClass, config: Mapping[str, Any] | None = None) -> EngineOrClass:
    """Sends what an existing engine's stages tell each other through channels. Returns the engine.

    engine   a DeepSpeed `PipelineEngine`, or of a subclass of it, between two steps; or, as a decorator,
             such a subclass, whose engines are all attached once they are made
    config   a mapping with the "clapping" block; None: the engine's own DeepSpeed configuration

    A collective of all ranks. The engine stays one of its class and keeps its `train_batch`, `eval_batch` and
    instructions, whenever these are changed; only the schedule of training steps, the four instructions that
    send and receive, `_next_batch` and checkpoints go another way. It gains `clapping_report` and the like.
    Without an enabled block nothing changes, and one line says so.

    Raises ValueError, on every rank, for a block that is wrong on one, and for what is no such engine or is
    attached already; in the first step for an engine that sends in a way of its own.
    """
    if isinstance(engine, type):
        return _attach_class(engine, config)  # type: ignore[return-value]
    _check_class(type(engine))
    _attach(engine, config)
    return engine


def _attach(engine: Any, config: Mapping[str, Any] | None) -> None:
    ds_config = engine._config
    read = (lambda: ds_config._param_dict) if config is None else (lambda: config)
    found, control = agree(read, ds_config, engine.num_stages, engine.device)
    if not found.enabled:
        return
    engine.reset_activation_shape()
    own = type(engine)
    engine.__class__ = _subclass(own)  # type: ignore[arg-type]
    engine.clapping, engine._control = found, control
    try:
        engine._start_clapping()
    except ValueError:
        engine.__class__ = own
        raise


@cache
def _subclass(own: type) -> type:
    """With ours before it: what it overrides of `PipelineEngine` is called by ours where that was."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (ClappingPipelineEngine, own), names)


def _attach_class(own: Any, config: Mapping[str, Any] | None) -> type:
    _check_class(own)

    @wraps(own.__init__)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        own.__init__(self, *args, **kwargs)
        if not isinstance(self, ClappingPipelineEngine):
            _attach(self, config)

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (own,), {**names, "__init__": make})


def _check_class(own: type) -> None:
    if not issubclass(own, PipelineEngine) or issubclass(own, ClappingPipelineEngine | DualPipeVEngine):
        raise ValueError(
            f"attach to {own.__module__}.{own.__qualname__}; accepted: a DeepSpeed PipelineEngine, or one of "
            "a subclass of it, that nothing is attached to yet, and no DualPipeVEngine"
        )
