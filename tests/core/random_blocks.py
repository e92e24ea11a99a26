"""Blocks and numbers of examples of the property tests."""

import os

from hypothesis import settings
from hypothesis import strategies as st

from clapping_ds.codecs import CODECS, Eden, Float8, LowRank, Quantizer, RandK, TopK


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
}


@st.composite
def codecs(draw):
    name = draw(st.sampled_from(list(CODECS)))
    options = {} if name == "sign" else OPTIONS.get(CODECS[name], {})
    return {"name": name, **{key: draw(st.sampled_from(values)) for key, values in options.items()}}


@st.composite
def blocks(draw, min_numels, **others):
    """With a p_new of 1 only where no slot may be reused."""
    strategy = draw(st.sampled_from(["fu", "fc", "fc", "direct"]))
    directions = {}
    for name in ("activations", "gradients"):
        key = st.none() if strategy == "direct" else st.none() | codecs()
        direction = {"key": draw(key), "delta": draw(codecs())}
        largest_block = max(codec.get("block", 0) for codec in direction.values() if codec is not None)
        directions[name] = {
            **direction,
            "base": draw(st.sampled_from([None, "reset", "carry"])),
            "min_numel": max(largest_block, draw(st.sampled_from(min_numels))),
        }
    sampling = {} if strategy == "direct" else {"p_new": draw(st.sampled_from([0.5, 0.5, 0.5, 1]))}
    return {
        "strategy": strategy,
        **directions,
        **sampling,
        "memory": {"dtype": draw(st.sampled_from(["same", "float32", "float16", "bfloat16"]))},
        "verify": draw(st.booleans()),
        **{key: draw(st.sampled_from(values)) for key, values in others.items()},
    }
