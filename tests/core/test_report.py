"""The figures a user is shown."""

import pytest
import torch

from clapping_ds import ClappingConfig, report
from clapping_ds.link.channel import Channel
from clapping_ds.link.traffic import Traffic, add_up
from tests.core.test_channel import SHAPE, QueueWire, value_of


def config_of(**block):
    return ClappingConfig.from_ds_config({"clapping": block})


def test_expectation_says_what_fu_can_save():
    config = config_of(strategy="fu", activations={"delta": "int4"}, gradients={"delta": "sign"})
    lines = report.describe_cost(config.plans, torch.bfloat16).splitlines()
    assert lines[0].split()[-4:] == ["saving", "against", "16", "bit"]
    assert [line.split()[-1] for line in lines[2:]] == ["1.59x", "1.87x"]  # 16 / 10.0625, 16 / 8.5625


@pytest.mark.parametrize(
    ("block", "fresh", "bound"),
    [
        ({"activations": {"codec": "int4"}}, True, 0.25),
        ({"strategy": "fu"}, True, 0.0),
        ({"strategy": "fc", "activations": {"delta": "int4"}}, True, 0.25),
    ],
)
def test_relative_error_is_measured_when_asked(block, fresh, bound):
    """int4 of a Gaussian: max|x| of 128 is below 4 sigma, so the error is below 4 / 15 sigma."""
    channel = Channel(config_of(**block).plan("activations"), 0, "activations", QueueWire())
    channel.send(0, fresh, [value_of(0)])
    assert report.make_row(channel)["relative_error"] is None
    channel.measures_error = True
    channel.send(0, fresh, [value_of(1)])
    error = report.make_row(channel)["relative_error"]
    assert 0 <= error <= bound
    assert (error == 0) == (bound == 0)
    channel.send(0, fresh, [torch.full(SHAPE, float("nan"))])
    assert report.make_row(channel)["relative_error"] == error


def test_events_are_the_figures_by_link_and_direction():
    channel = Channel(config_of(strategy="fc").plan("gradients"), 0, "gradients", QueueWire())
    channel.send(0, True, [value_of(0)])
    rows = [report.make_row(channel), {**report.make_row(channel), "memory_bytes": 0}]  # of two replicas
    events = {name: value for name, value, samples in report.make_events(rows, 32) if samples == 32}
    assert events["Train/Clapping/0-1/gradients/fresh_share"] == 1
    assert events["Train/Clapping/0-1/gradients/memory_bytes"] == 3 * 40 * 64 * 4 / 2
    assert (
        events["Train/Clapping/0-1/gradients/ratio"] == 30720 / 3968
    )  # 3,840 code and 120 scale bytes, padded to 16


def test_recent_is_since_it_was_asked_last():
    channel = Channel(config_of(strategy="fc").plan("gradients"), 0, "gradients", QueueWire())
    recent = report.Recent()
    shares = []
    for fresh in (True, False, False):
        channel.send(0, fresh, [value_of(0)])
        (row,) = recent.list_rows([channel])
        shares.append((row["messages"], row["fresh_share"]))
    assert shares == [(1, 1), (1, 0), (1, 0)]
    assert report.make_row(channel)["messages"] == 3
    assert not recent.list_rows([channel])
    channel.traffic = Traffic(num_messages=2, num_fresh=2)  # as a checkpoint has it
    recent.restart([channel])
    channel.send(0, False, [value_of(0)])
    (row,) = recent.list_rows([channel])
    assert (row["messages"], row["fresh_share"]) == (1, 0)


def test_total_adds_the_counters():
    parts = [Traffic(num_messages=2, payload_bytes=10), Traffic(num_messages=3)]
    whole = add_up(parts)
    assert (whole.num_messages, whole.payload_bytes) == (5, 10)


def test_table_is_aligned():
    table = report.format_table([{"a": 1, "long name": 0.123456}, {"a": None, "long name": "x"}])
    assert table.splitlines() == ["a  long name", "-  ---------", "1  0.1235", "-  x"]


def test_a_start_has_a_column_of_its_own():
    block = {"activations": {"codec": {"name": "transform", "bits": 1}, "start": {"steps": 50}}}
    config = ClappingConfig.from_ds_config({"clapping": block})
    lines = report.describe_cost(config.plans, torch.bfloat16).splitlines()
    assert lines[0].startswith("direction    start              key")
    assert lines[2].startswith("activations  50 steps 4.11 bit  transform bits=1.0 1.13 bit")
    assert lines[3].startswith("gradients    -")


@pytest.mark.parametrize(
    ("lazy", "text"),
    [({}, "1 mini-batch is held; step 0 is all fresh; a sample is used 2 times on average"),
     ({"pool": 16, "p_new": 0.25}, "16 mini-batches are held, each used once in a round; the first 16"),
     ({"pool": 16, "p_new": 0}, "the first 16 steps are all fresh; and no other is drawn later")],
)  # fmt: skip
def test_lazy_sampling_is_said_in_words(lazy, text):
    config = ClappingConfig.from_ds_config({"clapping": {"strategy": "fu", "lazy": lazy}})
    assert text in report.describe_sampling(config.sampling)
