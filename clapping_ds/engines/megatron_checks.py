"""What is checked before Megatron-Core trains: the configuration, and what a schedule is called with."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from clapping_ds.config import BLOCK_NAME, ClappingConfig
from clapping_ds.engines.megatron_host import P2PCommunicator
from clapping_ds.transport import gather

Source = ClappingConfig | Mapping[str, Any] | str | Path
Result = TypeVar("Result")


def on_every_rank(check: Callable[[], Result]) -> Result:
    """What `check` returns. If it raises ValueError or OSError on one rank, every rank raises ValueError
    with that rank's message. A collective of all ranks."""
    result, mistake = None, None
    try:
        result = check()
    except (ValueError, OSError) as error:
        mistake = str(error)
    for rank, text in enumerate(gather(mistake)):
        if text is not None:
            raise ValueError(f"rank {rank}: {text}")
    return result  # type: ignore[return-value]


def agreed(source: Source, model_config: Any, num_ranks: int) -> ClappingConfig:
    """The configuration, if every rank has a valid one and all are equal. A collective of all ranks."""
    config = on_every_rank(lambda: _checked(_read(source), model_config, num_ranks))
    dumps = gather(config.model_dump_json())
    for rank, dump in enumerate(dumps):
        if dump != dumps[0]:
            raise ValueError(
                f"rank {rank} has the configuration {dump}, rank 0 has {dumps[0]}; accepted: the same on "
                "all ranks"
            )
    return config


def _read(source: Source) -> ClappingConfig:
    if isinstance(source, ClappingConfig):
        return source
    block = source if isinstance(source, Mapping) else json.loads(Path(source).read_text())
    if not isinstance(block, Mapping) or BLOCK_NAME not in block:
        raise ValueError(f'no "{BLOCK_NAME}" block in {source!r}; accepted: {{"{BLOCK_NAME}": {{...}}}}')
    return ClappingConfig.from_ds_config(block)


def _checked(config: ClappingConfig, model_config: Any, num_ranks: int) -> ClappingConfig:
    if not config.enabled:
        return config
    if num_ranks < 2:
        raise ValueError(
            f"pipeline_model_parallel_size = {num_ranks}: there is no link to compress; accepted: at least "
            f'2, or "{BLOCK_NAME}": {{"enabled": false}}'
        )
    if config.in_flight not in ("auto", 0):
        raise ValueError(
            f"{BLOCK_NAME}.in_flight = {config.in_flight} with Megatron-Core, which has a schedule of its "
            "own; accepted: 'auto', or 0"
        )
    if config.links is not None:
        raise ValueError(f"{BLOCK_NAME}.links with Megatron-Core: not supported; accepted: null")
    if model_config.pipeline_dtype is None:
        raise ValueError("pipeline_dtype = None; accepted: the dtype of what the stages send")
    if tells_shapes(model_config) and not config.overlap:
        raise ValueError(
            f"{BLOCK_NAME}.overlap = false with variable_seq_lengths or mtp_standalone; accepted: true"
        )
    if model_config.use_ring_exchange_p2p:
        raise ValueError(f'use_ring_exchange_p2p = True with a "{BLOCK_NAME}" block; accepted: False')
    return config


def tells_shapes(model_config: Any) -> bool:
    """Whether Megatron-Core tells the shape of each message before it."""
    return bool(model_config.variable_seq_lengths or getattr(model_config, "mtp_standalone", False))


def check_call(data_iterators: Sequence[Any], num_chunks: int, options: Mapping[str, Any]) -> None:
    """Raises ValueError for what a schedule of one tensor per message and a sampler per chunk cannot do."""
    communicator = options.get("p2p_communicator")
    if communicator is not None and type(communicator) is not P2PCommunicator:
        raise ValueError(
            f'p2p_communicator = {communicator!r} with a "{BLOCK_NAME}" block, which has its own; accepted: '
            "None, or a P2PCommunicator"
        )
    if options.get("adjust_tensor_shapes_fn") is not None:
        raise ValueError(
            f'adjust_tensor_shapes_fn with a "{BLOCK_NAME}" block; accepted: None, one tensor per micro-batch'
        )
    if len(data_iterators) != num_chunks:
        raise ValueError(
            f"{len(data_iterators)} data iterators with {num_chunks} model chunks; accepted: one for each"
        )
    given = [id(iterator) for iterator in data_iterators if iterator is not None]
    if len(set(given)) != len(given):
        raise ValueError(
            "data_iterator: the same object for several model chunks; accepted: an iterator of its own for "
            "each chunk, or None for chunks that take no data"
        )
