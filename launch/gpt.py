"""A GPT as a DeepSpeed `PipelineModule`: tied embeddings, pre-norm blocks, causal attention.

Shapes: B batch, T tokens, D width, H heads, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn
from tyro.conf import Fixed

try:  # NVIDIA apex; the package of that name on the index is another project
    from apex.normalization import FusedLayerNorm as LayerNorm
except ImportError:
    from torch.nn import LayerNorm


@dataclass(frozen=True)
class GPTConfig:
    """The size of the model."""

    vocabulary: Annotated[int, Fixed] = 256
    """Different tokens; a run takes it from its corpus."""
    length: int = 128
    """Tokens of a sample."""
    width: int = 128
    """Values per token between two blocks."""
    num_heads: int = 4
    """Heads of attention; they share the width."""
    num_blocks: int = 4
    """Transformer blocks of the whole model."""


class Embedding(nn.Module):
    """Token and position embedding; as the tied output layer, only the token part is used."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.length, config.width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    @property
    def weight(self) -> torch.Tensor:
        """What DeepSpeed ties."""
        return self.token.weight

    def forward(self, token_BT: torch.Tensor) -> torch.Tensor:
        position_T = torch.arange(token_BT.shape[1], device=token_BT.device)
        return self.token(token_BT) + self.position(position_T)


def logits(embedding: Embedding, x_BTD: torch.Tensor) -> torch.Tensor:
    return F.linear(x_BTD, embedding.weight)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.norm_attention = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.startswith(("project", "contract"))
                nn.init.normal_(weight, std=0.02 / (2 * config.num_blocks) ** (0.5 * into_residual))
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BTD.shape
        qkv = self.qkv(self.norm_attention(x_BTD))
        q, k, v = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x_BTD + self.contract(F.gelu(self.expand(self.norm_mlp(x_BTD))))


def loss(logits_BTV: torch.Tensor, label_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), label_BT.flatten())


def pipeline(config: GPTConfig, num_stages: int, seed: int, checkpoint_interval: int = 0) -> PipelineModule:
    """The GPT cut into `num_stages` stages. The weights depend on the seed alone, not on the cut."""
    layers = [
        TiedLayerSpec("embedding", Embedding, config),
        *(LayerSpec(Block, config) for _ in range(config.num_blocks)),
        LayerSpec(LayerNorm, config.width),
        TiedLayerSpec("embedding", Embedding, config, forward_fn=logits),
    ]
    return cut_into_stages(layers, Block, num_stages, seed, checkpoint_interval)


def cut_into_stages(
    layers: Sequence[LayerSpec],
    kind: type[nn.Module],
    num_stages: int,
    seed: int,
    checkpoint_interval: int = 0,
) -> PipelineModule:
    """Layers in stages, each with as many of one kind. A layer's weights depend on the seed and its place."""
    return PipelineModule(
        layers=list(layers),
        num_stages=num_stages,
        loss_fn=loss,
        partition_method=f"type:{kind.__name__}",
        activation_checkpoint_interval=checkpoint_interval,
        base_seed=seed,
        seed_layers=True,
        seed_fn=lambda layer_seed: torch.manual_seed(int(layer_seed)),
    )


class GPT(nn.Module):
    """The same layers as one module: tokens (int64 [B, T]) to logits."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.num_blocks)))
        self.norm = LayerNorm(config.width)

    def forward(self, token_BT: torch.Tensor) -> torch.Tensor:
        return logits(self.embedding, self.norm(self.blocks(self.embedding(token_BT))))
