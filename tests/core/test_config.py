"""The block is read, or refused with the key, its value and what is accepted."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clapping_ds
from clapping_ds import ClappingConfig
from clapping_ds.codecs import Eden, Quantizer, Raw, TopK
from clapping_ds.config import schema


def read(block):
    return ClappingConfig.from_ds_config({"clapping": block})


def test_without_a_block_it_is_off():
    assert not ClappingConfig.from_ds_config({}).enabled


def test_every_key():
    config = read({
        "enabled": True, "strategy": "fc", "lazy": {"p_new": 0.25, "refresh": "cycle"}, "seed": 3,
        "activations": {"delta": {"name": "int2", "group_size": 64}, "base": "carry", "min_numel": 10},
        "gradients": {"delta": {"name": "topk", "ratio": 0.1, "block": 512}, "min_numel": 512},
        "memory": {"dtype": "float32", "device": "cpu"},
    })  # fmt: skip
    plan = config.plan("gradients")
    assert config.activations.delta == Quantizer(name="int2", group_size=64)
    assert plan.key == plan.delta == TopK(ratio=0.1, block=512)
    assert (config.plan("activations").carries, plan.carries) == (True, True)
    assert plan.memory.torch_dtype(torch.bfloat16) == torch.float32


def test_strategies_choose_the_key():
    assert read({"strategy": "fu"}).plan("activations").key == Raw()
    assert read({"strategy": "fc"}).plan("activations").key == Eden(name="eden4")
    both = {"key": "int8", "delta": "int2"}
    plan = read({"strategy": "key_delta", "activations": both, "gradients": both}).plan("gradients")
    assert (plan.key, plan.delta) == (Quantizer(name="int8"), Quantizer(name="int2"))
    assert plan.holds_memory


def test_aqsgd_is_fu_whose_pool_never_changes():
    config = read({"strategy": "aqsgd", "lazy": {"pool": 100}, "gradients": {"delta": "int8"}})
    fu = read({"strategy": "fu", "lazy": {"pool": 100, "p_new": 0}, "gradients": {"delta": "int8"}})
    assert (config.sampling, config.plans) == (fu.sampling, fu.plans)
    assert config.plan("gradients").mean_bits_per_value(torch.float16) == 8.125


def test_where_memories_live_is_nothing_that_two_ends_must_have_alike():
    blocks = ({}, {"device": "cpu"}, {"device": "disk", "folder": "/"})
    described = [read({"strategy": "fu", "memory": memory}).plan("gradients").describe() for memory in blocks]
    assert described[0] == described[1] == described[2]


def test_direct_is_the_default_and_keeps_no_memory():
    assert read({}).plans == read({"strategy": "direct", "activations": {"codec": "eden4"}}).plans
    plan = read({"activations": {"codec": "topk"}}).plan("activations")
    assert plan.key == TopK()
    assert (plan.p_new, plan.carries, plan.holds_memory) == (1, False, False)


def test_a_chosen_codec_takes_the_place_that_the_strategy_gives_it():
    both = {"key": "int8", "delta": "int2"}
    blocks = {
        "direct": {}, "fu": {"strategy": "fu"}, "fc": {"strategy": "fc"},
        "key_delta": {"strategy": "key_delta", "activations": both, "gradients": both},
    }  # fmt: skip
    keys = {"direct": "int4", "fu": "none", "fc": "int4", "key_delta": "int8"}
    for strategy, block in blocks.items():
        plan = read(block).plan("activations")
        chosen, raw = plan.with_codec(Quantizer(name="int4")), plan.with_codec(Raw())
        assert (chosen.key.name, chosen.delta.name) == (keys[strategy], "int4")
        assert (raw.key.name, raw.delta.name, raw.holds_memory) == ("none", "none", False)


def test_mean_bits():
    plan = read({"strategy": "fu", "activations": {"delta": "int2"}}).plan("activations")
    assert plan.mean_bits_per_value(torch.bfloat16) == 0.5 * 16 + 0.5 * 2.125


def test_the_schema_that_editors_use_is_current():
    path = Path(clapping_ds.__file__).with_name("schema.json")
    assert json.loads(path.read_text()) == schema(), "python -m clapping_ds.config > clapping_ds/schema.json"


def lazy(**lazy):
    return {"strategy": "fu", "lazy": lazy}


WRONG = [
    ({"p_neu": 1}, "clapping.p_neu = 1: unknown key; accepted: enabled, strategy, activations"),
    ({"in_flight": 1.5}, "clapping.in_flight = 1.5: accepted: 'auto', or a whole number of micro-batches"),
    ({"in_flight": 2, "overlap": False}, "clapping.in_flight = 2 with overlap = false; accepted: 0"),
    ({"links": "fast"}, "clapping.links = 'fast': accepted: 'auto', or an object with the keys ladder, min"),
    ({"links": {"ladder": []}}, "clapping.links.ladder = []: "),
    ({"links": {"ladder": ["topk"]}, "gradients": {"min_numel": 8}}, "links.ladder.0.block = 1024 is larger"),
    ({"links": {"read": "a", "write": "b"}}, "clapping.links.write = 'b' together with read; accepted: one"),
    ({"links": {"laddr": ["int8"]}}, "clapping.links.laddr = ['int8']: unknown key; accepted: ladder, min"),
    (lazy(p_new=-0.1), "clapping.lazy.p_new = -0.1: accepted: greater than or equal to 0"),
    (lazy(pool=0), "clapping.lazy.pool = 0: accepted: greater than or equal to 1"),
    (lazy(pool=2.5), "clapping.lazy.pool = 2.5: accepted: a valid integer"),
    ({"strategy": "aqsgd"}, "lazy.pool = None with strategy = 'aqsgd'; accepted: the mini-batches of the"),
    ({"strategy": "aqsgd", "lazy": {"pool": 8, "p_new": 0.5}},
     "lazy.p_new = 0.5 with strategy = 'aqsgd', where no sample is new"),
    ({"strategy": "aqsgd", "lazy": {"pool": 8, "refresh": "step"}},
     "lazy.refresh = 'step' with strategy = 'aqsgd'"),
    ({"strategy": "aqsgd", "lazy": {"pool": 8}, "gradients": {"key": "int8"}},
     "gradients.key = 'int8' with strategy = 'aqsgd'"),
    ({"strategy": "fu", "memory": {"device": "disk"}},
     "clapping.memory.folder = None with device = 'disk'; accepted: a folder"),
    ({"strategy": "fu", "memory": {"folder": "/tmp"}},
     "clapping.memory.folder = '/tmp' with device = 'same'; accepted: no folder, or device = 'disk'"),
    ({"strategy": "fu", "memory": {"device": "disk", "folder": ""}},
     "memory.folder = '': accepted: the name of a file or folder"),
    (lazy(p_new=1.5), "clapping.lazy.p_new = 1.5: accepted: less than or equal to 1"),
    (lazy(p_new=True), "clapping.lazy.p_new = True: accepted: a valid number"),
    (lazy(p_new="0.5"), "clapping.lazy.p_new = '0.5': accepted: a valid number"),
    (lazy(p_new=float("nan")), "clapping.lazy.p_new = nan: accepted: a finite number"),
    ({"strategy": "best"}, "clapping.strategy = 'best': accepted: 'direct', 'fu', 'fc', 'key_delta' or"),
    ({"enabled": "yes"}, "clapping.enabled = 'yes': accepted: a valid boolean"),
    ("on", "clapping = 'on': accepted: a valid dictionary"),
    ({"activations": {"codec": {"name": "sign", "rotate": True}}}, "rotate = True with sign; accepted: int8"),
    ({"activations": {"codec": {"name": "int4", "scale": "least_squares"}}}, "accepted: 'maximum'"),
    ({"activations": {"codec": {"name": "int2", "scale": "least_squares", "stochastic": True}}}, "'maximum'"),
    ({"gradients": {"codec": {"name": "eden2", "rotate": True}}}, "rotate = True: unknown key"),
    ({"gradients": {"codec": {"name": "eden2", "scale": "best"}}}, "'least_squares' or 'unbiased'"),
    ({"gradients": {"codec": {"name": "lowrank", "rank": 0}}}, "rank = 0: accepted: greater"),
    ({"gradients": {"codec": {"name": "randk", "block": 8192}}}, "block = 8192"),
    ({"gradients": {"codec": {"name": "topk", "values": "int4"}}}, "accepted: 'bfloat16' or 'int8'"),
    ({"activations": {"codec": "int5"}}, "codec = {'name': 'int5'}: unknown codec; accepted: none, int8"),
    ({"activations": {"codec": {"name": "int4", "group_size": 100}}},
     "clapping.activations.codec.group_size = 100: accepted: a power of two"),
    ({"activations": {"codec": {"name": "int4", "group_size": 8}}}, "accepted: greater than or equal to 16"),
    ({"gradients": {"codec": {"name": "topk", "ratoi": 0.1}}},
     "clapping.gradients.codec.ratoi = 0.1: unknown key; accepted: name, ratio, block"),
    ({"gradients": {"codec": {"name": "topk", "ratio": 1.5}}}, "ratio = 1.5: accepted: less than or equal"),
    ({"gradients": {"codec": "topk", "min_numel": 100}},
     "clapping.gradients.codec.block = 1024 is larger than the smallest tensor that is compressed"),
    ({"activations": {"key": "int8"}},
     "clapping.activations.key = 'int8' with strategy = 'direct'; accepted"),
    ({"activations": {"delta": "int8"}},
     "activations.delta = 'int8' with strategy = 'direct'; accepted: codec,"),
    ({"gradients": {"base": "carry"}},
     "clapping.gradients.base = 'carry' with strategy = 'direct'; accepted:"),
    ({"lazy": {}},
     "clapping.lazy = {'pool': 1, 'p_new': 0.5, 'refresh': 'step'} with strategy = 'direct', which has no"),
    ({"memory": {"device": "cpu"}},
     "clapping.memory = {'dtype': 'same', 'device': 'cpu', 'folder': None} with strategy = 'dir"),
    ({"strategy": "fu", "activations": {"key": "int8"}},
     "clapping.activations.key = 'int8' with strategy = 'fu'"),
    ({"strategy": "fu", "activations": {"base": "carry"}},
     "activations.base = 'carry' with strategy = 'fu'; acc"),
    ({"strategy": "fc", "gradients": {"key": "int8"}},
     "clapping.gradients.key = 'int8' with strategy = 'fc'"),
    ({"strategy": "fc", "gradients": {"codec": "int8"}},
     "clapping.gradients.codec = 'int8' with strategy = 'fc'"),
    ({"strategy": "fc", "gradients": {"delta": "none", "base": "carry"}},
     "a key that is sent as it is; accepted:"),
    ({"strategy": "key_delta", "activations": {"key": "int8"}},
     "activations.delta = None with strategy = 'key"),
    (lazy(p_new=1), "clapping.lazy.p_new = 1 with strategy = 'fu': no sample is seen again"),
    (lazy(p=1), "clapping.lazy.p = 1: unknown key; accepted: pool, p_new, refresh"),
    ({"links": {"ladder": ["int2", "int8"]}},
     "links.ladder = ['int2', 'int8'] with int8 (8.125 bits per value)"),
    ({"links": {"lazy_gain": 0.5}}, "clapping.links.lazy_gain = 0.5 with strategy = 'direct', which says"),
    ({"links": {"write": "\ud800"}}, r"links.write = '\ud800': accepted: the name of a file or folder"),
    ({"links": {"read": "a", "min_gain": 0.1}}, "links.min_gain = 0.1 together with read; accepted: one of"),
    ({"links": {"read": "a", "ladder": ["eden3"]}}, "together with read; accepted: one of them"),
    ({"timeout_s": 1e-9}, "clapping.timeout_s = 1e-09: accepted: greater than or equal to 1"),
    ({"gradients": {"group_size": 64}},
     "clapping.gradients.group_size = 64: unknown key; accepted: codec, key"),
    ({"timeout_s": 1e308}, "clapping.timeout_s = 1e+308: accepted: less than or equal to 1000000000"),
    ({"in_flight": {}}, "clapping.in_flight = {}: accepted: 'auto', or a whole number"),
    ({"topk": 1}, "clapping.topk = 1: unknown key; accepted: enabled"),
    ({"gradients": {"none": 1}}, "clapping.gradients.none = 1: unknown key; accepted: codec, key"),
    ({"gradients": {"codec": {"name": "int4", "topk": 1}}}, "codec.topk = 1: unknown key; accepted: group_s"),
    ({"gradients": {"codec": 4}}, "codec = 4: no codec name; accepted: a name, or an object with"),
    ({"activations": {"start": {"steps": 9}}},
     "activations.start = {'steps': 9, 'bits': 4.0} with codec = 'eden4'; accepted: null, or a transform"),
    ({"gradients": {"codec": ["lowrank", "transform"], "start": {"steps": 9}}},
     "with codec = 'lowrank + transform'; accepted: null, or a transform that is no list"),
    ({"gradients": {"codec": "transform", "start": {"steps": 9, "bits": 3}}},
     "gradients.start = {'steps': 9, 'bits': 3.0} with codec.bits = 3.0; accepted: null, or more"),
    ({"gradients": {"codec": "transform", "start": {"bits": 5}}}, "clapping.gradients.start.steps = "),
    ({"gradients": {"codec": "transform", "start": {"steps": 0}}}, "start.steps = 0: accepted: greater"),
    ({"gradients": {"codec": "transform", "start": {"steps": 1, "bits": 9}}}, "start.bits = 9: accepted: l"),
    ({"gradients": {"codec": "transform", "start": {"step": 1}}}, "start.step = 1: unknown key; accepted: s"),
    ({"gradients": {"codec": "transform", "start": {"steps": 9}}, "links": "auto"},
     "gradients.start = {'steps': 9, 'bits': 4.0} with links, which choose the codec; accepted: one of them"),
    ({"strategy": "fc", "gradients": {"delta": "transform", "start": {"steps": 9}}},
     "gradients.start = {'steps': 9, 'bits': 4.0} with strategy = 'fc'; accepted: delta, base"),
    ({"a\nb": 1}, r"clapping.'a\nb' = 1: unknown key"),
    ({"": 1}, "clapping.'' = 1: unknown key"),
    ({"\ud800": 1}, r"clapping = '\ud800': accepted: a valid string"),
    ({1: 2}, "clapping.1 = 1: accepted: Keys should be strings"),
    ({"seed": [0] * 999}, "clapping.seed = [0, 0, 0"),
    (lazy(p_new=10**5000), "clapping.lazy.p_new = <int of too many digits or levels>: accepted: "),
    ({"gradients": {"key": {"name": [[]]}}}, "key = {'name': [[]]}: unknown codec"),
]  # fmt: skip


@pytest.mark.parametrize(("block", "message"), WRONG, ids=range(len(WRONG)))
def test_refused(block, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(block)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(
    ["fu", "fc", "key_delta", "direct", "int4", "topk", "none", "step", "cycle", "carry", "same", "x", ""]
)  # fmt: skip
keys = st.sampled_from(
    [*ClappingConfig.model_fields, "codec", "key", "delta", "p_new", "refresh", "group_size", "base",
     "min_numel", "name", "ratio",
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
