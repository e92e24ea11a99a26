"""A decoder's size, in parameters and in FLOPs of a forward pass: counted, or from its dimensions."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configurations of models with experts have one of."""


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
    first_parameters: float
    """Of what lies before the layers."""
    last_parameters: float
    """Of what lies after them; where it is the table of tokens again, that counts here as well."""
    layer_flop: float
    """A layer's forward pass on a sequence."""
    head_flop: float
    """Of the logits."""
    tied_parameters: float = 0.0
    """That are the first and the last: a pipeline has them twice, and adds up their gradients."""
    has_experts: bool = False

    @property
    def parameters(self) -> float:
        return self.num_layers * self.layer_parameters + self.table_parameters

    @property
    def table_parameters(self) -> float:
        return self.first_parameters + self.last_parameters - self.tied_parameters


def from_numbers(
    parameters: float, num_layers: int, width: int, length: int, vocabulary: int = 32_000, active: float = 0.0
) -> Model:
    """A decoder with tables of its own for tokens and logits.

    parameters   of all
    active       parameters that a token passes, where experts are chosen; 0: all
    Per token and layer, 2 FLOPs for each parameter and 4 length width for attention, as `FlopCounterMode`
    counts it, which knows of no causal mask. Raises ValueError for numbers that cannot be.
    """
    for name, number in (("layers", num_layers), ("width", width), ("vocabulary", vocabulary)):
        if number < 1:
            raise ValueError(f"{name} = {number}; accepted: 1 or more")
    table = float(vocabulary * width)
    if not parameters > 2 * table:
        raise ValueError(
            f"parameters = {parameters:g}; accepted: more than the {2 * table:g} of two tables of the "
            "vocabulary"
        )
    if active and not 2 * table < active <= parameters:
        raise ValueError(f"active = {active:g}; accepted: above {2 * table:g}, to {parameters:g}")
    passed = ((active or parameters) - 2 * table) / num_layers
    return Model(
        name=f"{parameters / 1e9:.3g}B",
        length=length,
        width=width,
        vocabulary=vocabulary,
        num_layers=num_layers,
        layer_parameters=(parameters - 2 * table) / num_layers,
        first_parameters=table,
        last_parameters=table,
        layer_flop=length * (2 * passed + 4 * length * width),
        head_flop=2.0 * length * table,
        has_experts=bool(active),
    )


def from_config(path: Path, length: int) -> Model:
    """Counted on torch's meta device: nothing is allocated, and nothing computed.

    path     a Hugging Face `config.json`, or the folder that has it
    Raises ValueError for what transformers does not know as a causal language model, or cannot run on
    sequences so long; ImportError without transformers.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"model = {str(path)!r}: {error}; accepted: a Hugging Face config.json") from None
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"a config.json needs transformers ({error}); or give the numbers") from None
    try:
        config = transformers.AutoConfig.for_model(**told.get("text_config", told))
        return _count(transformers.AutoModelForCausalLM, config, length)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model = {str(path)!r}: {first}; accepted: a config.json of a causal language model"
        ) from None


def _count(kind: Any, config: Any, length: int) -> Model:
    longest = getattr(config, "max_position_embeddings", None) or length
    if length > longest:
        raise ValueError(f"length = {length} of at most {longest} positions")
    with torch.device("meta"):
        whole = kind.from_config(config, dtype=torch.bfloat16)
    number, width, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
    layers = _find_layers(whole, number)
    of_layers = sum(weight.numel() for weight in layers.parameters())
    others = sum(weight.numel() for weight in whole.parameters()) - of_layers
    counter = FlopCounterMode(display=False, custom_mapping=_list_formulas())
    with counter, torch.no_grad():
        whole(torch.zeros(1, length, dtype=torch.long, device="meta"))
    head_flop = 2.0 * length * vocabulary * width
    table = vocabulary * width
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    return Model(
        name=getattr(config, "_name_or_path", "") or config.model_type,
        length=length,
        width=width,
        vocabulary=vocabulary,
        num_layers=number,
        layer_parameters=of_layers / number,
        first_parameters=others if is_tied else others - table,
        last_parameters=table,
        layer_flop=(counter.get_total_flops() - head_flop) / number,
        head_flop=head_flop,
        tied_parameters=table if is_tied else 0.0,
        has_experts=any(hasattr(config, name) for name in EXPERTS),
    )


def _list_formulas() -> dict[Any, Any]:
    """Of what `FlopCounterMode` counts as nothing: the matrices of experts."""

    def grouped_mm(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
        """a: [rows of all experts, inner]. b: [experts, inner, columns]."""
        return 2 * a[-2] * a[-1] * b[-1]

    names = ("_grouped_mm",)
    return {getattr(torch.ops.aten, name): grouped_mm for name in names if hasattr(torch.ops.aten, name)}


def _find_layers(whole: nn.Module, number: int) -> nn.ModuleList:
    lists = [each for each in whole.modules() if isinstance(each, nn.ModuleList) and len(each) == number]
    if not lists:
        raise ValueError(f"no list of {number} layers")
    return max(lists, key=lambda each: sum(weight.numel() for weight in each.parameters()))
