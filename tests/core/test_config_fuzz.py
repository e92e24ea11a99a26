"""10,000 random blocks: each is read, and is then of use, or is refused in one error that names every key."""

import json
import random
import re

import jsonschema
import pytest
import torch

from clapping_ds import ClappingConfig
from clapping_ds.codecs import (
    CODECS,
    Eden,
    Float8,
    LowRank,
    Quantizer,
    RandK,
    TopK,
    Transform,
    bits_per_value,
)
from clapping_ds.config import (
    DataParallelConfig,
    DirectionConfig,
    LazyConfig,
    LinksConfig,
    MemoryConfig,
    schema,
)

NUM_BLOCKS = 10_000
SCHEMA = jsonschema.Draft7Validator(schema())
DIRECTIONS = ("activations", "gradients")

DEEP: list = []
for _ in range(500):
    DEEP = [DEEP]

JUNK = [
    None, True, False, 0, -1, 1, 2, 3.7, 1 << 63, 1 << 64, -(1 << 70), 10**400, -0.0, 5e-324, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "auto", "x", "\u00e9\u4e2d\U0001f600", "a\nb", "\0",
    "\ud800", "x" * 5000, "int5", "direct", "1", b"int4", (), (1, 2), {1}, 1j, [], [None], [[], {}],
    {}, {"": 1}, {"name": None}, {"name": []}, {"name": {"name": "int4"}}, {"\ud800": 1}, {1: 2}, {None: {}},
    DEEP, [float("nan")], 10**4000, object, torch.float32,
]  # fmt: skip
NAMES = sorted(
    {
        field
        for model in (
            ClappingConfig,
            DirectionConfig,
            LazyConfig,
            MemoryConfig,
            LinksConfig,
            DataParallelConfig,
            *CODECS.values(),
        )
        for field in model.model_fields
    }
    | set(CODECS)
    | {"", " ", "a b", "a\nb", "a.b", "\0", "\ud800", "\u00e9\u4e2d", "clapping", "__class__", "model_config"}
)


def valid_codec(rng):
    """What a user may write for a codec: its name, or an object."""
    name = rng.choice(list(CODECS))
    if rng.random() < 0.4:
        return name
    codec = CODECS[name]
    options = {
        Quantizer: {"group_size": [16, 64, 1024], "rotate": [False], "stochastic": [False], "scale": [None]},
        Eden: {"group_size": [32, 128], "scale": ["least_squares", "unbiased"]},
        Float8: {"group_size": [16, 256]},
        TopK: {"ratio": [1e-9, 0.05, 0.5], "block": [64, 1024], "values": ["bfloat16", "int8"]},
        RandK: {"ratio": [0.1, 1], "block": [64, 1024]},
        LowRank: {"rank": [1, 4, 64]},
        Transform: {
            "bits": [0.0625, 7.5],
            "basis": ["channel", "eigen"],
            "anchors": [0, 3],
            "refresh": [2, 1000],
        },
    }.get(codec, {})
    return {"name": name, **some(rng, options)}


def some(rng, options):
    return {key: rng.choice(values) for key, values in options.items() if rng.random() < 0.4}


MEMBERS = {"direct": ["codec"], "fu": ["delta"], "fc": ["delta"], "key_delta": ["key", "delta"]}


def valid_direction(rng, strategy):
    direction = some(rng, {"min_numel": [1024, 4096, 1 << 80]})
    for member in MEMBERS[strategy]:
        if strategy == "key_delta" or rng.random() < 0.5:
            direction[member] = valid_codec(rng)
    key = direction.get("key", direction.get("delta"))
    if strategy in ("fc", "key_delta") and key not in ("none", {"name": "none"}):
        direction |= some(rng, {"base": [None, "reset", "carry"]})
    return direction


def valid_block(rng):
    strategy = rng.choice(list(MEMBERS))
    block = some(rng, {
        "enabled": [True, False], "seed": [0, 7, (1 << 64) - 1], "in_flight": [0, "auto"],
        "overlap": [True, False], "checkpoint_memory": [True, False], "timeout_s": [1, 30.5, 1e6],
        "verify": [True, False], "compile": [True, False],
    })  # fmt: skip
    if strategy != "direct" or rng.random() < 0.5:
        block["strategy"] = strategy
    if strategy == "direct":
        block |= some(rng, {"lazy": [None], "memory": [None]})
    else:
        lazy = some(rng, {"p_new": [0.5, 1e-9, 0.1], "refresh": ["step", "slot", "cycle"]})
        block |= some(rng, {
            "lazy": [None, lazy],
            "memory": [None, {}, {"dtype": "float32"}, {"dtype": "same", "device": "cpu"}],
        })  # fmt: skip
    for name in DIRECTIONS:
        if strategy == "key_delta" or rng.random() < 0.5:
            block[name] = valid_direction(rng, strategy)
    if any(block.get(name, {}).get("base") == "carry" for name in DIRECTIONS) and rng.random() < 0.5:
        block["lazy"] = {"p_new": rng.choice([1, 1.0])}
    if rng.random() < 0.3:
        links = some(rng, {"min_gain": [0, 0.5], "write": ["links.json"]})
        if rng.random() < 0.5:
            ladder = [valid_codec(rng) for _ in range(rng.randint(1, 3))]
            links["ladder"] = sorted(ladder, key=bits_of, reverse=True)
        block["links"] = rng.choice([None, "auto", links])
    if rng.random() < 0.3:
        block["data_parallel"] = rng.choice([None, valid_data_parallel(rng)])
    return block


