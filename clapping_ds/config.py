"""The `"clapping"` block of a DeepSpeed JSON as one frozen model. Every check of it is made here."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from clapping_ds.codecs import CODECS, AnyCodec, Codec, Quantizer, RandK, Raw, TopK, bits_per_value
from clapping_ds.codecs.grouped import GroupedCodec
from clapping_ds.codecs.protocol import STRICT, GroupSize

BLOCK_NAME = "clapping"


def _shown(value: object) -> str:
    """One line of at most 200 characters, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"<{type(value).__name__} of too many digits or levels>"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _named(codec: Any) -> Any:
    """`"int4"` is short for `{"name": "int4"}`."""
    return {"name": codec} if isinstance(codec, str) else codec


def _check_block(key: str, codec: Codec | None, min_numel: int) -> None:
    if isinstance(codec, TopK | RandK) and codec.block > min_numel:
        raise ValueError(
            f"{key}.block = {codec.block} is larger than the smallest tensor that is "
            f"compressed, min_numel = {min_numel}; accepted: a block of at most min_numel"
        )


CodecConfig = Annotated[AnyCodec, Field(discriminator="name")]


class DirectionConfig(BaseModel):
    """How one direction, `activations` or `gradients`, is compressed."""

    model_config = STRICT

    key: CodecConfig | None = None
    """Codec of fresh slots. Default: what the strategy says (`fu`: none, `fc`: as `delta`)."""
    delta: CodecConfig = Field(default_factory=lambda: Quantizer(name="int4"))
    """Codec of reused slots; with the strategy `direct`, of every message."""
    group_size: GroupSize = 128
    """Values per scale, for the codecs of this direction that do not set their own."""
    base: Literal["reset", "carry"] | None = None
    """What a key message is the difference to: zero or the memory. Default: carry for
    `topk`, `randk` and `lowrank`."""
    min_numel: Annotated[int, Field(ge=0)] = 4096
    """Floating tensors with fewer values travel raw."""

    _allow_names = field_validator("key", "delta", mode="before")(_named)

    @model_validator(mode="before")
    @classmethod
    def _share_group_size(cls, block: Any) -> Any:
        if not isinstance(block, Mapping) or "group_size" not in block:
            return block
        shared = dict(block)
        for field in ("key", "delta"):
            codec = _named(shared.get(field))
            name = codec.get("name") if isinstance(codec, Mapping) else None
            if isinstance(name, str) and issubclass(CODECS.get(name, Raw), GroupedCodec):
                shared[field] = {"group_size": block["group_size"], **codec}
        if "delta" not in block:
            shared["delta"] = {"name": "int4", "group_size": block["group_size"]}
        return shared

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        for field in ("key", "delta"):
            _check_block(field, getattr(self, field), self.min_numel)
        return self


class MemoryConfig(BaseModel):
    """Where and how the memories of error feedback are held."""

    model_config = STRICT

    dtype: Literal["same", "float32", "float16", "bfloat16"] = "same"
    """`same`: the dtype of the tensor that is sent."""
    device: Literal["same", "cpu"] = "same"
    """`same`: the device of the tensor that is sent."""

    def torch_dtype(self, value_dtype: torch.dtype) -> torch.dtype:
        return value_dtype if self.dtype == "same" else getattr(torch, self.dtype)


