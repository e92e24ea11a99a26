"""Channels for an engine that somebody else's code makes: a subclass of `PipelineEngine` with a `train_batch`
of its own, or one that does not come from `deepspeed.initialize`.

The engine's class becomes a subclass of its own class, as torch's `fully_shard` does it with modules.
"""

from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from clapping_ds.hosts.deepspeed.checkpoint import CheckpointingEngine
from clapping_ds.hosts.deepspeed.engine import ClappingPipelineEngine, agree_on_engine
from clapping_ds.hosts.extension import extend
from clapping_ds.stage.handshake import Source, read_source

EngineOrClass = TypeVar("EngineOrClass")


def attach(engine: EngineOrClass, config: Source | None = None) -> EngineOrClass:
    """Sends what an existing engine's stages tell each other through channels. Returns the engine.

    engine   a DeepSpeed `PipelineEngine`, or of a subclass of it, between two steps; or, as a decorator,
             such a subclass, whose engines are all attached once they are made
    config   what has the "clapping" block, or the path of its JSON; None: the engine's own DeepSpeed
             configuration

    A collective of all ranks. The engine stays one of its class and keeps its `train_batch`, `eval_batch` and
    instructions, whenever these are changed; only the schedule of training steps, the four instructions that
    send and receive, `_next_batch` and checkpoints go another way. It gains `clapping_report` and the like.
    Without an enabled block nothing changes, and one line says so.

    Raises ValueError, on every rank, for a block that is wrong on one, and for what is no such engine or is
    attached already, or has names of ours; in the first step for an engine that sends, or loads, in a way of
    its own.
    """
    if isinstance(engine, type):
        return _attach_class(engine, config)  # type: ignore[return-value]
    _check_class(type(engine))
    _attach(engine, config)
    return engine


def _attach(engine: Any, config: Source | None) -> None:
    ds_config = engine._config
    read = (lambda: ds_config._param_dict) if config is None else (lambda: read_source(config))
    found, control = agree_on_engine(read, ds_config, engine.num_stages, engine.device)
    if not found.enabled:
        return
    control.check(lambda: _check_names(engine))
    engine.reset_activation_shape()
    own, before = type(engine), dict(engine.__dict__)
    engine.__class__ = extend(own, ClappingPipelineEngine)  # type: ignore[arg-type]
    engine.clapping, engine._control = found, control
    try:
        engine._start_clapping()
    except BaseException:
        engine.__class__ = own
        engine.__dict__.clear()
        engine.__dict__.update(before)
        raise
    engine._endpoints.num_drawn = engine.global_steps * engine.micro_batches
    if engine._gradients is not None:
        engine._gradients.averaging.step = engine.global_steps


def _attach_class(own: Any, config: Source | None) -> type:
    """In place, so that `super(TheClass, self)` in its methods stays what it was."""
    _check_class(own)
    make_own = own.__init__

    @wraps(make_own)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        make_own(self, *args, **kwargs)
        if not isinstance(self, ClappingPipelineEngine):
            _attach(self, config)

    own.__init__ = make
    return own


def _check_class(own: type) -> None:
    if not issubclass(own, PipelineEngine) or issubclass(own, ClappingPipelineEngine | DualPipeVEngine):
        raise ValueError(
            f"attach to {own.__module__}.{own.__qualname__}; accepted: a DeepSpeed PipelineEngine, or one of "
            "a subclass of it, that nothing is attached to yet, and no DualPipeVEngine"
        )


def _check_names(engine: Any) -> None:
    """Raises ValueError where the engine's own code has a name of ours, or saves in a way of its own."""
    classes = type(engine).__mro__[: type(engine).__mro__.index(PipelineEngine)]
    own = {name for each in classes for name in vars(each)}
    for name in sorted(OURS & (own | set(vars(engine)))):
        raise ValueError(
            f"attach to an engine that has a {name} of its own; accepted: another name, as the attached "
            "engine has one"
        )
    for name in ("save_checkpoint", "load_checkpoint"):
        stock = list(signature(getattr(PipelineEngine, name)).parameters)
        if list(signature(getattr(type(engine), name)).parameters)[: len(stock)] != stock:
            raise ValueError(
                f"attach to an engine whose {name} takes other arguments than DeepSpeed's; accepted: "
                f"{', '.join(stock[1:])}"
            )


OURS = {
    name
    for each in (ClappingPipelineEngine, CheckpointingEngine)
    for name in (*vars(each), *each.__annotations__, "_endpoint", "_shapes")
    if not name.startswith("__") and not hasattr(PipelineEngine, name) and name != "micro_batches"
}
"""Names that an attached engine gets beside those of `PipelineEngine`."""
