"""The `"clapping"` block of a DeepSpeed JSON as one frozen model, and the plan of each direction.

Every check of the block is made here, and everything that depends on the strategy is resolved here, once,
into a `Plan` per direction: nothing below asks the configuration what a strategy means.

`python -m clapping_ds.config` prints the block's JSON schema, which `clapping_ds/schema.json` is.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from clapping_ds.codecs import (
    CODECS,
    AnyCodec,
    Codec,
    CodecSequence,
    Eden,
    Float8,
    Quantizer,
    RandK,
    Raw,
    SimpleCodec,
    TopK,
    Transform,
    bits_per_value,
)
from clapping_ds.codecs.base import STRICT
from clapping_ds.codecs.sequence import Member, label, list_members, name_codec
from clapping_ds.codecs.transform import Bits

BLOCK_NAME = "clapping"
CODEC_KEYS = ("codec", "key", "delta", "scatter", "gather", "weights")
DIRECTIONS = ("activations", "gradients")
SEQUENCE = "sequence"


def _show(value: object) -> str:
    """One line of at most 200 characters, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"<{type(value).__name__} of too many digits or levels>"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _plain(given: BaseModel | str) -> Any:
    """As in a JSON file."""
    return given.model_dump() if isinstance(given, BaseModel) else given


def _name_codec(codec: Any) -> Any:
    """A list is a sequence of codecs, and `"int4"` is short for `{"name": "int4"}`."""
    return {"name": SEQUENCE, "codecs": codec} if isinstance(codec, list) else name_codec(codec)


_ONE: Any = Literal[tuple(CODECS)] | SimpleCodec
_MEMBER: Any = Literal[tuple(name for name in CODECS if name != "none")] | Member
_LIST: Any = Annotated[list[_MEMBER], Field(min_length=2, max_length=4)]
CodecConfig = Annotated[
    AnyCodec,
    Field(discriminator="name"),
    BeforeValidator(_name_codec, json_schema_input_type=_ONE | _LIST | CodecSequence),
]


class StartConfig(BaseModel):
    """More bits in the first steps: while nothing is learned yet, and what is sent changes fast."""

    model_config = STRICT

    steps: Annotated[int, Field(ge=1, le=1 << 32)]
    """That have them at least: it goes on until what the codec of a tensor learns is in use. Counted from the
    first step, and anew after a load that finds nothing that fits."""
    bits: Bits = 4.0
    """Of codes, per value; more than the codec's."""


class DirectionConfig(BaseModel):
    """How one direction, `activations` or `gradients`, is compressed."""

    model_config = STRICT

    codec: CodecConfig | None = None
    """With the strategy `direct`: the codec of every message. Default: eden4."""
    key: CodecConfig | None = None
    """With `key_delta`: the codec of fresh slots."""
    delta: CodecConfig | None = None
    """Not with `direct`: the codec of reused slots. Default, but of `key_delta`: eden4."""
    base: Literal["reset", "carry"] | None = None
    """With `fc` and `key_delta`: what a key message is the difference to, zero or the memory. Default: carry
    for `topk`, `randk` and `lowrank`."""
    start: StartConfig | None = None
    """With `direct` and a `transform`: more bits in the first steps."""
    min_numel: Annotated[int, Field(ge=0)] = 4096
    """Floating tensors with fewer values travel raw."""

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        for field in ("codec", "key", "delta"):
            _check_block(field, getattr(self, field), self.min_numel)
        return self


def _check_block(key: str, codec: Codec | None, min_numel: int) -> None:
    if isinstance(codec, CodecSequence):
        for number, member in enumerate(codec.codecs):
            _check_block(f"{key}.{number}", member, min_numel)
    if isinstance(codec, TopK | RandK) and codec.block > min_numel:
        raise ValueError(
            f"{key}.block = {codec.block} is larger than the smallest tensor that is "
            f"compressed, min_numel = {min_numel}; accepted: a block of at most min_numel"
        )


