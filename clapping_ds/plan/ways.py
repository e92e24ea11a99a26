"""Ways to train a model on given machines: what a step of each takes, in seconds and in bytes of memory.

Assumed, for all of them:

* Layers are recomputed in the backward pass, which costs one more forward pass. What is kept of a sequence is
  the input of each layer; while a layer is recomputed 34 bytes for each of its values (arXiv 2205.05198), and
  12 for each logit.
* Bytes per trained parameter, in bf16: 2 of weights, 4 of gradients, and 12 of fp32 weights and Adam, which
  replicas split (ZeRO-1). Frozen ones have 2, or 0.56 in 4 bits, but for the tables of tokens and logits.
  LoRA trains a hundredth; its backward pass finds gradients of inputs alone.
* A node sends `bytes_per_s` to others, and receives as much. In a pipeline over three nodes or more it sends
  two ways at once, so that each link has half.
* Data parallelism: gradients of 16 bits, which a node adds up before it sends them, in a ring, while the last
  backward pass runs. Compressed ones (eden4, there and back) go from each GPU to its counterparts.
* ZeRO-3: every micro-batch gathers all weights twice and scatters gradients once (arXiv 1910.02054), while it
  computes; micro-batches are as large as is best and fits. ZeRO++ (arXiv 2306.10209): weights in 8 bits,
  once, as each node keeps them, gradients in 4. "ZeRO-3 in each node": nodes are replicas.
* DiLoCo (arXiv 2311.08105): nodes train alone, with their part of the batch and an optimizer each, and send
  what changed every LOCAL_STEPS steps, which nothing hides. The outer step's two copies are on the CPU.
* Pipelines: a sequence per micro-batch, a stage per GPU, nodes in a row. What replicas exchange does not
  overlap. A codec takes what the memory needs to read and write.

No tensor parallelism, and no offload.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from clapping_ds.autotune.depth import count_warmup
from clapping_ds.config import ClappingConfig
from clapping_ds.plan.bounds import automatic_depth
from clapping_ds.plan.machines import BUFFER_BYTES, Machines
from clapping_ds.plan.models import Model
from clapping_ds.plan.timeline import Link, Stage, Step, simulate

VALUE_BYTES = 2
LAYER_BYTES_PER_VALUE, LOGIT_BYTES = 34, 12
WEIGHT_BYTES, GRADIENT_BYTES, STATE_BYTES = 2.0, 4.0, 12.0
INSIDE_LATENCY_S = 10e-6
LOCAL_STEPS = 100


class Training(NamedTuple):
    """What is trained. Passes are in forward passes of the same."""

    frozen_bytes: float
    """Per parameter of a layer; 0: all are trained."""
    share: float
    """Of parameters, that is trained."""
    backward: float
    """Pass of a layer, with the forward pass that is made again."""
    head_backward: float
    """Pass of the logits."""


TRAININGS = {
    "full": Training(0.0, 1.0, 3.0, 2.0),
    "lora": Training(WEIGHT_BYTES, 0.01, 2.0, 1.0),
    "qlora": Training(0.56, 0.01, 2.0, 1.0),
}

NONE = {"activations": {"codec": "none"}, "gradients": {"codec": "none"}}
REPLICAS = {"weights": "eden4"}
"""Of the block: gradients, and what the optimizer made of them."""
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
    """That a step sends out of a node."""
    block: Mapping[str, Any] | None = None
    """The "clapping" block; None: this package has no part in it."""
    codec: str = "none"
    """Of a pipeline's links."""
    trains_as_asked: bool = True
    """False: adapters alone, where all weights were asked for; or nodes that hardly exchange anything."""
    shape: str = ""
    """Of a pipeline."""
    num_stages: int = 1

    @property
    def num_links(self) -> int:
        """That are compressed."""
        return self.num_stages - 1 if self.codec in CODECS else 0

    @property
    def added_loss(self) -> float:
        """At the next larger number of links that was measured; beyond the largest, in proportion; 0 where
        nothing is compressed."""
        known = LOSSES.get(self.codec)
        if known is None:
            return 0.0
        most = max(known)
        if self.num_links > most:
            return known[most] * self.num_links / most
        return known[min(number for number in known if number >= self.num_links)]