class LinksConfig(BaseModel):
    """How the codec of each link and direction is chosen after the first steps. `"auto"` for all defaults."""

    model_config = STRICT

    ladder: list[CodecConfig] = Field(
        default=[Quantizer(name="int8"), Quantizer(name="int4"), Quantizer(name="int2")], min_length=1
    )
    """Delta codecs to choose from besides `none`, lightest compression first."""
    min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Part of the step time that a heavier codec must save to be preferred to a lighter one."""
    write: str | None = None
    """File that the decision is written to."""
    read: str | None = None
    """File of an earlier decision, used in place of measuring."""

    _allow_names = field_validator("ladder", mode="before")(
        lambda ladder: [_named(codec) for codec in ladder] if isinstance(ladder, list) else ladder
    )

    @model_validator(mode="after")
    def _reads_or_writes(self) -> Self:
        if self.read is not None and self.write is not None:
            raise ValueError(f"write = {_shown(self.write)} together with read; accepted: one of them")
        return self


class ClappingConfig(BaseModel):
    """The whole block. `from_ds_config` reads it; all fields have defaults."""

    model_config = STRICT

    enabled: bool = True
    """False: the stock engine runs."""
    strategy: Literal["fu", "fc", "direct"] = "fu"
    """Key messages uncompressed (`fu`), compressed as deltas are (`fc`), or no memory (`direct`)."""
    p_new: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Probability that a slot's sample is new. 1: never reuse. Not with `direct`."""
    refresh: Literal["step", "slot", "cycle"] = "step"
    """One coin per step, one per slot, or round robin."""
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 1234
    """Of the coin. Every rank must have the same."""
    activations: DirectionConfig = Field(default_factory=DirectionConfig)
    gradients: DirectionConfig = Field(default_factory=DirectionConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    overlap: bool = True
    """Messages travel while the stages compute. False: sends block, as in the stock engine."""
    in_flight: int | Literal["auto"] = "auto"
    """Micro-batches that each link holds beyond stock 1F1B, to hide its latency and transfer time.
    `auto`: after the first steps, as many as the measured links need and memory allows."""
    links: LinksConfig | None = None
    """`auto`: the codec of each link is chosen after the first steps. None: as configured."""
    checkpoint_memory: bool = True
    """Whether checkpoints hold memories and held batches. False: the step after a load is all fresh."""
    timeout_s: Annotated[float, Field(gt=0, le=1e9)] = 1800.0
    """How long a message of a peer is waited for before that is an error."""
    verify: bool = False
    """Messages carry a header with checksums, and any difference between the two ends is an error."""
    compile: bool = False
    """Compile the codecs of CPU ranks with torch's C++ backend: some seconds per codec and shape at the
    start, then the same bits in a fraction of the time. Needs torch 2.13 and a C++ compiler; GPUs have
    their own kernels."""

    @field_validator("in_flight", mode="before")
    @classmethod
    def _depth(cls, depth: object) -> object:
        if depth == "auto" or (isinstance(depth, int) and not isinstance(depth, bool) and depth >= 0):
            return depth
        raise ValueError("'auto', or a whole number of micro-batches from 0")

    @field_validator("links", mode="before")
    @classmethod
    def _auto_links(cls, links: object) -> object:
        if links is None or isinstance(links, Mapping | LinksConfig):
            return links
        if links != "auto":
            raise ValueError("'auto', or an object with the keys " + ", ".join(LinksConfig.model_fields))
        return {}

    @model_validator(mode="after")
    def _ladder_fits(self) -> Self:
        for number, codec in enumerate(self.links.ladder if self.links else []):
            smallest = min(self.activations.min_numel, self.gradients.min_numel)
            _check_block(f"links.ladder.{number}", codec, smallest)
        return self

    @model_validator(mode="after")
    def _depth_needs_overlap(self) -> Self:
        if not self.overlap and self.in_flight not in ("auto", 0):
            raise ValueError(f"in_flight = {_shown(self.in_flight)} with overlap = false; accepted: 0")
        return self

    @model_validator(mode="before")
    @classmethod
    def _direct_is_all_fresh(cls, block: Any) -> Any:
        if not isinstance(block, Mapping) or block.get("strategy") != "direct":
            return block
        if block.get("p_new", 1) != 1:
            p_new = _shown(block["p_new"])
            raise ValueError(f"p_new = {p_new} with strategy = 'direct', all fresh; accepted: no p_new, or 1")
        for name in ("activations", "gradients"):
            direction = block.get(name)
            if isinstance(direction, Mapping) and direction.get("key") is not None:
                raise ValueError(
                    f"{name}.key = {_shown(direction['key'])} with strategy = 'direct', which has one codec; "
                    "accepted: delta alone"
                )
        return {"p_new": 1.0, **block}

    @classmethod
    def from_ds_config(cls, ds_config: Mapping[str, Any]) -> "ClappingConfig":
        """Reads `ds_config["clapping"]`; without that key, a configuration that is not enabled.

        Raises ValueError naming every wrong key, its value and what would be accepted.
        """
        if BLOCK_NAME not in ds_config:
            return cls(enabled=False)
        try:
            return cls.model_validate(ds_config[BLOCK_NAME])
        except ValidationError as error:
            raise ValueError("\n".join(_explained(error))) from None

    def direction(self, name: str) -> DirectionConfig:
        """The block of the direction `activations` or `gradients`."""
        return self.activations if name == "activations" else self.gradients

    def key_codec(self, name: str) -> Codec:
        """The codec of fresh slots in a direction."""
        direction = self.direction(name)
        if direction.key is not None:
            return direction.key
        return Raw() if self.strategy == "fu" else direction.delta

    def delta_codec(self, name: str) -> Codec | None:
        """The codec of reused slots in a direction; None where no memory is kept."""
        return None if self.strategy == "direct" else self.direction(name).delta

    def carries(self, name: str) -> bool:
        """Whether a key message is the difference to the memory (`carry`) or to zero (`reset`)."""
        if self.strategy == "direct":
            return False
        base = self.direction(name).base
        return self.key_codec(name).carries_by_default if base is None else base == "carry"

    def with_delta(self, name: str, delta: Codec) -> "ClappingConfig":
        """The same, but for the codec of one direction; with `none` every message of it is raw."""
        key = Raw() if isinstance(delta, Raw) and self.strategy != "direct" else self.direction(name).key
        direction = self.direction(name).model_copy(update={"key": key, "delta": delta})
        return self.model_copy(update={name: direction})

    def holds_memory(self, name: str) -> bool:
        """Whether some message of a direction is the difference to a memory."""
        delta = self.delta_codec(name)
        if delta is None:
            return False
        deltas_need_it = self.p_new < 1 and not isinstance(delta, Raw)
        keys_need_it = self.carries(name) and not isinstance(self.key_codec(name), Raw)
        return deltas_need_it or keys_need_it

    def mean_bits_per_value(self, name: str, dtype: torch.dtype) -> float:
        """Bits that a value costs on average: p_new * bits(key) + (1 - p_new) * bits(delta)."""
        key_bits = bits_per_value(self.key_codec(name), dtype)
        delta = self.delta_codec(name)
        delta_bits = key_bits if delta is None else bits_per_value(delta, dtype)
        return self.p_new * key_bits + (1 - self.p_new) * delta_bits


_MODELS: dict[str, type[BaseModel]] = {
    "activations": DirectionConfig,
    "gradients": DirectionConfig,
    "memory": MemoryConfig,
    "links": LinksConfig,
    **CODECS,
}


def _explained(error: ValidationError) -> list[str]:
    """A line per mistake: the key, its value, what is accepted."""
    lines = []
    for detail in error.errors():
        path = detail["loc"]
        key = ".".join([BLOCK_NAME, *_keys(path)])
        text = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"]
        if detail["type"] == "extra_forbidden":
            parent = _MODELS.get(str(path[-2]), ClappingConfig) if len(path) > 1 else ClappingConfig
            accepted = "unknown key; accepted: " + ", ".join(parent.model_fields)
        elif detail["type"] in ("union_tag_not_found", "model_attributes_type"):
            accepted = "no codec name; accepted: a name, or an object with the key name"
        elif detail["type"] == "union_tag_invalid":
            accepted = "unknown codec; accepted: " + ", ".join(CODECS)
        else:
            accepted = "accepted: " + text.removeprefix("Input should be ")
        lines.append(
            f"{key}.{text}" if "accepted" in text else f"{key} = {_shown(detail['input'])}: {accepted}"
        )
    return lines


def _keys(path: tuple[int | str, ...]) -> Iterator[str]:
    """As the user wrote them: without pydantic's tag of a codec, and in one line."""
    for before, part in zip(("", *path), path, strict=False):
        if part not in CODECS or not (before in ("key", "delta") or isinstance(before, int)):
            yield str(part) if isinstance(part, int) or part.isidentifier() else _shown(part)