class LazyConfig(BaseModel):
    """Lazy sampling: which slots of a step get a new sample."""

    model_config = STRICT

    pool: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    """Mini-batches that are held. A step uses one of them, in rounds, each in an order of its own; the first
    round is all fresh. 1: each step uses the mini-batch of the step before."""
    p_new: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that a slot's sample is new. 0: never after the first round."""
    refresh: Literal["step", "slot", "cycle"] = "step"
    """One coin per step (the paper), one per slot, or round robin."""


def _check_file_name(name: str) -> str:
    if not name or "\0" in name or not name.isprintable():
        raise ValueError("the name of a file or folder")
    return name


FileName = Annotated[str, AfterValidator(_check_file_name)]


class MemoryConfig(BaseModel):
    """Where and how the memories of error feedback are held."""

    model_config = STRICT

    dtype: Literal["same", "float32", "float16", "bfloat16"] = "same"
    """`same`: the dtype of the tensor that is sent."""
    device: Literal["same", "cpu", "disk"] = "same"
    """`same`: the device of the tensor that is sent. `disk`: a file in `folder`."""
    folder: FileName | None = None
    """With `disk`: where each end of a channel makes a file, which is gone when the run is."""

    @model_validator(mode="after")
    def _check_folder(self) -> Self:
        if (self.device == "disk") != (self.folder is not None):
            accepted = "a folder" if self.device == "disk" else "no folder, or device = 'disk'"
            raise ValueError(f"folder = {self.folder!r} with device = {self.device!r}; accepted: {accepted}")
        return self

    def torch_dtype(self, value_dtype: torch.dtype) -> torch.dtype:
        return value_dtype if self.dtype == "same" else getattr(torch, self.dtype)


class LinksConfig(BaseModel):
    """How the codec of each link and direction is chosen after the first steps. `"auto"` for all defaults."""

    model_config = STRICT

    ladder: list[CodecConfig] = Field(
        default=[Quantizer(name="int8"), Eden(name="eden4"), Transform(bits=3)], min_length=1
    )
    """Codecs to choose from besides `none`, lightest compression first: in place of `codec` with the strategy
    `direct`, of `delta` with the others."""
    min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Part of the step time that a heavier codec must save to be preferred to a lighter one."""
    lazy_gain: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Part of the step time that lazy sampling must save over codecs of the ladder and all samples new; else
    it is switched off. Not with `direct` and `aqsgd`."""
    write: FileName | None = None
    """File that the decision is written to."""
    read: FileName | None = None
    """File of an earlier decision, used in place of measuring."""

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        for field in ("write", "ladder", "min_gain", "lazy_gain") if self.read is not None else ():
            value, default = getattr(self, field), type(self).model_fields[field].default
            if value != default:
                raise ValueError(f"{field} = {_show(value)} together with read; accepted: one of them")
        return self

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        bits = [(codec.name, bits_per_value(codec, torch.float32)) for codec in self.ladder]
        for (before, more), (after, fewer) in pairwise(bits):
            if fewer > more:
                raise ValueError(
                    f"ladder = {[name for name, _ in bits]} with {after} ({fewer:.4g} bits per value) after "
                    f"{before} ({more:.4g}); accepted: lightest compression first"
                )
        return self


def _links(links: object) -> object:
    if links is None or isinstance(links, Mapping | LinksConfig):
        return links
    if links != "auto":
        raise ValueError("'auto', or an object with the keys " + ", ".join(LinksConfig.model_fields))
    return {}


def _depth(depth: object) -> object:
    if depth == "auto" or (isinstance(depth, int) and not isinstance(depth, bool) and depth >= 0):
        return depth
    raise ValueError("'auto', or a whole number of micro-batches from 0")


Feedback = Literal["none", "ef14", "ef21", "ef21_sgdm"]


