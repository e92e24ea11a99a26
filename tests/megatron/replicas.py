"""Replicas that Megatron-Core's own optimizers train on CPU ranks, with its DistributedDataParallel."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import nn

from clapping_ds.hosts.megatron.pipeline import MegatronPipeline
from clapping_ds.link.verification import checksum
from tests import models
from tests.megatron import on_cpu as megatron_cpu
from tests.megatron.on_cpu import parallel as parallel

SMALL_BUCKET = 9000
"""Values: with `overlap_grad_reduce` there are several bucket groups."""
CLIP = 0.1
"""The norm of gradients to which all steps are clipped: Adam alone would hide a wrong factor."""


class Chunk(megatron_cpu.Chunk):
    """With what `finalize_model_grads` asks a model for. ties: the last layer has the embedding's weight."""

    def __init__(self, config: Any, stage_id: int, num_stages: int, ties: bool) -> None:
        super().__init__(config, stage_id, num_stages)
        self.pre_process, self.post_process = self.is_first, self.is_last
        self.share_embeddings_and_output_weights = ties
        if ties and self.is_last:
            torch.manual_seed(7)
            weight = models.Embed().weight if num_stages > 1 else self.layers[0].weight
            self.layers[-1].weight = nn.Parameter(weight.detach().clone()) if num_stages > 1 else weight
        if ties and num_stages > 1 and (self.is_first or self.is_last):
            self.shared_embedding_or_output_weight().shared_embedding = True
            self.shared_embedding_or_output_weight().shared = self.is_last

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        return self.layers[0].weight if self.is_first else self.layers[-1].weight


def forward_step(data_iterator: Any, model: Any) -> Any:
    chunk = model.module
    tokens, labels = next(data_iterator) if chunk.is_first or chunk.is_last else (None, None)
    return chunk(tokens), partial(find_loss, labels, chunk.config.calculate_per_token_loss)


def find_loss(labels: torch.Tensor, per_token: bool, logits: torch.Tensor) -> Any:
    loss = models._loss(logits, labels)
    if not per_token:
        return loss, loss.detach().clone()
    num_tokens = torch.tensor(labels.numel(), dtype=torch.int)
    return loss * num_tokens, num_tokens, loss.detach().clone()


class Run:
    """A training script on one rank. block: as the JSON has it; None: stock Megatron-Core.

    ddp       options of DistributedDataParallelConfig
    options   of the model's configuration
    """

    def __init__(
        self,
        block: dict[str, Any] | None,
        ddp: dict[str, Any] | None = None,
        num_chunks: int = 1,
        ties: bool = False,
        dtype: torch.dtype = torch.float32,
        compresses: bool = True,
        **options: Any,
    ) -> None:
        num_ranks = parallel_state.get_pipeline_model_parallel_world_size()
        rank = parallel_state.get_pipeline_model_parallel_rank()
        num_stages = num_ranks * num_chunks
        settings = DistributedDataParallelConfig(bucket_size=SMALL_BUCKET, **(ddp or {}))
        self.config = megatron_cpu.model_config(num_ranks, num_chunks, **options)
        self.config.pipeline_dtype = dtype if num_ranks > 1 else None
        self.config.finalize_model_grads_func = finalize_model_grads
        stage_ids = [chunk * num_ranks + rank for chunk in range(num_chunks)]
        self.chunks = [
            DistributedDataParallel(
                self.config, settings, Chunk(self.config, stage, num_stages, ties).to(dtype)
            )
            for stage in stage_ids
        ]
        no_syncs = [chunk.no_sync for chunk in self.chunks]
        self.config.no_sync_func = no_syncs if num_chunks > 1 else no_syncs[0]
        is_fp16 = dtype == torch.float16
        scaling = {"initial_loss_scale": 2.0**10, "loss_scale_window": 3, "hysteresis": 1} if is_fp16 else {}
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=3e-3, weight_decay=0.01, clip_grad=CLIP, params_dtype=dtype,
                fp16=is_fp16, bf16=dtype == torch.bfloat16,
                use_distributed_optimizer=settings.use_distributed_optimizer, **scaling,
            ),
            self.chunks, use_gloo_process_groups=False,
        )  # fmt: skip
        if is_fp16:
            self.config.grad_scale_func = self.optimizer.scale_loss
        self.run = get_forward_backward_func()
        self.pipeline = None
        if block is not None:
            self.pipeline = MegatronPipeline({"clapping": block}, self.config)
            self.run = self.pipeline.wrap(self.run)
            if compresses:
                self.pipeline.compress_gradients(self.chunks, self.optimizer)
        self.stage = rank
        self.start_data()

    def start_data(self) -> None:
        replica = parallel_state.get_data_parallel_rank()
        self.data = [
            models.batches(replica) if c.module.is_first or c.module.is_last else None for c in self.chunks
        ]

    def backward(self, **options: Any) -> float | None:
        """Passes of four micro-batches, whose gradients are reduced; their mean loss, on the last stage."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.run(
            forward_step_func=forward_step, model=self.chunks, num_microbatches=4, seq_length=models.BATCH,
            data_iterator=self.data if len(self.data) > 1 else self.data[0], micro_batch_size=models.LENGTH,
            **options,
        )  # fmt: skip
        return sum(map(float, losses)) / len(losses) if losses else None

    def step(self, **options: Any) -> tuple[float | None, float | None]:
        """The loss, and the norm of all gradients; None for that where the step was skipped."""
        loss = self.backward(**options)
        _, norm, _ = self.optimizer.step()
        return loss, norm

    def train(self, steps: int) -> list[tuple[float | None, float | None]]:
        return [self.step() for _ in range(steps)]

    def weights(self) -> tuple[int, list[int]]:
        """This rank's stage, and checksums."""
        for chunk in self.chunks:
            if chunk.use_forward_hook:  # replicas gather the weights of others in the next forward pass
                chunk.disable_forward_pre_hook()
                chunk.enable_forward_pre_hook()
        return self.stage, [checksum(p.detach()) for chunk in self.chunks for p in chunk.parameters()]

    def state_dict(self) -> dict[str, Any]:
        return {
            "chunks": [chunk.state_dict() for chunk in self.chunks],
            "optimizer": [each.optimizer.state_dict() for each in self.optimizer.chained_optimizers],
            "masters": self._list_masters(),
            "clapping": self.pipeline.state_dict(),
        }

    def _list_masters(self) -> list[torch.Tensor]:
        """Of this rank's parts of weights."""
        optimizers = self.optimizer.chained_optimizers
        groups = [
            group for each in optimizers for group in getattr(each, "shard_fp32_from_float16_groups", [])
        ]
        return [master for group in groups for master in group]

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        for chunk, saved in zip(self.chunks, state["chunks"], strict=True):
            chunk.load_state_dict(saved)
        for each, saved in zip(self.optimizer.chained_optimizers, state["optimizer"], strict=True):
            each.optimizer.load_state_dict(saved)
        for master, saved in zip(self._list_masters(), state["masters"], strict=True):
            master.data.copy_(saved)
        return self.pipeline.load_state_dict(state["clapping"])

    @property
    def exchange(self) -> Any:
        return self.pipeline.gradients.averaging.exchange
