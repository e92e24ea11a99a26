"""`verify`: any difference between the two ends of a channel is an error that names it."""

from dataclasses import replace

import pytest
import torch

from clapping_ds.link.message import Spec
from clapping_ds.link.verification import VerificationError, checksum
from tests.core.test_channel import SHAPE, Ends, value_of


def verified_ends(**block):
    direction = {"delta": "int4", "min_numel": 16}
    ends = Ends(**{"strategy": "fc", "verify": True, "activations": direction} | block)
    ends.begin_step(3, 4)
    return ends


def test_verified_messages_arrive_as_others_do():
    plain, verified = Ends(strategy="fc", activations={"delta": "int4", "min_numel": 16}), verified_ends()
    plain.begin_step(3, 4)
    for fresh in (True, False):
        value, small = value_of(int(fresh)), torch.arange(3)
        for one, other in zip(
            plain.pass_on(1, fresh, value, small), verified.pass_on(1, fresh, value, small), strict=True
        ):
            assert torch.equal(one, other)
    sent, verified_sent = (ends.sender.traffic.payload_bytes for ends in (plain, verified))
    assert verified_sent == sent + 2 * 48


def test_a_verified_message_may_have_no_bytes():
    ends = verified_ends()
    assert ends.pass_on(0, True, torch.empty(0, 4)).shape == (0, 4)
    assert ends.sender.traffic.payload_bytes == 48


def mismatch(ends, spoil, slot=1):
    """The error after `spoil` did something between the two ends of a second message."""
    ends.pass_on(slot, True, value_of(0))
    ends.sender.send(slot, False, [value_of(1)])
    spoil(ends)
    with pytest.raises(VerificationError) as error:
        ends.receiver.receive()
    return str(error.value)


def announce(ends, slot=1, fresh=False):
    ends.receiver.expect(slot, fresh, [Spec(torch.Size(SHAPE), torch.float32)])


def flip_a_bit(ends):
    announce(ends)
    ends.sender.wire.payloads[0][100] ^= 4


def change_a_memory(ends):
    announce(ends)
    ends.receiver.held[1][0].memory[0, 0, 0] += 1


def be_a_step_ahead(ends):
    ends.receiver.begin_step(4, 4)
    announce(ends)


def be_at_another_slot(ends):
    ends.receiver.held[2] = ends.receiver.held[1]
    announce(ends, slot=2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(flip_a_bit, "link 0-1, activations, step 3, slot 1: payload: expected "),
     (change_a_memory, "link 0-1, activations, step 3, slot 1: memory: expected "),
     (be_a_step_ahead, "link 0-1, activations, step 4, slot 1: step: expected 4, found 3"),
     (be_at_another_slot, "link 0-1, activations, step 3, slot 2: slot: expected 2, found 1")],
)  # fmt: skip
def test_any_difference_between_the_ends_is_an_error(spoil, message):
    assert message in mismatch(verified_ends(), spoil)


def test_another_codec_is_an_error():
    ends = verified_ends()
    plan = ends.receiver.plan
    ends.receiver.plan = replace(plan, key=plan.key.model_copy(update={"rotate": True}))
    ends.sender.send(0, True, [value_of(0)])
    announce(ends, slot=0, fresh=True)
    with pytest.raises(VerificationError, match="slot 0: codecs: expected"):
        ends.receiver.receive()


@pytest.mark.parametrize("shape", [(1,), (3,), (16, 4), (5, 7)])
def test_a_checksum_notices_every_byte(shape):
    tensor = value_of(0, shape)
    before = checksum(tensor)
    for position in range(tensor.numel() * 4):
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[position] ^= 1
        assert checksum(changed) != before
