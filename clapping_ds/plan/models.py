"""A decoder's size, in parameters and in FLOPs of a forward pass: counted, or from its dimensions."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Model:
    """For sequences of one length."""

    name: str
    length: int
    """Tokens of a sequence."""
    width: int
    """Values of a token between layers, which is what crosses a link."""
    vocabulary: int
    num_layers: int
    layer_parameters: float
    """Of a layer, in the mean."""
    other_parameters: float
    """Of what lies before the layers and after them."""
    layer_flop: float
    """A layer's forward pass on a sequence."""
    head_flop: float
    """Of the logits."""

    @property
    def parameters(self) -> float:
        return self.num_layers * self.layer_parameters + self.other_parameters


def from_numbers(
    parameters: float, num_layers: int, width: int, length: int, vocabulary: int = 32_000, active: float = 0.0
) -> Model:
    """A decoder with tables of its own for tokens and logits.

    parameters   of all
    active       parameters that a token passes, where experts are chosen; 0: all
    Per token and layer, 2 FLOPs for each parameter and 4 length width for attention, as `FlopCounterMode`
    counts it, which knows of no causal mask.
    """
    tables = 2.0 * vocabulary * width
    if not parameters > tables:
        raise ValueError(
            f"parameters = {parameters:g}; accepted: more than the {tables:g} of two tables of the vocabulary"
        )
    per_layer = (parameters - tables) / num_layers
    passed = ((active or parameters) - tables) / num_layers
    layer_flop = length * (2 * passed + 4 * length * width)
    name = f"{parameters / 1e9:.3g}B"
    head_flop = 2.0 * length * vocabulary * width
    return Model(name, length, width, vocabulary, num_layers, per_layer, tables, layer_flop, head_flop)


def from_config(path: Path, length: int) -> Model:
    """Counted on torch's meta device: nothing is allocated, and nothing computed.

    path     a Hugging Face `config.json`, or the folder that has it
    Raises ValueError for what transformers does not know as a causal language model; ImportError without
    transformers.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"model = {str(path)!r}: {error}; accepted: a Hugging Face config.json") from None
    whole, config = _make(path, told)
    layers = _find_layers(whole, config.num_hidden_layers)
    of_layers = sum(weight.numel() for weight in layers.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        whole(torch.zeros(1, length, dtype=torch.long, device="meta"))
    head_flop = 2.0 * length * config.vocab_size * config.hidden_size
    return Model(
        name=told.get("_name_or_path") or told.get("model_type", path.parent.name),
        length=length,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        num_layers=config.num_hidden_layers,
        layer_parameters=of_layers / config.num_hidden_layers,
        other_parameters=sum(weight.numel() for weight in whole.parameters()) - of_layers,
        layer_flop=(counter.get_total_flops() - head_flop) / config.num_hidden_layers,
        head_flop=head_flop,
    )


def _make(path: Path, told: dict[str, Any]) -> tuple[nn.Module, Any]:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(f"a config.json needs transformers ({error}); or give the numbers") from None
    try:
        config = AutoConfig.for_model(**told)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config), config
    except (ValueError, KeyError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"model = {str(path)!r}: {first}; accepted: a config.json of a causal language model"
        ) from None


def _find_layers(whole: nn.Module, number: int) -> nn.ModuleList:
    lists = [each for each in whole.modules() if isinstance(each, nn.ModuleList) and len(each) == number]
    return max(lists, key=lambda each: sum(weight.numel() for weight in each.parameters()))