class DataParallelConfig(BaseModel):
    """How the gradients of data-parallel replicas are averaged."""

    model_config = STRICT

    scatter: CodecConfig = Eden(name="eden4", scale="unbiased")
    """Of a replica's own gradients, on their way to where the mean is taken."""
    gather: CodecConfig = Eden(name="eden4", scale="unbiased")
    """Of the mean, on its way back to all replicas. Not used between two replicas, which send each other
    all of their gradients, nor where an optimizer that is split over replicas needs only its part."""
    error_feedback: Feedback | Literal["auto"] = "auto"
    """Whether what a codec lost is sent later. `ef14`: it is added to the next gradient. `ef21`: changes of
    gradients are sent. `ef21_sgdm`: changes of their running mean. `auto`: `ef14` where a codec is wrong on
    average and has 3 bits or less, or is `topk`, `randk`, `lowrank` or a list; else none."""
    equalize: bool | Literal["auto"] = "auto"
    """Whether a matrix's columns are brought to one scale before `int`, `sign` and `eden` codecs: a byte more
    per column. `auto`: with codecs of 1 bit."""
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    """With `ef21_sgdm`: the share of the new gradient in the running mean."""
    weights: CodecConfig | None = None
    """Where the optimizer is split over replicas: of the changes of weights that they send each other.
    None: weights travel as they are."""
    warmup_steps: Annotated[int, Field(ge=0, le=1 << 32)] = 0
    """First steps in which nothing is compressed."""
    min_numel: Annotated[int, Field(ge=0)] = 4096
    """Parameters with fewer values, or of one dimension, travel raw."""
    node_size: Annotated[int, Field(ge=2, le=1 << 20)] | None = None
    """Consecutive replicas that share a node: raw between them, compressed between nodes. None: one."""
    delay: Annotated[int, Field(ge=0, le=64)] = 0
    """Experimental. Steps that gradients are old when they are used, so that they travel meanwhile."""

    @model_validator(mode="after")
    def _check_codecs(self) -> Self:
        for field in ("scatter", "gather", "weights"):
            codec = getattr(self, field)
            names = [member.name for member in list_members(codec)] if codec is not None else []
            if "transform" in names:
                raise ValueError(
                    f"{field} = {label(codec)!r}, which learns of tokens; accepted: a codec or a list "
                    "without transform"
                )
            if field == "weights" and "lowrank" in names:
                raise ValueError(
                    f"{field} = {label(codec)!r}, which needs whole matrices; accepted: a codec or a list "
                    "without lowrank"
                )
        return self

    @model_validator(mode="after")
    def _check_momentum(self) -> Self:
        default = type(self).model_fields["momentum"].default
        if self.momentum != default and self.error_feedback != "ef21_sgdm":
            raise ValueError(
                f"momentum = {self.momentum} with error_feedback = {self.error_feedback!r}; accepted: no "
                "momentum, or error_feedback = 'ef21_sgdm'"
            )
        return self

    @model_validator(mode="after")
    def _check_equalize(self) -> Self:
        if self.equalize is True and not any(map(self.equalizes, (self.scatter, self.gather))):
            codecs = f"scatter = {label(self.scatter)!r} and gather = {label(self.gather)!r}"
            raise ValueError(
                f"equalize = true with {codecs}; accepted: false, or an int, sign or eden codec in one"
            )
        return self

    @model_validator(mode="after")
    def _check_delay(self) -> Self:
        if self.delay and self.node_size is not None:
            raise ValueError(
                f"delay = {self.delay} with node_size = {self.node_size}; accepted: 0, or node_size = null"
            )
        return self

    @property
    def is_raw(self) -> bool:
        """Whether the host's own exchange does all that is asked for."""
        codecs = (self.scatter, self.gather, self.weights or Raw())
        return self.delay == 0 and all(isinstance(codec, Raw) for codec in codecs)

    def equalizes(self, codec: AnyCodec) -> bool:
        """Whether columns are brought to one scale before one of the codecs."""
        if not isinstance(codec, Quantizer | Eden):
            return False
        return codec.bits == 1 if self.equalize == "auto" else self.equalize

    def feedback(self, codec: AnyCodec) -> Feedback:
        """What is done about the error of one of the codecs."""
        if isinstance(codec, Raw):
            return "none"
        if self.error_feedback != "auto":
            return self.error_feedback
        if isinstance(codec, Quantizer | Eden):
            return "none" if codec.bits > 3 or codec.is_unbiased else "ef14"
        return "none" if isinstance(codec, Float8) else "ef14"