@dataclass(frozen=True)
class Task:
    """What is trained, and on what. batch: sequences of a step, on all GPUs together."""

    model: Model
    machines: Machines
    batch: int
    training: Training = TRAININGS["full"]

    def compute_s(self, num_sequences: float) -> float:
        """Of one GPU, forward and backward, of the whole model."""
        model, training = self.model, self.training
        layers = model.num_layers * model.layer_flop * (1 + training.backward)
        head = model.head_flop * (1 + training.head_backward)
        return num_sequences * (layers + head) / self.machines.flop_per_s

    @property
    def hiding_s(self) -> float:
        """Of the last backward pass, while which gradients may be exchanged."""
        return self.compute_s(1) * self.training.backward / (1 + self.training.backward)

    def optimizer_s(self, parameters: float) -> float:
        """Of a GPU that updates so many, where all are trained."""
        moved = 2 * (WEIGHT_BYTES + GRADIENT_BYTES + STATE_BYTES) * self.training.share * parameters
        return moved / (self.machines.gpu.gb_per_s * 1e9)

    def weights_bytes(self, in_layers: float, in_tables: float) -> float:
        if not self.training.frozen_bytes:
            return WEIGHT_BYTES * (in_layers + in_tables)
        adapters = WEIGHT_BYTES * self.training.share * in_layers
        return self.training.frozen_bytes * in_layers + WEIGHT_BYTES * in_tables + adapters

    def kept_bytes(self, in_layers: float, in_tables: float, replicas: int) -> float:
        """Of a GPU with these parameters, whose optimizer's state replicas split."""
        trained = self.training.share * (in_layers + in_tables)
        return self.weights_bytes(in_layers, in_tables) + trained * (GRADIENT_BYTES + STATE_BYTES / replicas)

    @property
    def of_whole(self) -> tuple[float, float]:
        """The model's parameters: in layers, in tables."""
        return self.model.num_layers * self.model.layer_parameters, self.model.table_parameters

    def working_bytes(self, num_kept: float, has_head: bool, num_sequences: int = 1) -> float:
        """Beside weights. num_kept: inputs of layers, of all sequences together."""
        values = self.model.length * self.model.width
        logits = self.model.length * self.model.vocabulary * LOGIT_BYTES if has_head else 0
        return num_kept * VALUE_BYTES * values + num_sequences * (LAYER_BYTES_PER_VALUE * values + logits)

    def whole_bytes(self, replicas: int) -> float:
        """Of a GPU that has the whole model, and one sequence."""
        working = self.working_bytes(self.model.num_layers, has_head=True)
        return self.kept_bytes(*self.of_whole, replicas) + working

    def ring_s(self, num_bytes: float, num_nodes: int) -> tuple[float, float]:
        """Seconds, and bytes out of a node, of the mean over nodes of what each has so many bytes of."""
        sent = 2 * (num_nodes - 1) / num_nodes * num_bytes
        return sent / self.machines.bytes_per_s + 2 * (num_nodes - 1) * self.machines.latency_s, sent


