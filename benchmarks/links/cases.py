"""Pipelines that are not at hand: models, links, methods, and what a step of each is made of.

Assumed:

* GPT, sequences of 2048 tokens, one sequence per micro-batch, 4 micro-batches per stage and step, bf16.
* 140 TFLOP/s per GPU, with which Megatron-LM (arXiv 2104.04473, section 5.1) estimates the time to train
  175B on A100; it measured 137 to 163. Counted as there: a layer's forward takes 24 t w^2 + 4 t^2 w for t
  tokens of width w, its backward twice that and the forward again, as activations are recomputed; the
  logits take 2 t w v forward and twice that backward, v = 51200.
* A stage is one GPU of 80 GB; of the 1T model, eight with tensor parallelism. Stages have whole layers,
  split so that the slowest is as fast as can be; the logits are the last stage's.
* Memory: 16 bytes per parameter (weights, gradients, Adam), the layers' inputs of each stored micro-batch,
  and of error feedback 2 bytes per value, slot and end of a channel, on the GPU.
* Codecs and optimizer move their bytes at 1.5 TB/s. Codecs were never timed on a GPU: this is the least
  they need if bound by memory, and it occupies the stage.
* Every pair of stages has a link of its own, the same in both directions. A send is done for its sender
  when the last 4 MiB, NCCL's default buffer, are on their way; stock DeepSpeed waits for that.
* Replicas all-reduce their bf16 gradients in a ring, uncompressed, after the last backward, over links
  of the same speed.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

import torch

from clapping_ds import ClappingConfig
from clapping_ds.autotune.depth import count_warmup
from clapping_ds.codecs import bits_per_value
from clapping_ds.config import Plan
from clapping_ds.plan.machines import BUFFER_BYTES
from clapping_ds.plan.timeline import Link, Stage, Step, slot_bytes

SEQUENCE_LENGTH, VOCABULARY = 2048, 51200
MICRO_BATCHES_PER_STAGE = 4
FLOPS_PER_S, GPU_BYTES_PER_S, GPU_MEMORY_BYTES = 140e12, 1.5e12, 80e9
BYTES_PER_PARAMETER, VALUE_BYTES = 16, 2


@dataclass(frozen=True)
class Model:
    name: str
    num_layers: int
    width: int
    gpus_per_stage: int = 1

    @property
    def message_bytes(self) -> int:
        """One micro-batch's activations, or their gradients."""
        return SEQUENCE_LENGTH * self.width * VALUE_BYTES

    @property
    def layer_flop(self) -> float:
        """A layer's forward."""
        return SEQUENCE_LENGTH * self.width * (24 * self.width + 4 * SEQUENCE_LENGTH)

    @property
    def logits_flop(self) -> float:
        """The logits' forward."""
        return 2 * SEQUENCE_LENGTH * self.width * VOCABULARY

    def layers_per_stage(self, num_stages: int) -> tuple[int, ...]:
        """The split whose slowest stage is fastest."""
        logits = 3 * self.logits_flop / (4 * self.layer_flop)  # in layers; only these recompute
        others = num_stages - 1

        def slowest(on_last: int) -> float:
            return max(math.ceil((self.num_layers - on_last) / others), on_last + logits)

        on_last = min(range(1, self.num_layers - others + 1), key=slowest)
        least, num_larger = divmod(self.num_layers - on_last, others)
        return (least + 1,) * num_larger + (least,) * (others - num_larger) + (on_last,)

    def parameters_per_stage(self, num_stages: int) -> list[int]:
        found = [12 * self.width**2 * layers for layers in self.layers_per_stage(num_stages)]
        found[0] += VOCABULARY * self.width
        found[-1] += VOCABULARY * self.width
        return found


MODELS = (
    Model("GPT-3 1.3B", 24, 2048),
    Model("GPT-3 2.7B", 32, 2560),
    Model("GPT-3 6.7B", 32, 4096),
    Model("GPT-3 13B", 40, 5120),
    Model("OPT 30B", 48, 7168),
    Model("GPT-3 175B", 96, 12288),
    Model("Megatron 1T", 128, 25600, gpus_per_stage=8),
)
"""Layers and widths: arXiv 2005.14165 table 2.1, 2205.01068 table 1, 2104.04473 table 1."""

LINKS = {
    "80 Mbit/s, 20 ms": Link(10e6, 20e-3, BUFFER_BYTES),
    "1 Gbit/s, 20 ms": Link(125e6, 20e-3, BUFFER_BYTES),
    "10 Gbit/s, 50 us": Link(1.25e9, 50e-6, BUFFER_BYTES),
    "25 Gbit/s, 50 us": Link(3.125e9, 50e-6, BUFFER_BYTES),
    "100 Gbit/s, 50 us": Link(12.5e9, 50e-6, BUFFER_BYTES),
}
"""The first two between regions, the others in a data centre."""