@dataclass(frozen=True)
class Plan:
    """How one direction of a link is compressed, whatever the strategy.

    fresh slot:    m <- base + K(v - base)       base = m if it carries, else 0
    reused slot:   m <- m + D(v - m)
    """

    key: AnyCodec
    """K."""
    delta: AnyCodec
    """D. Never used where all slots are fresh."""
    key_is_delta: bool
    """Whether another delta codec is another key codec as well."""
    base: Literal["reset", "carry"] | None
    min_numel: int
    p_new: float
    memory: MemoryConfig
    start: Transform | None = None
    """K in the first steps, with more bits. It learns what K does."""
    start_steps: int = 0

    @property
    def carries(self) -> bool:
        """Whether a key message is the difference to the memory."""
        return self.key.carries_by_default if self.base is None else self.base == "carry"

    @property
    def holds_memory(self) -> bool:
        """Whether some message is the difference to a memory."""
        deltas_need_it = self.p_new < 1 and not isinstance(self.delta, Raw)
        return deltas_need_it or (self.carries and not isinstance(self.key, Raw))

    def with_codec(self, codec: AnyCodec) -> "Plan":
        """The same with the codec that `links` chose; with `none` every message is raw."""
        key = codec if self.key_is_delta or isinstance(codec, Raw) else self.key
        return replace(self, key=key, delta=codec)

    def as_direct(self, codec: AnyCodec) -> "Plan":
        """The same where `links` chose this codec, and that every sample is new."""
        return replace(self, key=codec, delta=codec, key_is_delta=True, base="reset", p_new=1.0)

    def describe(self) -> dict[str, Any]:
        """What a run and the checkpoint that it loads must have alike. A start may be changed: it changes
        nothing that is held."""
        return {
            "key": self.key.model_dump(),
            "delta": self.delta.model_dump(),
            "carries": self.carries,
            "min_numel": self.min_numel,
            "dtype of memories": self.memory.dtype,
        }

    def mean_bits_per_value(self, dtype: torch.dtype) -> float:
        """Bits that a value costs on average: p_new * bits(key) + (1 - p_new) * bits(delta). Not of the
        start."""
        return self.p_new * bits_per_value(self.key, dtype) + (1 - self.p_new) * bits_per_value(
            self.delta, dtype
        )


ACCEPTED = {
    "direct": ("codec", "start"),
    "fu": ("delta",),
    "fc": ("delta", "base"),
    "key_delta": ("key", "delta", "base"),
    "aqsgd": ("delta",),
}
"""What a direction may hold besides `min_numel`, by strategy."""


