"""The block is read, or refused with the key, its value and what is accepted."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clapping_ds import ClappingConfig
from clapping_ds.codecs import Quantizer, Raw, TopK


def read(block):
    return ClappingConfig.from_ds_config({"clapping": block})


def test_without_a_block_it_is_off():
    assert not ClappingConfig.from_ds_config({}).enabled


def test_every_key():
    config = read({
        "enabled": True, "strategy": "fc", "p_new": 0.25, "refresh": "cycle", "seed": 3,
        "activations": {"key": "int8", "delta": "int2", "group_size": 64, "base": "carry", "min_numel": 10},
        "gradients": {"delta": {"name": "topk", "ratio": 0.1, "block": 512}, "min_numel": 512},
        "memory": {"dtype": "float32", "device": "cpu"},
    })  # fmt: skip
    assert config.activations.key == Quantizer(name="int8", group_size=64)
    assert config.activations.delta == Quantizer(name="int2", group_size=64)
    assert config.gradients.delta == TopK(ratio=0.1, block=512)
    assert config.key_codec("gradients") == config.gradients.delta
    assert (config.carries("activations"), config.carries("gradients")) == (True, True)
    assert config.memory.torch_dtype(torch.bfloat16) == torch.float32


def test_strategies_choose_the_key():
    assert read({"strategy": "fu"}).key_codec("activations") == Raw()
    assert read({"strategy": "fc"}).key_codec("activations") == Quantizer(name="int4")
    direct = read({"strategy": "direct", "activations": {"delta": "int3"}})
    assert direct.key_codec("activations") == Quantizer(name="int3")
    assert direct.delta_codec("activations") is None
    assert direct.p_new == 1


def test_mean_bits():
    config = read({"activations": {"delta": "int2"}, "p_new": 0.5})
    assert config.mean_bits_per_value("activations", torch.bfloat16) == 0.5 * 16 + 0.5 * 2.125


WRONG = [
    ({"p_neu": 1}, "clapping.p_neu = 1: unknown key; accepted: enabled, strategy, p_new"),
    ({"in_flight": 1.5}, "clapping.in_flight = 1.5: accepted: 'auto', or a whole number of micro-batches"),
    ({"in_flight": 2, "overlap": False}, "clapping.in_flight = 2 with overlap = false; accepted: 0"),
    ({"links": "fast"}, "clapping.links = 'fast': accepted: 'auto', or an object with the keys ladder, min"),
    ({"links": {"ladder": []}}, "clapping.links.ladder = []: "),
    ({"links": {"ladder": ["topk"]}, "gradients": {"min_numel": 8}}, "links.ladder.0.block = 1024 is larger"),
    ({"links": {"read": "a", "write": "b"}}, "clapping.links.write = 'b' together with read; accepted: one"),
    ({"links": {"laddr": ["int8"]}}, "clapping.links.laddr = ['int8']: unknown key; accepted: ladder, min"),
    ({"p_new": 0}, "clapping.p_new = 0: accepted: greater than 0"),
    ({"p_new": 1.5}, "clapping.p_new = 1.5: accepted: less than or equal to 1"),
    ({"p_new": "0.5"}, "clapping.p_new = '0.5': accepted: a valid number"),
    ({"p_new": float("nan")}, "clapping.p_new = nan: accepted: a finite number"),
    ({"strategy": "best"}, "clapping.strategy = 'best': accepted: 'fu', 'fc' or 'direct'"),
    ({"enabled": "yes"}, "clapping.enabled = 'yes': accepted: a valid boolean"),
    ("on", "clapping = 'on': accepted: a valid dictionary"),
    ({"activations": {"delta": {"name": "sign", "rotate": True}}}, "rotate = True with sign; accepted: int8"),
    ({"activations": {"delta": {"name": "int4", "scale": "least_squares"}}}, "accepted: 'maximum'"),
    ({"activations": {"delta": {"name": "int2", "scale": "least_squares", "stochastic": True}}}, "'maximum'"),
    ({"gradients": {"delta": {"name": "eden2", "rotate": True}}}, "rotate = True: unknown key"),
    ({"gradients": {"delta": {"name": "eden2", "scale": "best"}}}, "'least_squares' or 'unbiased'"),
    ({"gradients": {"delta": {"name": "lowrank", "rank": 0}}}, "rank = 0: accepted: greater"),
    ({"gradients": {"delta": {"name": "randk", "block": 8192}}}, "block = 8192"),
    ({"gradients": {"delta": {"name": "topk", "values": "int4"}}}, "accepted: 'bfloat16' or 'int8'"),
    ({"activations": {"delta": "int5"}}, "delta = {'name': 'int5'}: unknown codec; accepted: none, int8"),
    ({"activations": {"delta": {"name": "int4", "group_size": 100}}},
     "clapping.activations.delta.group_size = 100: accepted: a power of two"),
    ({"activations": {"delta": {"name": "int4", "group_size": 8}}}, "accepted: greater than or equal to 16"),
    ({"gradients": {"delta": {"name": "topk", "ratoi": 0.1}}},
     "clapping.gradients.delta.ratoi = 0.1: unknown key; accepted: name, ratio, block"),
    ({"gradients": {"delta": {"name": "topk", "ratio": 1.5}}}, "ratio = 1.5: accepted: less than or equal"),
    ({"gradients": {"delta": "topk", "min_numel": 100}},
     "clapping.gradients.delta.block = 1024 is larger than the smallest tensor that is compressed"),
    ({"strategy": "direct", "p_new": 0.5}, "clapping.p_new = 0.5 with strategy = 'direct'"),
    ({"strategy": "direct", "gradients": {"key": "int8"}}, "clapping.gradients.key = 'int8' with strategy"),
    ({"strategy": "direct", "p_new": True}, "clapping.p_new = True: accepted: a valid number"),
    ({"timeout_s": 1e308}, "clapping.timeout_s = 1e+308: accepted: less than or equal to 1000000000"),
    ({"in_flight": {}}, "clapping.in_flight = {}: accepted: 'auto', or a whole number"),
    ({"topk": 1}, "clapping.topk = 1: unknown key; accepted: enabled"),
    ({"gradients": {"none": 1}}, "clapping.gradients.none = 1: unknown key; accepted: key, delta"),
    ({"gradients": {"delta": {"name": "int4", "topk": 1}}}, "delta.topk = 1: unknown key; accepted: group_s"),
    ({"gradients": {"delta": 4}}, "delta = 4: no codec name; accepted: a name, or an object with"),
    ({"a\nb": 1}, r"clapping.'a\nb' = 1: unknown key"),
    ({"": 1}, "clapping.'' = 1: unknown key"),
    ({"\ud800": 1}, r"clapping = '\ud800': accepted: a valid string"),
    ({1: 2}, "clapping.1 = 1: accepted: Keys should be strings"),
    ({"seed": [0] * 999}, "clapping.seed = [0, 0, 0"),
    ({"p_new": 10**5000}, "clapping.p_new = <int of too many digits or levels>: accepted: "),
    ({"gradients": {"group_size": 64, "key": {"name": [[]]}}}, "key = {'name': [[]]}: unknown codec"),
]  # fmt: skip


@pytest.mark.parametrize(("block", "message"), WRONG, ids=range(len(WRONG)))
def test_refused(block, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(block)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(
    ["fu", "fc", "direct", "int4", "topk", "none", "step", "cycle", "carry", "same", "x", ""]
)  # fmt: skip
keys = st.sampled_from(
    [*ClappingConfig.model_fields, "key", "delta", "group_size", "base", "min_numel", "name", "ratio",
     "block", "dtype", "device", "x"]
)  # fmt: skip
blocks = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=5), max_leaves=12)


@given(blocks)
@settings(max_examples=500, deadline=None)
def test_anything_is_a_model_or_one_value_error(block):
    try:
        assert isinstance(read(block), ClappingConfig)
    except ValueError as error:
        assert type(error) is ValueError
        assert str(error).startswith("clapping")