def list_ways(task: Task) -> Iterator[Estimate]:
    """All that the machines allow, whether they fit or not."""
    machines = task.machines
    alone_s = task.optimizer_s(task.model.parameters)
    yield Estimate("one GPU", task.compute_s(task.batch) + alone_s, task.whole_bytes(1), 0.0)
    if task.training.share == 1:
        lora = replace(task, training=TRAININGS["lora"])
        step_s, memory_bytes = lora.compute_s(task.batch), lora.whole_bytes(1)
        yield Estimate("one GPU, LoRA", step_s, memory_bytes, 0.0, trains_as_asked=False)
    if machines.gpus_per_node > 1:
        inside = replace(task, machines=machines._replace(num_nodes=1))
        yield from _list_data_parallel(inside, "one node, ")
        yield _shard(inside, "one node, ZeRO-3", 0.0, _gathered(task))
    if machines.num_nodes > 1:
        yield from _list_data_parallel(task, "")
        yield train_alone(task, LOCAL_STEPS)
        weights, gradients = _gathered(task)
        yield _shard(task, "ZeRO-3", 2 * weights + gradients, (0.0, 0.0))
        kept = weights / machines.gpus_per_node
        yield _shard(task, "ZeRO++", min(task.model.parameters, weights) + gradients / 4, (0.0, 0.0), kept)
        if machines.gpus_per_node > 1:
            yield _shard_in_nodes(task)
    for nodes in range(1, machines.num_nodes + 1):
        num_stages = nodes * machines.gpus_per_node
        if 1 < num_stages <= task.model.num_layers and (nodes > 1 or machines.num_nodes == 1):
            yield from _list_pipelines(task, num_stages, machines.num_nodes // nodes)


def _list_data_parallel(task: Task, place: str) -> Iterator[Estimate]:
    machines, parameters = task.machines, task.model.parameters
    per_gpu = -(-task.batch // machines.num_gpus)
    trained = task.training.share * parameters
    compute_s = task.compute_s(per_gpu) + task.optimizer_s(parameters / machines.num_gpus)
    exchanges: list[tuple[str, float, float, Mapping[str, Any] | None]] = []
    if machines.num_nodes == 1:
        exchanges.append(("", 2 * VALUE_BYTES * trained / machines.inside_bytes_per_s, 0.0, None))
    else:
        exchanges.append(("", *task.ring_s(VALUE_BYTES * trained, machines.num_nodes), None))
        if not task.model.has_experts:
            of_all = trained * machines.gpus_per_node * _find_bits({}) / 8
            block = {**NONE, "data_parallel": REPLICAS}
            exchanges.append((", eden4", *task.ring_s(of_all, machines.num_nodes), block))
    for name, exchange_s, wire_bytes, of_ours in exchanges:
        step_s = compute_s + max(0.0, exchange_s - task.hiding_s)
        memory_bytes = task.whole_bytes(machines.num_gpus)
        yield Estimate(f"{place}data parallel{name}", step_s, memory_bytes, wire_bytes, of_ours)


def train_alone(task: Task, steps: int) -> Estimate:
    """DiLoCo: so many steps between two exchanges. Bytes and seconds are of a step, in the mean."""
    machines, trained = task.machines, task.training.share * task.model.parameters
    inside_s = 2 * VALUE_BYTES * trained / machines.inside_bytes_per_s if machines.gpus_per_node > 1 else 0.0
    exchange_s, wire_bytes = task.ring_s(VALUE_BYTES * trained, machines.num_nodes)
    return Estimate(
        f"DiLoCo, H = {steps}",
        task.compute_s(-(-task.batch // machines.num_gpus))
        + task.optimizer_s(task.model.parameters / machines.gpus_per_node)
        + max(0.0, inside_s - task.hiding_s)
        + exchange_s / steps,
        task.whole_bytes(machines.gpus_per_node),
        wire_bytes / steps,
        trains_as_asked=False,
    )


def _gathered(task: Task) -> tuple[float, float]:
    """Bytes of all weights, and of all gradients, as ZeRO-3 sends them."""
    return task.weights_bytes(*task.of_whole), VALUE_BYTES * task.training.share * task.model.parameters


def _shard(
    task: Task,
    name: str,
    outside_bytes: float,
    inside: tuple[float, float],
    kept: float = 0.0,
    replicas: int = 1,
    after_s: float = 0.0,
    after_bytes: float = 0.0,
) -> Estimate:
    """Weights that are gathered for each micro-batch, of the size that is fastest and fits.

    outside_bytes   that a micro-batch gathers over the links between nodes
    inside          bytes of weights, twice, and of gradients, that it gathers within a node
    kept            more bytes on each GPU
    replicas        that split the batch, each with all weights; after_s, after_bytes: what they exchange
    """
    machines = task.machines
    num_sharing = machines.num_gpus // replicas
    per_gpu = -(-task.batch // machines.num_gpus)
    share = (num_sharing - 1) / num_sharing
    weights, gradients = inside
    wire_s = share * outside_bytes / machines.bytes_per_s
    wire_s += share * (2 * weights + gradients) / machines.inside_bytes_per_s
    whole = task.kept_bytes(*task.of_whole, 1) / num_sharing + kept
    two_layers = 2 * task.weights_bytes(*task.of_whole) / task.model.num_layers
    optimizer_s = task.optimizer_s(task.model.parameters / machines.num_gpus)
    found = []
    for size in (2**power for power in range(per_gpu.bit_length())):
        number = -(-per_gpu // size)
        step_s = number * max(task.compute_s(size), wire_s) + optimizer_s + after_s
        working = task.working_bytes(size * task.model.num_layers, has_head=True, num_sequences=size)
        sent = number * share * outside_bytes + after_bytes
        found.append(Estimate(name, step_s, whole + two_layers + working, sent))
    fitting = [each for each in found if each.memory_bytes <= machines.gpu.memory_gb * 1e9]
    return min(fitting, key=lambda each: each.step_s, default=found[0])


def _shard_in_nodes(task: Task) -> Estimate:
    """Nodes are replicas: gradients cross the links once a step."""
    trained = VALUE_BYTES * task.training.share * task.model.parameters
    exchange_s, sent = task.ring_s(trained, task.machines.num_nodes)
    return _shard(
        task, "ZeRO-3 in each node", 0.0, _gathered(task), replicas=task.machines.num_nodes,
        after_s=max(0.0, exchange_s - task.hiding_s), after_bytes=sent,
    )  # fmt: skip


def _list_pipelines(task: Task, num_stages: int, replicas: int) -> Iterator[Estimate]:
    pipeline = Pipeline(task, num_stages, replicas)
    yield from map(pipeline.estimate, ("stock", "none", *CODECS))


@dataclass(frozen=True)
class Pipeline:
    """replicas: of the pipeline, each with its part of the batch."""

    task: Task
    num_stages: int
    replicas: int = 1

    @property
    def num_nodes(self) -> int:
        return self.num_stages // self.task.machines.gpus_per_node

    @property
    def num_micro_batches(self) -> int:
        return max(1, -(-self.task.batch // self.replicas))

    @cached_property
    def layers(self) -> list[int]:
        """Of each stage: the split whose slowest stage is fastest, with the logits on the last."""
        model, training = self.task.model, self.task.training
        head = model.head_flop * (1 + training.head_backward) / (model.layer_flop * (1 + training.backward))
        counts = [1] * self.num_stages
        for _ in range(model.num_layers - self.num_stages):
            loads = [number + (head if i == self.num_stages - 1 else 0.0) for i, number in enumerate(counts)]
            counts[loads.index(min(loads))] += 1
        return counts

    @cached_property
    def _parameters(self) -> list[tuple[float, float]]:
        """Of each stage: in layers, in tables."""
        model = self.task.model
        found = [[number * model.layer_parameters, 0.0] for number in self.layers]
        found[0][1] += model.first_parameters
        found[-1][1] += model.last_parameters
        return [(in_layers, in_tables) for in_layers, in_tables in found]

    def estimate(self, codec: str) -> Estimate:
        """codec: of CODECS; "none", overlapped; or "stock"."""
        block = self._block(codec)
        step = self.step(_find_bits(block))
        if codec == "stock":
            timeline, depth = simulate(step, "stock"), 0
        else:
            depth = min(automatic_depth(step), self._deepest())
            timeline = simulate(step, "ours", depth)
        after_s, after_bytes = self._exchange("data_parallel" in block)
        has_middle = self.num_nodes > 2
        sent = sum(step.activation_bytes) + (sum(step.gradient_bytes) if has_middle else 0.0)
        shape = f"pipeline of {self.num_stages}" + (f" x {self.replicas}" if self.replicas > 1 else "")
        return Estimate(
            way=f"{shape}, {'overlapped' if codec == 'none' else codec}",
            step_s=timeline.step_s + after_s,
            memory_bytes=self.memory_bytes(depth),
            wire_bytes=after_bytes + (sent if self.num_nodes > 1 else 0.0),
            block=None if codec == "stock" else block,
            codec=codec,
            shape=shape,
            num_stages=self.num_stages,
        )

    def _exchange(self, is_compressed: bool) -> tuple[float, float]:
        """Seconds, and bytes out of a node: of the gradients of tied tables, between the ends; and of
        replicas, whose stages on one node share its link."""
        task, per_node = self.task, self.task.machines.gpus_per_node
        seconds = sent = 0.0
        if task.model.tied_parameters and task.training.share == 1 and self.num_nodes > 1:
            seconds, sent = task.ring_s(VALUE_BYTES * task.model.tied_parameters, 2)
        if self.replicas > 1:
            of_stages = [sum(of_stage) for of_stage in self._parameters]
            nodes = [of_stages[first : first + per_node] for first in range(0, self.num_stages, per_node)]
            bits = _find_bits({}) if is_compressed else 8 * VALUE_BYTES
            most = max(map(sum, nodes)) * task.training.share * bits / 8
            of_replicas = task.ring_s(most, self.replicas)
            seconds, sent = seconds + of_replicas[0], sent + of_replicas[1]
        return seconds, sent

    def _block(self, codec: str) -> dict[str, Any]:
        if codec not in CODECS:
            return dict(NONE)
        block = {way: {"codec": CODECS[codec]} for way in ("activations", "gradients")}
        has_replicas = self.replicas > 1 and not self.task.model.has_experts
        return {**block, "data_parallel": REPLICAS} if has_replicas else block

    def step(self, bits: float) -> Step:
        """bits: of a value on the wire."""
        model, machines, training = self.task.model, self.task.machines, self.task.training
        values = model.length * model.width
        codec_s = 0.0
        if bits < 8 * VALUE_BYTES:
            codec_s = values * (VALUE_BYTES + bits / 8) / (machines.gpu.gb_per_s * 1e9)
        stages = []
        for number, num_layers in enumerate(self.layers):
            forward_s = num_layers * model.layer_flop / machines.flop_per_s
            head_s = model.head_flop / machines.flop_per_s if number == self.num_stages - 1 else 0.0
            backward_s = training.backward * forward_s + training.head_backward * head_s
            stages.append(Stage(forward_s + head_s, backward_s, codec_s, codec_s))
        rate = machines.bytes_per_s / (2 if self.num_nodes > 2 else 1)
        links = [
            Link(rate, machines.latency_s, BUFFER_BYTES)
            if (number + 1) % machines.gpus_per_node == 0
            else Link(machines.inside_bytes_per_s, INSIDE_LATENCY_S, BUFFER_BYTES)
            for number in range(self.num_stages - 1)
        ]
        messages = (values * bits / 8,) * self.num_micro_batches
        optimizer_s = self.task.optimizer_s(max(map(sum, self._parameters)) / self.replicas)
        return Step(tuple(stages), tuple(links), messages, messages, overhead_s=optimizer_s)

    def memory_bytes(self, in_flight: int) -> float:
        """Of the fullest GPU."""
        found = []
        for stage, (num_layers, parameters) in enumerate(zip(self.layers, self._parameters, strict=True)):
            stored = count_warmup(self.num_micro_batches, self.num_stages, stage, in_flight)
            working = self.task.working_bytes(stored * num_layers, stage == self.num_stages - 1)
            found.append(self.task.kept_bytes(*parameters, self.replicas) + working)
        return max(found)

    def _deepest(self) -> int:
        """The largest `in_flight` that a GPU's memory allows; 0 where none does."""
        most = self.task.machines.gpu.memory_gb * 1e9
        return max(0, bisect_right(range(self.num_micro_batches), most, key=self.memory_bytes) - 1)


def _find_bits(block: Mapping[str, Any]) -> float:
    """Of a value of the activations that a block sends, in 16 bits."""
    return ClappingConfig.model_validate(block).plan("activations").mean_bits_per_value(torch.bfloat16)
