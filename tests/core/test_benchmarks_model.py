"""The studies on a pretrained LLM, on a small random one: what crosses a link, and how it is counted."""

from functools import partial
from itertools import islice

import pytest
import torch

from benchmarks.codecs.peers import TILE, tah_quant
from benchmarks.model import damage
from benchmarks.model.links import Links
from benchmarks.training import finetune, scratch
from clapping_ds.codecs import Context, Eden
from clapping_ds.link.seeds import draw_word
from launch import llm
from launch.trainer import Training
from tests.core.test_llm import make, make_ids


def cross(model, block, numbers, ids):
    links = Links(*[block] * len(numbers))
    links.begin_step(0, [True])
    with links.behind([model.base_model.layers[number] for number in numbers]):
        return links, model(ids).logits


def test_uncompressed_links_change_no_bit():
    model = make("llama").eval()
    _, logits = cross(
        model, {"activations": {"codec": "none"}, "gradients": {"codec": "none"}}, [0, 2], make_ids()
    )
    assert torch.equal(logits, model(make_ids()).logits)


def test_what_crosses_is_what_the_codec_leaves():
    """By hand: the block's output, coded with the seed of link 0, direction 0, step 0, slot 0, tensor 0."""
    model, codec, found = make("llama").eval(), Eden(name="eden2"), {}
    block = {"activations": {"codec": "eden2", "min_numel": 0}, "seed": 7}
    handle = model.base_model.layers[1].register_forward_pre_hook(lambda _, given: found.update(x=given[0]))
    links, _ = cross(model, block, [0], make_ids())
    handle.remove()
    out = {}
    handle = model.base_model.layers[0].register_forward_hook(
        lambda _, __, value: out.update(x=value.detach())
    )
    model(make_ids())
    handle.remove()
    payload = torch.empty(codec.nbytes(out["x"].shape, torch.float32), dtype=torch.uint8)
    context = Context(seed=draw_word(draw_word(7, 0, 0, False), 0, 0, 0))
    codec.encode_(out["x"], payload, context)
    codec.decode_(payload, out["x"], context)
    assert torch.equal(found["x"], out["x"])
    assert links.bits_per_value == pytest.approx(8 * len(payload) / out["x"].numel())


def test_gradients_cross_in_the_backward_pass():
    model = make("llama")
    block = {"activations": {"codec": "none"}, "gradients": {"codec": "eden2", "min_numel": 0}}
    links, logits = cross(model, block, [0, 2], make_ids())
    assert [channel.sender.traffic.num_messages for channel in links.directions.values()] == [1, 1, 0, 0]
    llm.loss(logits, make_ids(1)).backward()
    assert [channel.sender.traffic.num_messages for channel in links.directions.values()] == [1, 1, 1, 1]


def test_hooks_are_gone_afterwards():
    model = make("llama").eval()
    before = model(make_ids()).logits
    cross(model, {"activations": {"codec": "eden1", "min_numel": 0}}, [0], make_ids())
    assert torch.equal(model(make_ids()).logits, before)


def test_every_row_has_its_uncompressed_one():
    rows = damage.list_rows()
    assert len({(row.text, row.codec, row.num_links) for row in rows}) == len(rows)
    for text in damage.TEXTS:
        assert {row.num_links for row in rows if row.text == text and row.codec == "none"} == set(damage.CUTS)


def test_tah_quant_has_the_bits_that_its_authors_name():
    assert tah_quant().bits == pytest.approx(4.41, abs=0.005)


def test_tah_quant_codes_a_fifth_of_the_tokens_with_three_bits():
    """Tokens of the least entropy. Tiles from 0 to 1, whose largest value is no pivot: each is off by at most
    half a step, and by the rounding of a scale to fp16 (2^-11), which the largest code multiplies."""
    x = torch.rand(1, 10, 2 * TILE, generator=torch.Generator().manual_seed(0))
    x[0, :, 0::TILE], x[0, :, 1::TILE] = 0.0, 1.0
    x[0, 3:5, 2:TILE] = 0.0  # two tokens whose magnitudes are in few channels
    y = tah_quant().encode(x)
    num_levels = [len(row[TILE:].unique()) for row in y[0]]
    assert [number for number, levels in enumerate(num_levels) if levels <= 8] == [3, 4]
    assert max(num_levels) <= 16
    highest = torch.full((10, 1), 15.0)
    highest[3:5] = 7.0
    assert ((x - y)[0].abs() <= 0.5 / highest + 2**-11).all()


def test_tah_quant_spreads_a_pivot():
    """One value and zeros: the Hadamard transform makes of it a constant, which a minimum alone codes."""
    x = torch.zeros(1, 5, TILE)
    x[0, :, 17] = 3.0
    y = tah_quant().encode(x)
    assert (x - y).abs().max() <= 3.0 * 2**-10


def test_runs_are_named_once_and_their_blocks_are_right():
    runs = finetune.list_runs()
    assert len({(run.name, run.weights, run.num_links) for run in runs}) == len(runs)
    for run in runs:
        Links(*[run.block] * run.num_links)


def test_epochs_use_every_sample_equally_often():
    batches = finetune.iterate_epochs(iter(range(100)), 7, seed=1)
    epochs = [list(islice(batches, 7)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_summary_compares_runs_of_the_same_seed():
    common = {"weights": "LoRA", "links": 3, "bits per value": 4.0}
    rows = [
        {"run": name, "seed": seed, "loss": loss, **common}
        for name, seed, loss in [
            ("uncompressed", 1, 2.0),
            ("uncompressed", 2, 3.0),
            ("x", 1, 2.5),
            ("x", 2, 3.7),
        ]
    ]
    _, found = finetune.summarize(rows)
    assert (found["seeds"], found["loss"], found["against uncompressed"]) == (2, "3.1000", "+0.6000")


def test_links_with_larger_errors_get_more_bits():
    shares = damage.share_bits(2, [0.01, 0.04, 0.01, 0.04])
    assert shares == [1.5, 2.5, 1.5, 2.5]
    assert damage.share_bits(3, [0.02] * 7) == [3] * 7


def test_the_small_gpt_has_a_link_behind_every_block_but_the_last(monkeypatch):
    """Three steps of it, over links that change nothing."""
    monkeypatch.setattr(scratch, "Training", partial(Training, steps=3, warmup_steps=2))
    runs = scratch.list_runs()
    assert len({(run.name, run.num_links) for run in runs}) == len(runs)
    (found,) = scratch.measure(runs[0], seed=1)
    assert (found["links"], found["steps"], found["bits per value"]) == (3, 3, 32.0)
    assert 4 < found["loss"] < 6
