"""One stage's ends of channels: which there are, how messages get their slots, what a plan changes."""

from collections import deque

import pytest
import torch

from clapping_ds import ClappingConfig
from clapping_ds.codecs import Eden, Quantizer
from clapping_ds.link.groups import Peer
from clapping_ds.link.message import Spec
from clapping_ds.stage import endpoint
from clapping_ds.stage.endpoint import (
    ACTIVATIONS_FROM_PREVIOUS,
    ACTIVATIONS_TO_NEXT,
    ENDS,
    GRADIENTS_FROM_NEXT,
    GRADIENTS_TO_PREVIOUS,
    Endpoint,
)
from tests.core.test_channel import QueueWire, value_of

PEERS = {(1, 0): Peer(0, "there", "back"), (1, 2): Peer(2, "there", "back"), (0, 1): Peer(1, "there", "back")}
FC = {"strategy": "fc", "activations": {"delta": "int4"}, "gradients": {"delta": "int4"}}


class LoopWire(QueueWire):
    """What one end of a direction sends, the other receives: `of` holds the queues, by direction."""

    of: dict[str, tuple[deque, deque]]

    def __init__(self, peer, device, group, most_pending):
        super().__init__()
        self.peer, self.group, self.most_pending = peer, group, most_pending
        self.carrier = device
        self.payloads, self.expected = self.of.setdefault(group, (deque(), deque()))


@pytest.fixture(autouse=True)
def loop(monkeypatch):
    LoopWire.of = {}
    monkeypatch.setattr(endpoint, "Wire", LoopWire)


def stage_of(stage_id, peers=None, **block):
    config = ClappingConfig.from_ds_config({"clapping": block})
    return Endpoint(config, stage_id, PEERS if peers is None else peers, torch.device("cpu"))


def begin(*stages, fresh=(True, True), step=0):
    for stage in stages:
        stage.begin_step(step, fresh, replays=False, measures_error=False)


def test_ends_are_named_and_know_their_link():
    assert [str(end) for end in ENDS] == [
        "activations to next", "activations from previous", "gradients to previous", "gradients from next",
    ]  # fmt: skip
    assert [end.link(3) for end in ENDS] == [3, 2, 2, 3]


def test_a_stage_has_the_ends_of_its_neighbours():
    assert list(stage_of(1).channels) == list(ENDS)
    assert list(stage_of(0).channels) == [ACTIVATIONS_TO_NEXT, GRADIENTS_FROM_NEXT]
    assert list(stage_of(2, {(2, 1): PEERS[0, 1]}).channels) == [
        ACTIVATIONS_FROM_PREVIOUS,
        GRADIENTS_TO_PREVIOUS,
    ]
    assert stage_of(5).channels == {}
    assert {wire.most_pending for wire in stage_of(1, in_flight=3).wires.values()} == {4}


def test_messages_are_counted_unless_their_slot_is_named():
    sender, receiver = stage_of(0), stage_of(1)
    begin(sender, receiver)
    values = [value_of(0), value_of(1)]
    for value in values:
        sender.send(ACTIVATIONS_TO_NEXT, [value])
    specs = [Spec.of(values[0])]
    counted = [receiver.receive(ACTIVATIONS_FROM_PREVIOUS, specs)[0] for _ in values]
    begin(sender, receiver)
    for slot in (1, 0):
        sender.send(ACTIVATIONS_TO_NEXT, [values[slot]], slot)
    receiver.order[ACTIVATIONS_FROM_PREVIOUS] = (1, 0)
    named = [receiver.receive(ACTIVATIONS_FROM_PREVIOUS, specs)[0] for _ in values]
    assert torch.equal(named[0], counted[1])
    assert torch.equal(named[1], counted[0])


def test_another_plan_starts_without_memory_and_goes_on_counting():
    stage = stage_of(0, **FC)
    begin(stage)
    stage.send(ACTIVATIONS_TO_NEXT, [value_of(0)])
    channel = stage.channels[ACTIVATIONS_TO_NEXT]
    stage.set_plan(ACTIVATIONS_TO_NEXT, channel.plan)
    assert stage.channels[ACTIVATIONS_TO_NEXT] is channel
    stage.set_plan(ACTIVATIONS_TO_NEXT, channel.plan.with_codec(Eden(name="eden4")))
    changed = stage.channels[ACTIVATIONS_TO_NEXT]
    assert (channel.memory_nbytes, changed.memory_nbytes) == (3 * 40 * 64 * 4, 0)
    assert changed.traffic.num_messages == 1


def test_a_state_is_taken_with_the_plans_that_the_configuration_allows():
    chosen = stage_of(0, **FC, links="auto")
    for end, channel in chosen.channels.items():
        chosen.set_plan(end, channel.plan.with_codec(Quantizer(name="int8")))
    state = chosen.state_dict()
    plans = stage_of(0, **FC, links="auto").match_plans(state)
    assert {plan.delta.name for plan in plans.values()} == {"int8"}
    assert stage_of(0, **FC).match_plans(state) is None
    assert stage_of(0, **FC, links={"ladder": ["eden3"]}).match_plans(state) is None
    assert stage_of(1, **FC, links="auto").match_plans(state) is None, "other ends"
