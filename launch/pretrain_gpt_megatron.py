"""Trains Megatron-Core's own GPTModel over a pipeline of GPUs, with or without compression.

torchrun --nproc_per_node 2 -m launch.pretrain_gpt_megatron --clapping-config launch/ds_config.json
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from clapping_ds.hosts.megatron.pipeline import MegatronPipeline
from launch.data import Windows, tokens
from launch.trainer import RunResult, trained_steps


@dataclass(frozen=True)
class MegatronRun:
    """What is trained, on what, how, how long. The compression is in the JSON."""

    data: Path | None = None
    """Folder or file of text, or a file of numbers (.u8, .u16, .u32); None: Python's own sources."""
    tokenizer: Path | None = None
    """A file of the tokenizers library; None: the tokens are bytes."""
    pipeline_size: int = 2
    """Stages of the pipeline."""
    chunks: int = 1
    """Model chunks per rank; with more than one the schedule is interleaved."""
    tensor_size: int = 1
    """Ranks that share the tensors of a stage."""
    sequence_parallel: bool = False
    """Those ranks share the tokens of a sample as well."""
    blocks: int = 4
    """Transformer blocks of the whole model."""
    width: int = 128
    """Values per token between two blocks."""
    heads: int = 4
    """Heads of attention; they share the width."""
    length: int = 128
    """Tokens of a sample."""
    batch_size: int = 4
    """Samples of a micro-batch."""
    micro_batches: int = 4
    """Micro-batches of a step, per replica."""
    steps: int = 320
    """Optimizer steps."""
    learning_rate: float = 2e-3
    """At the end of the warm-up; a cosine takes it down to a tenth."""
    warmup_steps: int = 40
    """Steps in which the learning rate rises."""
    weight_decay: float = 0.1
    """Of Adam."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0: any."""
    dtype: str = "bfloat16"
    """Of weights and messages: a name in torch."""
    distributed_optimizer: bool = False
    """The optimizer is split over replicas."""
    eval_interval: int = 40
    """Steps between two validations; there is one after the last step as well."""
    eval_batches: int = 5
    """Batches of each validation."""
    seed: int = 1
    """Of the weights and of the order of the data."""


@dataclass(frozen=True)
class Options:
    """What the script is started with."""

    run: MegatronRun = field(default_factory=MegatronRun)
    clapping_config: Path | None = None
    """JSON with the "clapping" block; None: stock Megatron-Core."""


def transformer_config(run: MegatronRun) -> TransformerConfig:
    dtype = getattr(torch, run.dtype)
    return TransformerConfig(
        num_layers=run.blocks,
        hidden_size=run.width,
        num_attention_heads=run.heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=run.tensor_size,
        sequence_parallel=run.sequence_parallel,
        pipeline_model_parallel_size=run.pipeline_size,
        virtual_pipeline_model_parallel_size=run.chunks if run.chunks > 1 else None,
        overlap_p2p_comm=run.chunks > 1,
        batch_p2p_comm=run.chunks == 1,
        deallocate_pipeline_outputs=run.chunks == 1,  # with overlap, sends may still read them
        finalize_model_grads_func=finalize_model_grads,
    )