def _plan(strategy: str, codec: str, key: str | None = None) -> Plan:
    """Of either direction."""
    if strategy == "direct":
        return ClappingConfig.model_validate({"activations": {"codec": codec}}).plan("activations")
    direction = {"delta": codec} if key is None else {"delta": codec, "key": key}
    block = {"strategy": strategy, "activations": direction, "gradients": direction}
    lazy = {"p_new": 0.5, "refresh": "cycle"}
    return ClappingConfig.model_validate({**block, "lazy": lazy}).plan("activations")


STOCK, OVERLAP = "stock", "overlap only"
RAW = _plan("direct", "none")
METHODS = {
    STOCK: RAW,
    OVERLAP: RAW,
    "direct int4": _plan("direct", "int4"),
    "direct eden2": _plan("direct", "eden2"),
    "fc int2": _plan("fc", "int2"),
    "int8 key + int2 delta": _plan("key_delta", "int2", key="int8"),
    "fu int4": _plan("fu", "int4"),
}


@dataclass(frozen=True)
class Case:
    """A pipeline that is asked about."""

    model: Model
    num_stages: int
    link: Link
    plan: Plan

    @property
    def num_micro_batches(self) -> int:
        return MICRO_BATCHES_PER_STAGE * self.num_stages

    @property
    def mean_bits(self) -> float:
        return self.plan.mean_bits_per_value(torch.bfloat16)

    def step(self) -> Step:
        """Without data parallelism."""
        rate = FLOPS_PER_S * self.model.gpus_per_stage
        layers = self.model.layers_per_stage(self.num_stages)
        codec_s = self._codec_s()
        stages = [
            Stage(n * self.model.layer_flop / rate, 3 * n * self.model.layer_flop / rate, codec_s, codec_s)
            for n in layers
        ]
        logits_s = self.model.logits_flop / rate
        stages[-1] = replace(
            stages[-1],
            forward_s=stages[-1].forward_s + logits_s,
            backward_s=stages[-1].backward_s + 2 * logits_s,
        )
        messages = self._messages()
        links = (self.link,) * (self.num_stages - 1)
        return Step(tuple(stages), links, messages, messages, overhead_s=self._optimizer_s())

    def _messages(self) -> tuple[float, ...]:
        key_bytes, delta_bytes = (
            self.model.message_bytes * bits_per_value(codec, torch.bfloat16) / (8 * VALUE_BYTES)
            for codec in (self.plan.key, self.plan.delta)
        )
        return slot_bytes(self.num_micro_batches, key_bytes, delta_bytes, self.plan.p_new)

    def _codec_s(self) -> float:
        if self.plan is RAW:
            return 0.0
        bytes_per_value = VALUE_BYTES * (3 if self.plan.holds_memory else 1) + self.mean_bits / 8
        return self.model.message_bytes / VALUE_BYTES * bytes_per_value / GPU_BYTES_PER_S

    def _optimizer_s(self) -> float:
        most = max(self.model.parameters_per_stage(self.num_stages)) / self.model.gpus_per_stage
        return 2 * BYTES_PER_PARAMETER * most / GPU_BYTES_PER_S

    def all_reduce_s(self, replicas: int) -> float:
        most = max(self.model.parameters_per_stage(self.num_stages)) * VALUE_BYTES
        carried = 2 * (replicas - 1) / replicas * most / self.link.bytes_per_s
        return carried + 2 * (replicas - 1) * self.link.latency_s

    def memory_bytes(self, in_flight: int) -> float:
        """Of the fullest GPU."""
        layers = self.model.layers_per_stage(self.num_stages)
        found = []
        for stage_id, parameters in enumerate(self.model.parameters_per_stage(self.num_stages)):
            stored = count_warmup(self.num_micro_batches, self.num_stages, stage_id, in_flight)
            ends = 2 * ((stage_id > 0) + (stage_id < self.num_stages - 1)) if self.plan.holds_memory else 0
            messages = stored * layers[stage_id] + self.num_micro_batches * ends
            weights = BYTES_PER_PARAMETER * parameters / self.model.gpus_per_stage
            found.append(weights + messages * self.model.message_bytes)
        return max(found)

    def deepest(self) -> int:
        """The largest `in_flight` that a GPU's memory allows; -1 where none does."""
        depths = range(self.num_micro_batches)
        return bisect_right(depths, GPU_MEMORY_BYTES, key=self.memory_bytes) - 1
