"""Small pipelines and the runs that the engine's tests make of them. Imported by the ranks."""

from collections.abc import Iterable, Iterator
from tempfile import gettempdir
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

import clapping_ds
from clapping_ds.link.channel import Channel

WIDTH, LENGTH, BATCH, VOCABULARY = 64, 64, 2, 32
STOCK_ENGINES = (deepspeed.PipelineEngine, deepspeed.DualPipeVEngine)


NONE = {"activations": {"codec": "none"}, "gradients": {"codec": "none"}}
INT2 = {
    "strategy": "fc", "lazy": {"refresh": "slot"},
    "activations": {"delta": "int2"}, "gradients": {"delta": "int2"},
}  # fmt: skip
POOL = {
    "strategy": "key_delta", "lazy": {"pool": 3, "p_new": 0.25, "refresh": "cycle"},
    "activations": {"key": "int8", "delta": "int2"}, "gradients": {"key": "eden3", "delta": "int2"},
}  # fmt: skip
"""3 mini-batches: a run of 7 steps comes to the third round."""
PLACES = {"same": {}, "cpu": {"device": "cpu"}, "disk": {"device": "disk", "folder": gettempdir()}}
INT8_INT2 = {
    "strategy": "key_delta", "lazy": {"refresh": "cycle"},
    "activations": {"key": "int8", "delta": "int2"}, "gradients": {"key": "int8", "delta": "int2"},
}  # fmt: skip
DIRECT = {"strategy": "direct", "activations": {"codec": "int4"}, "gradients": {"codec": "int4"}}
ZERO1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)

    @property
    def weight(self) -> torch.Tensor:
        return self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens)


class Mix(nn.Module):
    """A residual block with a norm, so that a wrong value anywhere shows in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class EmbedWithMask(Embed):
    """Passes on (hidden, scale, mask, ids): floating, small floating, boolean, integer.

    The floating ones come first: a middle stage of stock DeepSpeed 0.19.8 receives gradient number i
    into the buffer of activation number i, whatever its dtype, and hangs on any other order.
    """

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.table(tokens)
        return hidden, hidden.mean(dim=(0, 1)), tokens > 3, tokens


class MixWithMask(Mix):
    def forward(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, scale, mask, tokens = inputs
        return super().forward(hidden) * mask[..., None] + scale, scale * 0.5, mask, tokens


class First(nn.Module):
    def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return inputs[0] + inputs[1]


def _logits(embed: Embed, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, embed.weight)


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def pipeline(num_stages: int, kind: str = "plain", num_blocks: int = 6, **options: Any) -> PipelineModule:
    block, first = (MixWithMask, EmbedWithMask) if kind == "tuple" else (Mix, Embed)
    layers = [LayerSpec(first), *(LayerSpec(block) for _ in range(num_blocks))]
    if kind == "tuple":
        layers.append(LayerSpec(First))
    if kind == "tied":
        layers[0] = TiedLayerSpec("embed", first)
        layers.append(TiedLayerSpec("embed", first, forward_fn=_logits))
    else:
        layers.append(LayerSpec(nn.Linear, WIDTH, VOCABULARY))
    return PipelineModule(
        layers, num_stages=num_stages, loss_fn=_loss, partition_method="uniform", base_seed=7,
        seed_layers=True, seed_fn=lambda seed: torch.manual_seed(int(seed)), **options,
    )  # fmt: skip


def batches(seed: int = 0, length: int = LENGTH, size: int = BATCH) -> Iterator[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, VOCABULARY, (size, length), generator=generator)
        yield tokens, (tokens * 3 + 1) % VOCABULARY


def make_engine(
    clapping: dict[str, Any] | None,
    num_stages: int = 2,
    kind: str = "plain",
    ds: dict[str, Any] | None = None,
    module_options: dict[str, Any] | None = None,
    stock: bool = False,
    training_data: Any = None,
) -> Any:
    """An engine with four micro-batches. stock: DeepSpeed as if this package did not exist."""
    config = {
        "train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 4,
        "steps_per_print": 1000, **(ds or {}),
    }  # fmt: skip
    if clapping is not None:
        config["clapping"] = clapping
    model = pipeline(num_stages, kind, **(module_options or {}))
    return start(model, config, stock, training_data)


def start(model: PipelineModule, config: dict[str, Any], stock: bool, training_data: Any = None) -> Any:
    """An engine that trains what requires a gradient, if need be nothing. stock: as in `make_engine`."""
    if stock:
        deepspeed.PipelineEngine, deepspeed.DualPipeVEngine = STOCK_ENGINES
    initialize = deepspeed.initialize if stock else clapping_ds.initialize
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": weights}], lr=3e-3)
    return initialize(model=model, optimizer=optimizer, config=config, training_data=training_data)[0]


def make_engine_only(clapping: dict[str, Any], num_stages: int = 2) -> None:
    make_engine(clapping, num_stages)


def make_dual_pipe_v(clapping: dict[str, Any]) -> None:
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

    layers = [LayerSpec(Embed), *(LayerSpec(Mix) for _ in range(6)), LayerSpec(nn.Linear, WIDTH, VOCABULARY)]
    model = DualPipeVModule(layers=layers, num_stages=2, loss_fn=_loss, partition_method="uniform")
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4, "clapping": clapping}
    clapping_ds.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), config=config)


def train_on_too_little() -> None:
    engine = make_engine({"strategy": "fc"}, num_stages=4)
    engine.train_batch(data_iter=iter([next(batches())] * 3))


def train(engine: Any, steps: int, seed: int = 0, length: int = LENGTH) -> list[float]:
    data = batches(seed + 100 * engine.grid.get_data_parallel_id(), length)
    return [float(engine.train_batch(data_iter=data)) for _ in range(steps)]


def losses(clapping: dict[str, Any] | None, options: dict[str, Any], steps: int = 4) -> list[float]:
    return train(make_engine(clapping, **options), steps)


def memories(engine: Any) -> dict[tuple[str, str], dict[Any, list[tuple[str, bytes]]]]:
    """By (link, direction): the bits of every memory at this rank's end, and of what codecs learned."""
    return channel_memories(engine._endpoint.channels.values())


def channel_memories(
    channels: Iterable[Channel],
) -> dict[tuple[str, str], dict[Any, list[tuple[str, bytes]]]]:
    """The same of some channels."""
    return {
        (channel.link, channel.direction): {
            **{
                (entry, slot, index): list(map(_bits, [] if held.memory is None else [held.memory]))
                for entry, slots in channel.pool.items()
                for slot, tensors in slots.items()
                for index, held in tensors.items()
            },
            **{
                place: list(map(_bits, learned.state.list_shared()))
                for place, learned in channel.learned.items()
                if learned.state is not None
            },
        }
        for channel in channels
    }


def _bits(tensor: torch.Tensor) -> tuple[str, bytes]:
    return str(tensor.dtype), tensor.view(-1).view(torch.uint8).numpy().tobytes()
