"""What is checked before Megatron-Core trains: the configuration, and what a schedule is called with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from clapping_ds.config import BLOCK_NAME, ClappingConfig, DataParallelConfig
from clapping_ds.gradients.averaging import KEY
from clapping_ds.hosts.megatron.core import VERSION, P2PCommunicator
from clapping_ds.link.groups import Control
from clapping_ds.stage.handshake import (
    Source,
    agree_on_config,
    read_source,
    refuse_tuning,
    refuse_without_links,
)


def agree(
    source: Source, model_config: Any, num_ranks: int, device: torch.device
) -> tuple[ClappingConfig, Control]:
    """The configuration, if every rank has a valid one and all are equal, and the means to agree on more. A
    collective of all ranks.

    Raises ValueError on every rank, with the same text: for a file that is missing or no JSON object, a wrong
    block, configurations or pipelines that differ, and what cannot be done with Megatron-Core.
    """
    facts = {
        "pipeline_model_parallel_size": num_ranks,
        "virtual_pipeline_model_parallel_size": model_config.virtual_pipeline_model_parallel_size,
        "pipeline_dtype": model_config.pipeline_dtype,
        "variable_seq_lengths or mtp_standalone": tells_shapes(model_config),
        "use_ring_exchange_p2p": model_config.use_ring_exchange_p2p,
        "megatron.core.__version__": VERSION,
    }
    config, control = agree_on_config(lambda: read_source(source), facts, device)
    if config.enabled:
        _check(config, model_config, num_ranks)
    return config, control


def _check(config: ClappingConfig, model_config: Any, num_ranks: int) -> None:
    """Of facts that are the same on every rank."""
    refuse_without_links(config, f"pipeline_model_parallel_size = {num_ranks}", num_ranks)
    refuse_tuning(config, "Megatron-Core")
    if config.data_parallel is not None:
        _check_data_parallel(config.data_parallel)
    if model_config.pipeline_dtype is None and num_ranks > 1:
        raise ValueError("pipeline_dtype = None; accepted: the dtype of what the stages send")
    if tells_shapes(model_config) and not config.overlap:
        raise ValueError(
            f"{BLOCK_NAME}.overlap = false with variable_seq_lengths or mtp_standalone; accepted: true"
        )
    if model_config.use_ring_exchange_p2p:
        raise ValueError(f'use_ring_exchange_p2p = True with a "{BLOCK_NAME}" block; accepted: False')


def _check_data_parallel(plan: DataParallelConfig) -> None:
    if plan.delay:
        raise ValueError(
            f"{KEY}.delay = {plan.delay} with Megatron-Core, which uses gradients at once; accepted: 0"
        )


def tells_shapes(model_config: Any) -> bool:
    """Whether Megatron-Core tells the shape of each message before it."""
    return bool(model_config.variable_seq_lengths or getattr(model_config, "mtp_standalone", False))


def check_first_call(
    control: Control,
    data_iterators: Sequence[Any],
    num_chunks: int,
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
    model_config: Any,
    lacks_gradients: bool = False,
) -> None:
    """As `check_call`, and that `facts` are the same everywhere; the same ValueError on every rank. A
    collective of all ranks.

    lacks_gradients   whether replicas shall compress gradients, and nobody said where they are
    """

    def check() -> None:
        check_call(data_iterators, num_chunks, options)
        if lacks_gradients:
            raise ValueError(
                f"{KEY} in a training step before compress_gradients; accepted: "
                f"MegatronPipeline.compress_gradients(model_chunks, optimizer) first, or {KEY} = null"
            )

    control.check(check)
    # Both ends of a link must know the loss scale, though only the last stage uses it.
    control.check_equal({**facts, "has a grad_scale_func": model_config.grad_scale_func is not None})


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