def valid_data_parallel(rng):
    plan = some(rng, {
        "error_feedback": ["auto", "none", "ef14", "ef21"], "warmup_steps": [0, 7], "min_numel": [0, 1 << 70],
        "node_size": [None, 2, 8], "delay": [0, 3], "weights": [None, "int8", ["topk", "eden1"]],
        "equalize": ["auto", False],
    })  # fmt: skip
    if plan.get("node_size") is not None:
        plan.pop("delay", None)
    for member in ("scatter", "gather"):
        codec = valid_codec(rng)
        if "transform" not in (codec, codec if isinstance(codec, str) else codec["name"]):
            plan |= some(rng, {member: [codec]})
    if rng.random() < 0.2:
        plan |= {"error_feedback": "ef21_sgdm", "momentum": 0.5}
    return plan


def bits_of(codec):
    codec = {"name": codec} if isinstance(codec, str) else codec
    return bits_per_value(CODECS[codec["name"]](**codec), torch.float32)


def objects(value):
    """The dictionaries and lists in a block, from the outside in."""
    found, i = [value], 0
    while i < len(found):
        inner = found[i].values() if isinstance(found[i], dict) else found[i]
        found += [item for item in inner if type(item) in (dict, list)]
        i += 1
    return found


def junk(rng):
    """Any value, or a small tree of known names and any values."""
    if rng.random() < 0.8:
        return rng.choice(JUNK)
    return {rng.choice(NAMES): junk(rng) for _ in range(rng.randint(1, 3))}


def misspelt(rng, name):
    position = rng.randrange(len(name) + 1)
    return name[:position] + rng.choice(["", "x", "_", " ", "\u00e9", "\n"]) + name[position + 1 :]


def spoil(rng, place):
    """Changes one thing in a dictionary or list."""
    if isinstance(place, list):
        place.insert(rng.randint(0, len(place)), junk(rng))
    elif place and rng.random() < 0.4:
        place[rng.choice(list(place))] = junk(rng)
    elif place and rng.random() < 0.4:
        name = rng.choice(list(place))
        value = place.pop(name)
        place[misspelt(rng, name) if isinstance(name, str) else name] = value
    else:
        place[rng.choice(NAMES)] = junk(rng)


def random_block(rng):
    """In four cases of ten a block that must be read; else one that is spoilt, or nothing like a block."""
    block = valid_block(rng)
    if rng.random() < 0.4:
        return block, True
    if rng.random() < 0.1:
        return junk(rng), False
    places = objects(block)
    for _ in range(rng.randint(1, 3)):
        spoil(rng, rng.choice(places))
    return block, False


KEY = r"(?:[^\W\d][\w-]*|\d+|'[^\n]*'|\"[^\n]*\")"
LINE = re.compile(
    rf"clapping(?P<path>(?:\.{KEY})*)"
    r"(?: = [^\n]+: (?:unknown key; |unknown codec; |no codec name; )?accepted: [^\n]+"
    r"| = [^\n]+ (?:with|together with|is|is for) [^\n]+)"
)


def assert_is_clear(error):
    """Each line: which key, which value, what is accepted."""
    assert type(error) is ValueError
    str(error).encode()
    for line in str(error).split("\n"):
        assert LINE.fullmatch(line), repr(line)
        assert "accepted" in line or "must not" in line, line
        assert len(line) < 1000, line


def assert_is_of_use(config):
    for plan in config.plans.values():
        for codec in (plan.key, plan.delta):
            assert codec.nbytes((64, 64), torch.bfloat16) > 0
        assert isinstance(plan.carries, bool)
        assert isinstance(plan.holds_memory, bool)
        assert 0 < plan.mean_bits_per_value(torch.float32) < 48


@pytest.mark.parametrize("seed", range(10))
def test_a_random_block_is_read_or_refused_in_one_clear_error(seed):
    rng = random.Random(seed)
    num_read = 0
    for _ in range(NUM_BLOCKS // 10):
        block, is_valid = random_block(rng)
        try:
            config = ClappingConfig.from_ds_config({"clapping": block})
        except ValueError as error:
            assert not is_valid, block
            assert_is_clear(error)
            continue
        num_read += 1
        assert_is_of_use(config)
        assert not is_valid or SCHEMA.is_valid({"clapping": block}), block
        assert ClappingConfig.from_ds_config({"clapping": config.model_dump()}) == config
        written = json.loads(config.model_dump_json())
        assert ClappingConfig.from_ds_config({"clapping": written}) == config
    assert NUM_BLOCKS / 10 * 0.3 < num_read < NUM_BLOCKS / 10 * 0.6
