"""Ways to train a model on given machines: what a step of each takes, in seconds and in bytes of memory.

Assumed, for all of them:

* A micro-batch is one sequence, in 16 bits. Layers are recomputed in the backward pass, which costs one more
  forward pass; what is kept of a micro-batch is the input of each layer, and while a layer is recomputed 34
  bytes for each of its values (arXiv 2205.05198), and 6 for each logit.
* Bytes per parameter: 16 to train it (weights, gradients, fp32 weights and Adam), 2 where it is frozen, 0.56
  where it is frozen in 4 bits. LoRA trains a hundredth; its backward pass finds gradients of inputs alone.
* Data parallelism: gradients of 16 bits in a ring, while the last micro-batch's backward pass runs.
* ZeRO-3: every micro-batch gathers all weights twice and scatters gradients once, while it computes. ZeRO++:
  weights in 8 bits, once, as each node keeps them; gradients in 4 bits (arXiv 2306.10209).
* Pipelines: a stage per GPU, nodes in a row. The codec takes what the memory needs to read and write.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from clapping_ds.autotune.depth import count_warmup
from clapping_ds.codecs import bits_per_value
from clapping_ds.config import ClappingConfig
from clapping_ds.plan.bounds import automatic_depth
from clapping_ds.plan.machines import BUFFER_BYTES, Machines
from clapping_ds.plan.models import Model
from clapping_ds.plan.timeline import Link, Stage, Step, simulate

VALUE_BYTES = 2
LAYER_BYTES_PER_VALUE, LOGIT_BYTES = 34, 6
INSIDE_LATENCY_S = 10e-6


class Training(NamedTuple):
    """frozen_bytes: per parameter, 0 where all are trained. share: of parameters, that are trained. backward:
    in forward passes, the recomputed one included."""

    frozen_bytes: float
    share: float
    backward: float

    @property
    def bytes_per_parameter(self) -> float:
        return 16 * self.share + self.frozen_bytes


TRAININGS = {
    "full": Training(0.0, 1.0, 3.0),
    "lora": Training(2.0, 0.01, 2.0),
    "qlora": Training(0.56, 0.01, 2.0),
}

NONE = {"activations": {"codec": "none"}, "gradients": {"codec": "none"}}
TRANSFORM = {"name": "transform", "bits": 3, "anchors": 1024}
CODECS: dict[str, Any] = {"fp8_e4m3": "fp8_e4m3", "eden4": "eden4", "transform, 3 bits": TRANSFORM}
"""Of activations and gradients."""
LOSSES = {
    "fp8_e4m3": {1: 0.000, 3: 0.002, 7: 0.005},
    "eden4": {1: 0.007, 3: 0.029, 7: 0.111},
    "transform, 3 bits": {1: 0.012, 3: 0.031, 7: 0.076},
}
"""By codec and number of links: what compressing activations adds to the loss of SmolLM2-135M, in nats per
token, where nothing is trained (`benchmarks.model.damage`)."""


@dataclass(frozen=True)
class Estimate:
    """Of one way to train."""

    way: str
    step_s: float
    memory_bytes: float
    """Of the fullest GPU."""
    wire_bytes: float
    """That a step sends between two nodes, in the busier direction."""
    block: Mapping[str, Any] | None = None
    """The "clapping" block; None: this package has no part in it."""
    num_links: int = 0
    """Compressed, in a pipeline."""
    codec: str = "none"
    trains_as_asked: bool = True
    """False: adapters alone, where all weights were asked for."""

    @property
    def added_loss(self) -> float:
        """At the next larger number of links that was measured; 0 where nothing is compressed."""
        known = LOSSES.get(self.codec, {})
        return known[min((n for n in known if n >= self.num_links), default=max(known))] if known else 0.0


@dataclass(frozen=True)
class Task:
    """What is trained, and on what. batch: sequences of a step, on all GPUs together."""

    model: Model
    machines: Machines
    batch: int
    training: Training = TRAININGS["full"]

    def compute_s(self, num_sequences: float) -> float:
        """Of one GPU, forward and backward."""
        model = self.model
        forward = model.num_layers * model.layer_flop + model.head_flop
        return num_sequences * forward * (1 + self.training.backward) / self.machines.flop_per_s

    def whole_bytes(self) -> float:
        """Of a GPU that has the whole model."""
        return self.training.bytes_per_parameter * self.model.parameters + self.working_bytes(
            self.model.num_layers, has_head=True
        )

    def working_bytes(self, num_kept: float, has_head: bool) -> float:
        """Beside weights. num_kept: inputs of layers."""
        values = self.model.length * self.model.width
        logits = self.model.length * self.model.vocabulary * LOGIT_BYTES if has_head else 0
        return num_kept * VALUE_BYTES * values + LAYER_BYTES_PER_VALUE * values + logits


def list_ways(task: Task) -> Iterator[Estimate]:
    """All that the machines allow, whether they fit or not."""
    machines = task.machines
    yield Estimate("one GPU", task.compute_s(task.batch), task.whole_bytes(), 0.0)
    if task.training.share == 1:
        lora = replace(task, training=TRAININGS["lora"])
        step_s, memory_bytes = lora.compute_s(task.batch), lora.whole_bytes()
        yield Estimate("one GPU, LoRA", step_s, memory_bytes, 0.0, trains_as_asked=False)
    if machines.gpus_per_node > 1:
        inside = replace(task, machines=machines._replace(num_nodes=1))
        yield from _list_data_parallel(inside, "one node, ")
    if machines.num_nodes > 1:
        yield from _list_data_parallel(task, "")
        yield from _list_zero(task)
    for per_pipeline in range(1, machines.num_nodes + 1):
        has_links = per_pipeline * machines.gpus_per_node > 1
        if (
            machines.num_nodes % per_pipeline == 0
            and has_links
            and (per_pipeline > 1 or machines.num_nodes == 1)
        ):
            yield from _list_pipelines(task, per_pipeline)


def _list_data_parallel(task: Task, place: str) -> Iterator[Estimate]:
    machines = task.machines
    per_gpu = -(-task.batch // machines.num_gpus)
    hidden_s = task.compute_s(1) * task.training.backward / (1 + task.training.backward)
    codecs = {"": 8.0 * VALUE_BYTES}
    if machines.num_nodes > 1:
        codecs[", eden4"] = bits_per_value(ClappingConfig().plan("gradients").key, torch.bfloat16)
    for name, bits in codecs.items():
        exchange_s, wire_bytes = _exchange(task, machines.num_nodes, task.model.parameters, bits)
        yield Estimate(
            f"{place}data parallel{name}",
            task.compute_s(per_gpu) + max(0.0, exchange_s - hidden_s),
            task.whole_bytes(),
            wire_bytes,
            {**NONE, "data_parallel": {}} if name else None,
        )


def _exchange(task: Task, num_nodes: int, parameters: float, bits: float) -> tuple[float, float]:
    """Seconds and bytes between nodes of the mean of gradients: a ring."""
    if num_nodes == 1:
        num_bytes = 2 * task.training.share * parameters * bits / 8
        return num_bytes / task.machines.inside_bytes_per_s, 0.0
    num_bytes = 2 * (num_nodes - 1) / num_nodes * task.training.share * parameters * bits / 8
    machines = task.machines
    return num_bytes / machines.bytes_per_s + 2 * (num_nodes - 1) * machines.latency_s, num_bytes


def _list_zero(task: Task) -> Iterator[Estimate]:
    machines, parameters = task.machines, task.model.parameters
    per_gpu = -(-task.batch // machines.num_gpus)
    weights_bytes = (task.training.frozen_bytes or VALUE_BYTES) * parameters
    gradients_bytes = task.training.share * VALUE_BYTES * parameters
    share = (machines.num_gpus - 1) / machines.num_gpus
    kept = task.training.bytes_per_parameter * parameters
    working = (
        task.working_bytes(task.model.num_layers, has_head=True) + 2 * weights_bytes / task.model.num_layers
    )
    for name, wire_bytes, memory in (
        ("ZeRO-3", 2 * weights_bytes + gradients_bytes, kept / machines.num_gpus),
        (
            "ZeRO++",
            min(parameters, weights_bytes) + gradients_bytes / 4,
            kept / machines.num_gpus + weights_bytes / machines.gpus_per_node,
        ),
    ):
        wire_s = share * wire_bytes / machines.bytes_per_s
        step_s = per_gpu * max(task.compute_s(1), wire_s)
        yield Estimate(name, step_s, memory + working, per_gpu * share * wire_bytes)


def _list_pipelines(task: Task, nodes_per_pipeline: int) -> Iterator[Estimate]:
    num_stages = nodes_per_pipeline * task.machines.gpus_per_node
    if num_stages > task.model.num_layers:
        return
    replicas = task.machines.num_nodes // nodes_per_pipeline
    shape = f"pipeline of {num_stages}" + (f" x {replicas}" if replicas > 1 else "")
    yield Pipeline(task, num_stages, replicas).estimate(f"{shape}, stock", "stock")
    yield Pipeline(task, num_stages, replicas).estimate(f"{shape}, overlapped", "none")
    for name in CODECS:
        yield Pipeline(task, num_stages, replicas).estimate(f"{shape}, {name}", name)


@dataclass(frozen=True)
class Pipeline:
    """replicas: of the pipeline, each with its part of the batch."""

    task: Task
    num_stages: int
    replicas: int = 1

    @property
    def num_micro_batches(self) -> int:
        return max(1, -(-self.task.batch // self.replicas))

    @property
    def layers(self) -> list[int]:
        """Of each stage: the split whose slowest stage is fastest, with the logits on the last."""
        model = self.task.model
        head = model.head_flop * 3 / (model.layer_flop * (1 + self.task.training.backward))
        counts = [1] * self.num_stages
        for _ in range(model.num_layers - self.num_stages):
            loads = [number + (head if i == self.num_stages - 1 else 0.0) for i, number in enumerate(counts)]
            counts[loads.index(min(loads))] += 1
        return counts

    def estimate(self, way: str, codec: str) -> Estimate:
        """codec: of CODECS; "none", overlapped; or "stock"."""
        machines = self.task.machines
        block = self._block(codec)
        bits = _find_bits(block)
        step = self.step(bits)
        if codec == "stock":
            timeline, depth = simulate(step, "stock"), 0
        else:
            depth = min(automatic_depth(step), self._deepest())
            timeline = simulate(step, "ours", depth)
        step_s, wire_bytes = timeline.step_s, sum(step.activation_bytes)
        if self.replicas > 1:
            most = max(self.layers) * self.task.model.layer_parameters
            gradient_bits = bits if codec in ("none", "stock") else _find_bits({})
            exchange_s, num_bytes = _exchange(self.task, self.replicas, most, gradient_bits)
            step_s += exchange_s
            wire_bytes += num_bytes
        return Estimate(
            way, step_s, self.memory_bytes(depth), wire_bytes, None if codec == "stock" else block,
            self.num_stages // machines.gpus_per_node - 1 if codec in CODECS else 0, codec,
        )  # fmt: skip

    def _block(self, codec: str) -> dict[str, Any]:
        if codec not in CODECS:
            return dict(NONE)
        block = {way: {"codec": CODECS[codec]} for way in ("activations", "gradients")}
        return {**block, "data_parallel": {}} if self.replicas > 1 else block

    def step(self, bits: float) -> Step:
        """bits: of a value on the wire."""
        model, machines = self.task.model, self.task.machines
        values = model.length * model.width
        codec_s = 0.0
        if bits < 8 * VALUE_BYTES:
            codec_s = values * (VALUE_BYTES + bits / 8) / (machines.gpu.gb_per_s * 1e9)
        stages = []
        for number, num_layers in enumerate(self.layers):
            forward_s = num_layers * model.layer_flop / machines.flop_per_s
            head_s = model.head_flop / machines.flop_per_s if number == self.num_stages - 1 else 0.0
            backward_s = self.task.training.backward * forward_s + 2 * head_s
            stages.append(Stage(forward_s + head_s, backward_s, codec_s, codec_s))
        links = [
            Link(machines.bytes_per_s, machines.latency_s, BUFFER_BYTES)
            if (number + 1) % machines.gpus_per_node == 0
            else Link(machines.inside_bytes_per_s, INSIDE_LATENCY_S, BUFFER_BYTES)
            for number in range(self.num_stages - 1)
        ]
        messages = (values * bits / 8,) * self.num_micro_batches
        per_gpu = self.task.training.share * 2 * 16 * model.layer_parameters * max(self.layers)
        optimizer_s = per_gpu / (machines.gpu.gb_per_s * 1e9)
        return Step(tuple(stages), tuple(links), messages, messages, overhead_s=optimizer_s)

    def memory_bytes(self, in_flight: int) -> float:
        """Of the fullest GPU."""
        model, found = self.task.model, []
        for stage, num_layers in enumerate(self.layers):
            is_last = stage == self.num_stages - 1
            stored = count_warmup(self.num_micro_batches, self.num_stages, stage, in_flight)
            parameters = num_layers * model.layer_parameters
            parameters += model.other_parameters / 2 if stage == 0 or is_last else 0
            weights = self.task.training.bytes_per_parameter * parameters
            found.append(weights + self.task.working_bytes(stored * num_layers, is_last))
        return max(found)

    def _deepest(self) -> int:
        """The largest `in_flight` that a GPU's memory allows; 0 where none does."""
        most = self.task.machines.gpu.memory_gb * 1e9
        return max(0, bisect_right(range(self.num_micro_batches), most, key=self.memory_bytes) - 1)


def _find_bits(block: Mapping[str, Any]) -> float:
    """Of a value of the activations that a block sends, in 16 bits."""
    return ClappingConfig.model_validate(block).plan("activations").mean_bits_per_value(torch.bfloat16)