class ClappingConfig(BaseModel):
    """The whole block. `from_ds_config` reads it; all fields have defaults."""

    model_config = STRICT

    enabled: bool = True
    """False: the stock engine runs."""
    strategy: Literal["direct", "fu", "fc", "key_delta", "aqsgd"] = "direct"
    """No memory (`direct`); or deltas to a memory and lazy sampling, with keys that are uncompressed (`fu`),
    compressed as deltas are (`fc`), or with a codec of their own (`key_delta`). `aqsgd` is `fu` with all of
    the data in its pool (arXiv 2206.01299)."""
    activations: DirectionConfig = Field(default_factory=DirectionConfig)
    gradients: DirectionConfig = Field(default_factory=DirectionConfig)
    lazy: LazyConfig | None = None
    """Not with `direct`. None: its defaults."""
    memory: MemoryConfig | None = None
    """Not with `direct`. None: its defaults."""
    data_parallel: DataParallelConfig | None = None
    """How the gradients of data-parallel replicas are averaged. None: as the host does."""
    overlap: bool = True
    """Messages travel while the stages compute. False: they are announced, and waited for, as in stock."""
    in_flight: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], BeforeValidator(_depth)] = "auto"
    """Micro-batches that each link holds beyond stock 1F1B, to hide its latency and transfer time.
    `auto`: after the first steps, as many as the measured links need and memory allows."""
    links: Annotated[
        LinksConfig | None,
        BeforeValidator(_links, json_schema_input_type=LinksConfig | Literal["auto"] | None),
    ] = None
    """`auto`: the codec of each link is chosen after the first steps. None: as configured."""
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 1234
    """Of the coin, and of what codecs draw at random. Every rank must have the same."""
    checkpoint_memory: bool = True
    """Whether checkpoints hold memories and held batches. False: the step after a load is all fresh."""
    timeout_s: Annotated[float, Field(ge=1, le=1e9)] = 1800.0
    """How long a message of a peer is waited for before that is an error."""
    verify: bool = False
    """Messages carry a header with checksums, and any difference between the two ends is an error."""
    compile: bool = False
    """Compile the codecs of CPU ranks with torch's C++ backend: some seconds per codec and shape at the
    start, then the same bits in a fraction of the time. Needs torch 2.13 and a C++ compiler; GPUs have
    their own kernels."""

    @model_validator(mode="after")
    def _check_members(self) -> Self:
        for name in DIRECTIONS:
            given = getattr(self, name)
            for field in ("codec", "key", "delta", "base", "start"):
                value = getattr(given, field)
                if value is not None and field not in ACCEPTED[self.strategy]:
                    is_codec = field in ("codec", "key", "delta")
                    text = _show(label(value) if is_codec else _plain(value))
                    raise ValueError(
                        f"{name}.{field} = {text} with strategy = {self.strategy!r}; accepted: "
                        + ", ".join((*ACCEPTED[self.strategy], "min_numel"))
                    )
                if value is None and self.strategy == "key_delta" and field in ("key", "delta"):
                    raise ValueError(f"{name}.{field} = None with strategy = 'key_delta'; accepted: a codec")
        for field in ("lazy", "memory") if self.strategy == "direct" else ():
            if getattr(self, field) is not None:
                raise ValueError(
                    f"{field} = {_show(getattr(self, field).model_dump())} with strategy = 'direct', which "
                    "has no memory and makes every step fresh; accepted: null, or strategy = 'fu', 'fc', "
                    "'key_delta' or 'aqsgd'"
                )
        return self

    @model_validator(mode="after")
    def _check_starts(self) -> Self:
        for name in DIRECTIONS:
            start, codec = getattr(self, name).start, self.plan(name).key
            if start is None:
                continue
            given = f"{name}.start = {_plain(start)}"
            if not isinstance(codec, Transform):
                raise ValueError(
                    f"{given} with codec = {label(codec)!r}; accepted: null, or a transform that is no list"
                )
            if start.bits <= codec.bits:
                raise ValueError(
                    f"{given} with codec.bits = {codec.bits}; accepted: null, or more bits than that"
                )
            if self.links is not None:
                raise ValueError(f"{given} with links, which choose the codec; accepted: one of them")
        return self

    @model_validator(mode="after")
    def _check_data_set(self) -> Self:
        given = {} if self.lazy is None else self.lazy.model_dump(include=self.lazy.model_fields_set)
        if self.strategy == "aqsgd" and "pool" not in given:
            raise ValueError(
                "lazy.pool = None with strategy = 'aqsgd'; accepted: the mini-batches of the data set"
            )
        for field in ("p_new", "refresh") if self.strategy == "aqsgd" else ():
            if given.get(field, 0) != 0:
                raise ValueError(
                    f"lazy.{field} = {given[field]!r} with strategy = 'aqsgd', where no sample is new after "
                    "the first round; accepted: pool alone"
                )
        return self

    @model_validator(mode="after")
    def _check_memories(self) -> Self:
        if self.strategy == "direct":
            return self
        for name, plan in self.plans.items():
            if plan.base is not None and isinstance(plan.key, Raw):
                raise ValueError(
                    f"{name}.base = {plan.base!r} with a key that is sent as it is; accepted: no base"
                )
        holds_memory = any(plan.holds_memory for plan in self.plans.values())
        if self.plan("activations").p_new == 1 and not holds_memory:
            raise ValueError(
                f"lazy.p_new = 1 with strategy = {self.strategy!r}: no sample is seen again, no delta ever "
                "sent; accepted: less than 1, or strategy = 'direct'"
            )
        return self

    @model_validator(mode="after")
    def _check_ladder(self) -> Self:
        for number, codec in enumerate(self.links.ladder if self.links else []):
            smallest = min(self.activations.min_numel, self.gradients.min_numel)
            _check_block(f"links.ladder.{number}", codec, smallest)
        return self

    @model_validator(mode="after")
    def _check_lazy_gain(self) -> Self:
        default = LinksConfig.model_fields["lazy_gain"].default
        is_settled = self.strategy in ("direct", "aqsgd")
        if is_settled and self.links is not None and self.links.lazy_gain != default:
            raise ValueError(
                f"links.lazy_gain = {self.links.lazy_gain} with strategy = {self.strategy!r}, which says "
                "itself whether samples are replayed; accepted: no lazy_gain, or another strategy"
            )
        return self

    @model_validator(mode="after")
    def _check_overlap(self) -> Self:
        if not self.overlap and self.in_flight not in ("auto", 0):
            raise ValueError(f"in_flight = {_show(self.in_flight)} with overlap = false; accepted: 0")
        return self

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
            raise ValueError("\n".join(_explain(error))) from None

    @property
    def sampling(self) -> LazyConfig:
        """When slots are fresh: with `direct`, always."""
        if self.strategy == "direct":
            return LazyConfig(p_new=1.0)
        lazy = self.lazy or LazyConfig()
        return lazy.model_copy(update={"p_new": 0.0}) if self.strategy == "aqsgd" else lazy

    def plan(self, direction: str) -> Plan:
        """How a direction, `activations` or `gradients`, is compressed."""
        given: DirectionConfig = getattr(self, direction)
        delta = given.codec or given.delta or Eden(name="eden4")
        key_is_delta = self.strategy in ("direct", "fc")
        key = given.key or (delta if key_is_delta else Raw())
        start = None
        if given.start is not None and isinstance(key, Transform):
            start = key.model_copy(update={"bits": given.start.bits})
        return Plan(
            key=key,
            delta=delta,
            key_is_delta=key_is_delta,
            base="reset" if self.strategy == "direct" else given.base,
            min_numel=given.min_numel,
            p_new=self.sampling.p_new,
            memory=self.memory or MemoryConfig(),
            start=start,
            start_steps=given.start.steps if given.start is not None else 0,
        )

    @property
    def plans(self) -> dict[str, Plan]:
        """By direction."""
        return {direction: self.plan(direction) for direction in DIRECTIONS}


