"""Blocks and numbers of examples of the property tests."""

import os
from tempfile import gettempdir

from hypothesis import settings
from hypothesis import strategies as st

from clapping_ds.codecs import CODECS, Eden, Float8, LowRank, Quantizer, RandK, TopK, Transform


def reproducible(num_examples):
    """The same examples in every run. EXAMPLES_TIMES=10 in the environment: ten times as many."""
    num_examples *= int(os.environ.get("EXAMPLES_TIMES", "1"))
    return settings(derandomize=True, database=None, deadline=None, max_examples=num_examples)


OPTIONS = {
    Quantizer: {"group_size": [16, 64, 128], "stochastic": [False, True], "rotate": [False, True]},
    Eden: {"group_size": [16, 64, 128], "scale": ["least_squares", "unbiased"]},
    Float8: {"group_size": [16, 64, 128]},
    TopK: {"ratio": [0.01, 0.05, 0.5], "block": [64], "values": ["bfloat16", "int8"]},
    RandK: {"ratio": [0.1, 1], "block": [64]},
    LowRank: {"rank": [1, 2, 16]},
    Transform: {"bits": [0.0625, 2.5], "basis": ["channel", "eigen"], "anchors": [0, 3], "refresh": [2, 3]},
}


@st.composite
def codecs(draw):
    name = draw(st.sampled_from(list(CODECS)))
    options = {} if name == "sign" else OPTIONS.get(CODECS[name], {})
    return {"name": name, **{key: draw(st.sampled_from(values)) for key, values in options.items()}}


@st.composite
def sequences(draw):
    return draw(st.lists(codecs().filter(lambda codec: codec["name"] != "none"), min_size=2, max_size=3))


def list_codecs(codec):
    return codec if isinstance(codec, list) else [codec]


MEMBERS = {
    "direct": ["codec"],
    "fu": ["delta"],
    "fc": ["delta"],
    "key_delta": ["key", "delta"],
    "aqsgd": ["delta"],
}


@st.composite
def blocks(draw, min_numels, refresh=("step",), **others):
    """With a p_new of 1 only where a key builds on the memory."""
    strategy = draw(st.sampled_from(["fu", "fc", "fc", "key_delta", "key_delta", "aqsgd", "direct"]))
    directions, carries = {}, False
    for name in ("activations", "gradients"):
        direction = {
            member: draw(st.one_of(codecs(), codecs(), codecs(), sequences())) for member in MEMBERS[strategy]
        }
        largest_block = max(
            member.get("block", 0) for codec in direction.values() for member in list_codecs(codec)
        )
        key = direction.get("key", direction.get("delta", direction.get("codec")))
        if strategy in ("fc", "key_delta") and list_codecs(key)[0]["name"] != "none":
            direction["base"] = draw(st.sampled_from([None, "reset", "carry", "carry"]))
            carries |= direction["base"] == "carry"
        if isinstance(key, dict) and (strategy, key["name"]) == ("direct", "transform"):
            direction["start"] = draw(st.sampled_from([None, {"steps": 1}, {"steps": 2, "bits": 8.0}]))
        directions[name] = {**direction, "min_numel": max(largest_block, draw(st.sampled_from(min_numels)))}
    lazy = {}
    if strategy != "direct":
        dtype = draw(st.sampled_from(["same", "float32", "float16", "bfloat16"]))
        place = draw(st.sampled_from([{}, {"device": "cpu"}, {"device": "disk", "folder": gettempdir()}]))
        lazy = {
            "lazy": {"pool": draw(st.sampled_from([1, 1, 2, 3]))},
            "memory": {"dtype": dtype, **place},
        }
        if strategy != "aqsgd":
            p_new = draw(st.sampled_from([0.5, 0.5, 0, 1 if carries else 0.5]))
            lazy["lazy"] |= {"p_new": p_new, "refresh": draw(st.sampled_from(refresh))}
    return {
        "strategy": strategy,
        **directions,
        **lazy,
        "verify": draw(st.booleans()),
        **{key: draw(st.sampled_from(values)) for key, values in others.items()},
    }
