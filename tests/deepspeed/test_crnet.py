"""CR-Net over DeepSpeed pipelines: what crosses links, recomputation, codecs that learn."""

import pytest

from clapping_ds.crnet import CRNetConfig
from launch.pretrain_crnet import pipeline
from tests import models
from tests.models import NONE

SIZE = {
    "vocabulary": models.VOCABULARY, "width": 64, "intermediate": 96, "num_layers": 8, "num_heads": 2,
    "rank": 8, "checkpoint_every": 2,
}  # fmt: skip
TRANSFORM = {"name": "transform", "bits": 2, "basis": "channel"}
BLOCKS = {
    "stock": None,
    "none": NONE,
    "eden4": {"activations": {"codec": "eden4"}, "gradients": {"codec": "eden4"}},
    "transform": {"activations": {"codec": TRANSFORM}, "gradients": {"codec": TRANSFORM}},
}

NEAR = {"stock": 0, "eden4": 0.02, "transform": 0.1}
"""Of the losses of the first steps, in which they fall fast."""


def trained(options, num_stages, steps=4):
    """By block: losses, and bytes that a value of x would have taken, per token of one direction."""
    config = CRNetConfig.model_validate({**SIZE, **options})
    found = {}
    for name, block in BLOCKS.items():
        ds = {"train_micro_batch_size_per_gpu": models.BATCH, "gradient_accumulation_steps": 4,
              "steps_per_print": 1000, **({} if block is None else {"clapping": block})}  # fmt: skip
        engine = models.start(pipeline(config, num_stages, seed=3), ds, stock=block is None)
        losses = models.train(engine, steps)
        rows = engine.clapping_report() if block is not None else []
        tokens = steps * 4 * models.BATCH * models.LENGTH
        found[name] = losses, [row["raw_bytes"] / 4 / tokens for row in rows]
    return found


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("anchor", ["model", "stage"])
def test_pipelines(four_ranks, anchor, num_stages):
    plain = four_ranks.run(trained, {"anchor": anchor}, num_stages)
    rebuilt = four_ranks.run(trained, {"anchor": anchor, "recompute": "forward"}, num_stages)
    width, intermediate = SIZE["width"], SIZE["intermediate"]
    values = width if anchor == "stage" else 6 * width + 2 * intermediate
    for found, again in zip(plain, rebuilt, strict=True):
        stock, _ = found["stock"]
        for name, (losses, sent) in found.items():
            assert again[name] == (losses, sent)
            assert losses == (stock if name == "none" else pytest.approx(stock, rel=NEAR[name]))
            assert losses[-1] < losses[0]
            assert set(sent) == (set() if name == "stock" else {values})


def refused(options, num_stages):
    pipeline(CRNetConfig.model_validate({**SIZE, **options}), num_stages, seed=3)


def test_a_stage_without_segments_is_one_error(two_ranks):
    outcomes = two_ranks.outcomes(refused, {"checkpoint_every": 8}, 2)
    assert {outcome.kind for outcome in outcomes} == {"ValueError"}
    assert "2 stages with 1 segments of checkpoint_every = 8 layers" in outcomes[0].message
