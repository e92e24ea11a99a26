"""Sequences of codecs: each codes what those before it left."""

import pytest
import torch

from clapping_ds import ClappingConfig
from clapping_ds.codecs import CodecSequence, Context, Eden, LowRank, Quantizer, RandK, TopK, Transform
from clapping_ds.codecs.sequence import label
from clapping_ds.config import DIRECTIONS
from clapping_ds.link.verification import VerificationError
from tests.core.test_channel import Ends, value_of
from tests.core.test_transform import Pair, correlated, relative_error

PAIRS = [
    (LowRank(rank=4), Eden(name="eden1")),
    (LowRank(rank=2), Transform(bits=0.5)),
    (Transform(bits=2), Transform(bits=1, basis="eigen", refresh=2)),
    (TopK(ratio=0.05, block=64), Quantizer(name="int2")),
    (RandK(ratio=0.1, block=64), Eden(name="eden3")),
    (Eden(name="eden2"), Eden(name="eden2"), Eden(name="eden2")),
]


@pytest.mark.parametrize("holds_memory", [False, True])
@pytest.mark.parametrize("codecs", PAIRS, ids=lambda codecs: " + ".join(map(label, codecs)))
def test_what_is_left_shrinks_and_both_ends_agree(codecs, holds_memory):
    value = correlated(200)
    sequence = CodecSequence(codecs=codecs)
    pairs = [Pair(codec, value, holds_memory) for codec in (sequence, codecs[0])]
    for seed in range(6):
        value = correlated(200, seed)
        whole, first = (relative_error(pair.send(value), value) for pair in pairs)
        assert whole < 0.8 * first
    if holds_memory:
        assert torch.equal(*pairs[0].memories)
    assert all(map(torch.equal, *(state.list_shared() for state in pairs[0].states)))


def test_the_payload_is_the_sum_and_the_arithmetic_that_of_two_messages():
    """The second codec's message is a delta to what the first one left in the memory."""
    first, second, value = Eden(name="eden2"), Quantizer(name="int2"), correlated(100)
    sequence = CodecSequence(codecs=(first, second))
    assert sequence.nbytes(value.shape, value.dtype) == sum(
        codec.nbytes(value.shape, value.dtype) for codec in (first, second)
    )
    expected, memory = torch.zeros_like(value), torch.zeros_like(value)
    for codec, carry in ((first, False), (second, True)):
        payload = torch.empty(codec.nbytes(value.shape, value.dtype), dtype=torch.uint8)
        codec.encode_(value, payload, Context(expected, carry, seed=5))
    payload = torch.empty(sequence.nbytes(value.shape, value.dtype), dtype=torch.uint8)
    # int2 draws nothing at random, so that its seed does not matter here.
    sequence.encode_(value, payload, Context(memory, False, 5, sequence.new_state(64, value.device)))
    assert torch.equal(memory, expected)


def test_each_codec_draws_its_own_signs():
    """With the same signs the second would see the first one's pattern of errors: a half more error."""
    value = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    sequence = CodecSequence(codecs=(Eden(name="eden1"), Eden(name="eden1")))
    error = relative_error(Pair(sequence, value).send(value), value)
    assert error == pytest.approx(0.3634**2, rel=0.1)


@pytest.mark.parametrize("strategy", ["direct", "fc", "key_delta"])
def test_a_list_is_accepted_wherever_a_codec_is(strategy):
    codecs = ["lowrank", {"name": "transform", "bits": 0.5}]
    members = {"direct": ["codec"], "fc": ["delta"], "key_delta": ["key", "delta"]}[strategy]
    ends = Ends(strategy=strategy, **dict.fromkeys(DIRECTIONS, dict.fromkeys(members, codecs)), verify=True)
    for step in range(4):
        ends.begin_step(step, 2)
        for slot in range(2):
            ends.pass_on(slot, step % 2 == 0 or strategy == "direct", value_of(step + slot))
    plan = ends.config.plan("activations")
    assert label(plan.delta) == "lowrank + transform bits=0.5"
    again = ClappingConfig.from_ds_config({"clapping": ends.config.model_dump()})
    assert again == ends.config


def test_a_broken_byte_is_found():
    codecs = ["lowrank", "eden2"]
    ends = Ends(activations={"codec": codecs}, verify=True)
    send = ends.sender.wire.send
    ends.sender.wire.send = lambda payload: send(
        payload.index_add_(0, torch.tensor([99]), torch.ones(1).byte())
    )
    with pytest.raises(VerificationError, match="payload"):
        ends.pass_on(0, True, value_of(0))


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_what_is_not_finite_arrives_so(poison):
    ends = Ends(strategy="fc", activations={"delta": ["lowrank", "eden2"]})
    value = value_of(0)
    for fresh in (True, False):
        ends.pass_on(0, fresh, value)
        broken = value.clone()
        broken[1, 2, 3] = poison
        received = ends.pass_on(0, fresh, broken)
        assert not received[1, 2, 3].isfinite()
        assert received[0].isfinite().all()
        assert ends.sender.held[0][0].memory.isfinite().all()


def test_what_members_learned_is_in_checkpoints():
    codec = ["lowrank", {"name": "transform", "bits": 1, "basis": "eigen", "refresh": 2}]
    ends, others = (Ends(activations={"codec": codec}) for _ in range(2))
    for seed in range(5):
        ends.pass_on(0, True, correlated(256, seed))
    for mine, other in ((ends.sender, others.sender), (ends.receiver, others.receiver)):
        other.load_state_dict(mine.state_dict())
        assert mine.memory_nbytes == other.memory_nbytes > 0
    for seed in range(5, 9):
        value = correlated(256, seed)
        assert torch.equal(ends.pass_on(0, True, value), others.pass_on(0, True, value))


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (["int4"], r"codec = \['int4'\]: accepted: 2 to 4 codecs in a list"),
        (["int4"] * 5, "accepted: 2 to 4 codecs"),
        (["none", "int4"], r"codec\.0 = \{'name': 'none'\}: unknown codec; accepted: int8, int4"),
        (["int4", ["int4", "int2"]], r"codec\.1 = .*no codec name"),
        (["lowrank", {"name": "transform", "bits": 2.3}], r"codec\.1\.bits = 2\.3: accepted: a multiple"),
        ([{"name": "eden4", "bits": 2}, "int4"], r"codec\.0\.bits = 2: unknown key; accepted: group_size"),
    ],
)
def test_what_is_refused(codec, message):
    with pytest.raises(ValueError, match=message):
        ClappingConfig.from_ds_config({"clapping": {"activations": {"codec": codec}}})