def schema() -> dict[str, Any]:
    """The JSON schema of a file with a `"clapping"` block, in the draft that editors know; other keys are not
    looked at."""
    block = ClappingConfig.model_json_schema()
    for codec in CODECS.values():  # the discriminator of the union, whatever its default in Python
        block["$defs"][codec.__name__]["required"] = ["name"]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f'A JSON file with a "{BLOCK_NAME}" block',
        "type": "object",
        "properties": {BLOCK_NAME: {"$ref": "#/$defs/ClappingConfig"}},
        "$defs": {**block.pop("$defs"), "ClappingConfig": block},
    }


_MODELS: dict[str, type[BaseModel]] = {
    "activations": DirectionConfig,
    "gradients": DirectionConfig,
    "start": StartConfig,
    "lazy": LazyConfig,
    "memory": MemoryConfig,
    "links": LinksConfig,
    "data_parallel": DataParallelConfig,
    **CODECS,
}


def _explain(error: ValidationError) -> list[str]:
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
            accepted = "unknown codec; accepted: " + _list_codecs(detail["ctx"]["expected_tags"])
        else:
            accepted = "accepted: " + text.removeprefix("Input should be ").split(" or instance of ")[0]
        lines.append(
            f"{key}.{text}" if "accepted" in text else f"{key} = {_show(detail['input'])}: {accepted}"
        )
    return lines


def _list_codecs(tags: str) -> str:
    """Of pydantic's list of a union's tags."""
    names = [tag for name in tags.split(", ") if (tag := name.strip("'")) != SEQUENCE]
    return ", ".join(sorted(names, key=list(CODECS).index))


def _keys(path: tuple[int | str, ...]) -> Iterator[str]:
    """As the user wrote them: without pydantic's tag of a codec, and in one line."""
    for before, part in zip(("", *path), path, strict=False):
        is_codec = before in CODEC_KEYS or isinstance(before, int)
        if not (is_codec and part in (*CODECS, SEQUENCE)) and before != SEQUENCE:
            yield str(part) if isinstance(part, int) or part.isidentifier() else _show(part)


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
