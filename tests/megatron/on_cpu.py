"""Small models that Megatron-Core trains on CPU ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from clapping_ds.hosts.megatron.pipeline import MegatronPipeline
from launch.megatron_on_cpu import on_cpu
from tests import models

NUM_LAYERS = 8


@contextmanager
def parallel(num_ranks: int, num_chunks: int = 1, **sizes: int) -> Iterator[None]:
    """Megatron-Core's process groups for pipelines of `num_ranks` ranks."""
    virtual = num_chunks if num_chunks > 1 else None
    with on_cpu():
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=num_ranks,
            virtual_pipeline_model_parallel_size=virtual,
            create_gloo_process_groups=False,
            **sizes,
        )
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def model_config(num_ranks: int, num_chunks: int = 1, **options: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=NUM_LAYERS, hidden_size=models.WIDTH, num_attention_heads=2, pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=num_ranks,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None, **options,
    )  # fmt: skip


class Chunk(nn.Module):
    """Some layers of tests.models.pipeline, with the weights that they have there."""

    def __init__(self, config: TransformerConfig, stage_id: int, num_stages: int) -> None:
        super().__init__()
        kinds = [models.Embed, *[models.Mix] * 6, partial(nn.Linear, models.WIDTH, models.VOCABULARY)]
        per_stage = NUM_LAYERS // num_stages
        self.layers = nn.ModuleList()
        for number in range(stage_id * per_stage, (stage_id + 1) * per_stage):
            torch.manual_seed(7 + number)
            self.layers.append(kinds[number]())
        self.config = config
        self.model_type = ModelType.encoder_or_decoder
        self.is_first, self.is_last = stage_id == 0, stage_id == num_stages - 1

    def set_input_tensor(self, received: list[torch.Tensor | None]) -> None:
        self.received = received[0]

    def forward(self, tokens: torch.Tensor | None) -> torch.Tensor:
        x = tokens if self.is_first else self.received
        for layer in self.layers:
            x = layer(x)
        return x


def forward_step(data_iterator: Any, model: Chunk) -> Any:
    tokens, labels = next(data_iterator) if model.is_first or model.is_last else (None, None)
    if model.config.sequence_parallel and tokens is not None:
        tokens, labels = (_own_part(tensor) for tensor in (tokens, labels))
    return model(tokens), partial(loss, labels)


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The first dimension is the one that sequence parallelism cuts."""
    num_parts = parallel_state.get_tensor_model_parallel_world_size()
    return tensor.chunk(num_parts)[parallel_state.get_tensor_model_parallel_rank()]


def loss(labels: torch.Tensor, logits: torch.Tensor) -> Any:
    found = models._loss(logits, labels)
    return found, found.detach().clone()


def batches(lengths: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """As tests.models.batches, of one length after the other."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for length in lengths:
            tokens = torch.randint(0, models.VOCABULARY, (models.BATCH, length), generator=generator)
            yield tokens, (tokens * 3 + 1) % models.VOCABULARY


class Trainer:
    """A training script on one rank. clapping: the block; None: stock Megatron-Core."""

    def __init__(
        self,
        clapping: dict[str, Any] | None,
        num_chunks: int = 1,
        lengths: tuple[int, ...] = (models.LENGTH,),
        num_micro_batches: int = 4,
        **options: Any,
    ) -> None:
        num_ranks = parallel_state.get_pipeline_model_parallel_world_size()
        rank = parallel_state.get_pipeline_model_parallel_rank()
        if len(lengths) > 1:
            options |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
        self.config = model_config(num_ranks, num_chunks, **options)
        num_stages = num_ranks * num_chunks
        stage_ids = [chunk * num_ranks + rank for chunk in range(num_chunks)]
        self.model = nn.ModuleList(Chunk(self.config, stage, num_stages) for stage in stage_ids)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.data = [batches(lengths) if c.is_first or c.is_last else None for c in self.model]
        self.num_micro_batches = num_micro_batches
        self.length = models.LENGTH
        self.run = get_forward_backward_func()
        self.grad_scale = 1.0
        self.pipeline = None
        if clapping is not None:
            self.pipeline = MegatronPipeline({"clapping": clapping}, self.config)
            self.run = self.pipeline.wrap(self.run)

    def losses_of_pass(self, data: Any, forward_only: bool = False) -> list[float]:
        found = self.run(
            forward_step_func=forward_step, data_iterator=data, model=list(self.model),
            num_microbatches=self.num_micro_batches, seq_length=models.BATCH,
            micro_batch_size=self.length, forward_only=forward_only,
        )  # fmt: skip
        return [float(loss) for loss in found]

    def step(self) -> float | None:
        """Mean loss of the micro-batches, on the last rank."""
        self.optimizer.zero_grad()
        losses = self.losses_of_pass(self.data)
        for weight in self.model.parameters():
            weight.grad /= self.grad_scale
        self.optimizer.step()
        return sum(losses) / len(losses) if losses else None

    def evaluate(self, lengths: tuple[int, ...] = (models.LENGTH,)) -> list[float]:
        data = [batches(lengths) for _ in self.model]
        with torch.no_grad():
            return self.losses_of_pass(data, forward_only=True)


def memories(pipeline: MegatronPipeline) -> dict[tuple[str, str], Any]:
    """As tests.models.memories, of all chunks: for each channel, those of the ends that are here."""
    found: dict[tuple[str, str], list[Any]] = {}
    for stage in pipeline.endpoints.stages:
        for name, held in models.channel_memories(stage.channels.values()).items():
            found.setdefault(name, []).append(held)
    return found


def train(
    clapping: dict[str, Any] | None, num_ranks: int, num_chunks: int = 1, steps: int = 4, **options: Any
) -> tuple[list[float | None], dict[Any, Any]]:
    """Losses, and memories by (link, direction), of a new training run."""
    with parallel(num_ranks, num_chunks):
        trainer = Trainer(clapping, num_chunks, **options)
        losses = [trainer.step() for _ in range(steps)]
        return losses, memories(trainer.pipeline) if trainer.pipeline else {}