def model_chunks(run: MegatronRun, config: TransformerConfig, vocabulary: int) -> list[Any]:
    """This rank's part of the GPT, one module per chunk. The weights depend on the seed and the cut."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(run.seed)
    chunks = []
    for chunk in range(run.chunks):
        torch.manual_seed(run.seed * 1000 + chunk * run.pipeline_size + rank)
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            vocab_size=vocabulary,
            max_sequence_length=run.length,
            pre_process=rank == 0 and chunk == 0,
            post_process=rank == run.pipeline_size - 1 and chunk == run.chunks - 1,
            vp_stage=chunk if run.chunks > 1 else None,
        )
        model = model.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
        settings = DistributedDataParallelConfig(use_distributed_optimizer=run.distributed_optimizer)
        chunks.append(DistributedDataParallel(config, settings, model))
    return chunks


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """Megatron-Core's contract: the stage's output, and what makes (loss, figure to report) of it."""
    inputs, labels = next(data_iterator) if data_iterator is not None else (None, None)
    positions = None if inputs is None else torch.arange(inputs.shape[1], device=inputs.device)[None]
    output = model(inputs, positions, None, labels=labels if model.module.post_process else None)
    return output, mean_loss


def mean_loss(losses_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = losses_BT.float().mean()
    return loss, loss.detach().clone()


def batches(run: MegatronRun, windows: Windows, chunks: list[Any], seed: int) -> list[Iterator[Any] | None]:
    """An iterator for each chunk that reads data; equal ones on the first and the last stage."""
    device = torch.cuda.current_device()

    def on_device() -> Iterator[Any]:
        for inputs, labels in windows.batches(seed):
            yield inputs.to(device), labels.to(device)

    reads = [chunk.module.pre_process or chunk.module.post_process for chunk in chunks]
    return [on_device() if chunk_reads else None for chunk_reads in reads]


def mean_of_ranks(losses: list[torch.Tensor]) -> float:
    """The last stage's mean loss, over all replicas; the same on every rank."""
    mean = torch.stack(losses).mean() if losses else torch.zeros((), device=torch.cuda.current_device())
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(mean, last, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
    return float(mean) / parallel_state.get_data_parallel_world_size()


def make_optimizer(run: MegatronRun, config: TransformerConfig, chunks: list[Any]) -> tuple[Any, Any]:
    """Megatron-Core's optimizer, and its schedule of learning rate: warm-up, then a cosine down to 0.1."""
    settings = OptimizerConfig(
        optimizer="adam", lr=run.learning_rate, min_lr=run.learning_rate / 10,
        weight_decay=run.weight_decay, adam_beta2=0.95, clip_grad=run.clip_grad,
        bf16=config.bf16, params_dtype=config.params_dtype,
        use_distributed_optimizer=run.distributed_optimizer,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    schedule = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=run.learning_rate, min_lr=run.learning_rate / 10,
        lr_warmup_steps=run.warmup_steps, lr_decay_steps=max(run.steps, run.warmup_steps + 1),
        lr_decay_style="cosine", start_wd=run.weight_decay, end_wd=run.weight_decay,
        wd_incr_steps=run.steps, wd_incr_style="constant",
    )  # fmt: skip
    return optimizer, schedule


class Trainer:
    """One training run on this rank. clapping: what the JSON holds; None: stock Megatron-Core."""

    def __init__(self, run: MegatronRun, clapping: dict[str, Any] | None) -> None:
        corpus, vocabulary = tokens(run.data, run.tokenizer)
        self.run = run
        self.config = transformer_config(run)
        self.chunks = model_chunks(run, self.config, vocabulary)
        self.optimizer, self.schedule = make_optimizer(run, self.config, self.chunks)
        no_syncs = [chunk.no_sync for chunk in self.chunks]
        self.config.no_sync_func = no_syncs if run.chunks > 1 else no_syncs[0]
        forward_backward = get_forward_backward_func()
        self.pipeline = None
        if clapping is not None:
            self.pipeline = MegatronPipeline(clapping, self.config)
            forward_backward = self.pipeline.wrap(forward_backward)
            self.pipeline.compress_gradients(self.chunks, self.optimizer)
        self.passes = partial(
            forward_backward, forward_step_func=forward_step, model=self.chunks,
            seq_length=run.length, micro_batch_size=run.batch_size,
        )  # fmt: skip
        self.held_out = Windows(corpus, run.length, run.batch_size, validation=True)
        windows = Windows(corpus, run.length, run.batch_size, validation=False)
        seed = run.seed * 1000 + parallel_state.get_data_parallel_rank()
        self.data = batches(run, windows, self.chunks, seed)

    def step(self) -> float:
        """Trains on one batch; the mean loss of its micro-batches, on every rank."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.schedule.step(increment=1)
        losses = self.passes(data_iterator=self.data, num_microbatches=self.run.micro_batches)
        self.optimizer.step()
        return mean_of_ranks(losses)

    def validation_loss(self) -> float:
        """On the same batches at every call."""
        data = batches(self.run, self.held_out, self.chunks, self.run.seed)
        num_batches = self.run.eval_batches * self.run.micro_batches
        with torch.no_grad():
            return mean_of_ranks(
                self.passes(data_iterator=data, num_microbatches=num_batches, forward_only=True)
            )


def train(run: MegatronRun, clapping: dict[str, Any] | None, title: str = "train") -> RunResult:
    """Trains from scratch."""
    trainer = Trainer(run, clapping)
    num_replicas = parallel_state.get_data_parallel_world_size()
    tokens_per_step = run.micro_batches * run.batch_size * run.length * num_replicas
    result = RunResult()
    pipeline = trainer.pipeline
    traffic = None if pipeline is None else pipeline.clapping_traffic
    for step in trained_steps(result, run.steps, tokens_per_step, trainer.step, traffic, title):
        if step % run.eval_interval == 0 or step == run.steps:
            report = [] if pipeline is None else pipeline.clapping_report()
            result.validate(step, report, trainer.validation_loss())
    return result


def start_parallel(run: MegatronRun) -> None:
    """Megatron-Core's process groups for the run's sizes."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=run.tensor_size,
        pipeline_model_parallel_size=run.pipeline_size,
        virtual_pipeline_model_parallel_size=run.chunks if run.chunks > 1 else None,
        create_gloo_process_groups=False,
    )


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options; every field of MegatronRun is one. None: those of this process."""
    return tyro.cli(Options, description=__doc__, args=arguments, config=(tyro.conf.OmitArgPrefixes,))


def main() -> None:
    options = parse()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    start_parallel(options.run)
    path = options.clapping_config
    result = train(options.run, None if path is None else json.loads(path.read_text()))
    result.print()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
