"""The transform codec: its statistics, its bases, and two ends that agree whatever adds their sums."""

import pytest
import torch

from clapping_ds.codecs import Context, Transform, bits_per_value, eigenbasis
from clapping_ds.codecs.reference import transform_reference
from clapping_ds.codecs.reference.transform_reference import ERRORS
from clapping_ds.link.verification import VerificationError
from tests.core.test_channel import Ends, same_state

WIDTH = 64
REFRESH = 4


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(num_rows, seed=0, width=WIDTH):
    """Rows of low rank and some noise, in channels of very different sizes."""
    mixture = normal(8, width, seed=99) * torch.logspace(0, 2, width)
    return normal(num_rows, 8, seed=seed) @ mixture + 0.05 * normal(num_rows, width, seed=seed + 1000)


class Pair:
    """The two ends of a channel, reduced to the codec."""

    def __init__(self, codec, like, holds_memory=False, carry=False):
        self.codec = codec
        self.carry = carry
        self.states = [codec.new_state(like.shape[-1], like.device) for _ in range(2)]
        self.memories = [torch.zeros_like(like) if holds_memory else None for _ in range(2)]
        self.num_messages = 0

    def send(self, value):
        payload = torch.full((self.codec.nbytes(value.shape, value.dtype),), 0xA5, dtype=torch.uint8)
        out = torch.full_like(value, 7)
        contexts = [
            Context(memory, self.carry, self.num_messages, state)
            for memory, state in zip(self.memories, self.states, strict=True)
        ]
        self.codec.encode_(value, payload, contexts[0])
        self.codec.decode_(payload, out, contexts[1])
        self.num_messages += 1
        return out


def relative_error(out, value):
    return float((out - value).square().sum() / value.square().sum())


# Sizes and errors


@pytest.mark.parametrize(
    ("bits", "expected"), [(0.0625, 0.197), (1, 1.127), (2, 2.119), (3, 3.112), (8, 8.073)]
)
def test_bits_per_value(bits, expected):
    """bits * 127/128 of codes, 16/128 of outliers, and side information of 3 channels' worth of values."""
    assert bits_per_value(Transform(bits=bits), torch.bfloat16) == pytest.approx(expected, abs=0.01)


def test_a_basis_costs_its_bytes_over_the_messages_of_a_period():
    channel, eigen = Transform(bits=2), Transform(bits=2, basis="eigen", refresh=256)
    more = bits_per_value(eigen, torch.bfloat16) - bits_per_value(channel, torch.bfloat16)
    assert more == pytest.approx(8 / 256, rel=0.01)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_error_of_noise_is_that_of_the_lloyd_max_code(bits):
    """Or a little less: of 128 rows the largest is sent raw, and a row of 64 values divided by its own gain
    has thinner tails than noise, which is most of the error from 6 bits on."""
    value = normal(8192, WIDTH)
    error = relative_error(Pair(Transform(bits=bits), value).send(value), value)
    assert 0.8 * ERRORS[bits] < error < ERRORS[bits]


def test_bits_go_where_the_variance_is():
    """Half of the channels a hundred times larger: with 2 bits a value they get 4 and the others none."""
    value = normal(4096, WIDTH) * torch.tensor([100.0, 1.0]).repeat(WIDTH // 2)
    error = relative_error(Pair(Transform(bits=2), value).send(value), value)
    assert error < 1.1 * ERRORS[4]


def test_an_eigenbasis_does_what_channels_cannot():
    channel, eigen = (
        Pair(Transform(bits=1, basis=basis, refresh=REFRESH), correlated(512))
        for basis in ("channel", "eigen")
    )
    errors = [
        [relative_error(pair.send(value), value) for value in (correlated(512, seed) for seed in range(12))]
        for pair in (channel, eigen)
    ]
    first, later = slice(0, 2 * REFRESH), slice(2 * REFRESH, None)
    assert errors[0][first] == errors[1][first], "until the first basis is there the channels are coded"
    assert sum(errors[1][later]) < 0.2 * sum(errors[0][later])


@pytest.mark.parametrize("bits", [2.03, 0, 9, "2"])
def test_bits_that_are_refused(bits):
    with pytest.raises(ValueError, match="bits"):
        Transform(bits=bits)


# Both ends agree


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memories_are_equal_when_one_end_adds_in_another_order(carry, dtype, monkeypatch):
    """The receiver's matrix product is cut at random, and its parts are added in a random order."""
    codec = Transform(bits=2, basis="eigen", refresh=2)
    pair = Pair(codec, correlated(160).to(dtype), holds_memory=True, carry=carry)
    exact, generator = transform_reference.multiply, torch.Generator().manual_seed(5)

    def in_another_order(integer_MC, basis_CC):
        order = torch.randperm(basis_CC.shape[0], generator=generator)
        parts = [integer_MC[:, part].double() @ basis_CC[part].double() for part in order.split(7)]
        return torch.stack(parts).sum(0).float()

    decode = Transform.decode_

    def decode_in_another_order(self, payload, out, context):
        monkeypatch.setattr(transform_reference, "multiply", in_another_order)
        decode(self, payload, out, context)
        monkeypatch.setattr(transform_reference, "multiply", exact)

    monkeypatch.setattr(Transform, "decode_", decode_in_another_order)
    for seed in range(12):
        out = pair.send(correlated(160, seed).to(dtype))
        assert torch.equal(*pair.memories)
        assert torch.equal(out, pair.memories[0])
        assert same_state(*pair.states)


def test_deltas_of_a_constant_value_converge():
    value = correlated(256)
    pair = Pair(Transform(bits=2, basis="eigen", refresh=2), value, holds_memory=True, carry=True)
    errors = [relative_error(pair.send(value), value) for _ in range(10)]
    assert errors[-1] < 1e-6 * errors[0]


# What is hard


HARD = {
    "zeros": torch.zeros(200, WIDTH),
    "constant": torch.full((200, WIDTH), 3.0),
    "rank one": normal(200, 1) @ normal(1, WIDTH),
    "one row": normal(1, WIDTH),
    "few rows": normal(5, WIDTH),
    "one channel": normal(300, 1),
    "odd width": normal(300, 70),
    "small": normal(200, WIDTH) * 1e-32,
    "large": normal(200, WIDTH) * 1e32,
    "massive tokens": torch.cat([normal(3, WIDTH) * 1e4, normal(509, WIDTH)]),
    "many massive tokens": torch.cat([normal(40, WIDTH) * 1e4, normal(472, WIDTH)]),
    "massive channel": normal(512, WIDTH) * torch.cat([torch.full((1,), 1e4), torch.ones(WIDTH - 1)]),
}


LARGEST_ERRORS = {"one channel": 0.25}
"""Relative, with 4 bits. A block of which 15 coordinates are padding has a 16th of the variance that its code
is for."""


@pytest.mark.parametrize("basis", ["channel", "eigen"])
@pytest.mark.parametrize("kind", HARD)
def test_what_is_hard_arrives_finite_with_a_bounded_error(kind, basis):
    value = HARD[kind]
    pair = Pair(Transform(bits=4, basis=basis, refresh=2), value, holds_memory=True)
    for _ in range(6):
        out = pair.send(value)
        assert out.isfinite().all()
        assert torch.equal(*pair.memories)
        error, size = ((x.double() * 1e-30).square().sum() for x in (out - value, value))
        assert error <= LARGEST_ERRORS.get(kind, 0.02) * size


@pytest.mark.parametrize("size", [100, 1000])
def test_a_massive_channel_leaves_the_others_alone_with_a_memory_too(size):
    """Its mean sets the unit of the integers that both ends multiply."""
    direct, remembering = (
        Pair(Transform(bits=6, basis="eigen", refresh=2), correlated(512), holds_memory=holds_memory)
        for holds_memory in (False, True)
    )
    for seed in range(8):
        value = correlated(512, seed) / 100
        value[:, 7] = size + size / 30 * normal(512, seed=seed)
        errors = []
        for pair in (direct, remembering):
            out = pair.send(value)
            out[:, 7] = value[:, 7]
            errors.append(relative_error(out, value))
    assert errors[1] < 1.1 * errors[0]


def test_a_massive_token_does_not_silence_its_message():
    """Seven messages of eight have one, and are of other directions than the eighth."""
    turn = torch.linalg.qr(normal(WIDTH, WIDTH, seed=3)).Q

    def send_all(massive):
        pair = Pair(Transform(bits=2, basis="eigen", refresh=8), correlated(512))
        for seed in range(24):
            value = correlated(512, seed) @ turn if seed % 8 == 7 else correlated(512, seed)
            if seed % 8 != 7:
                value[0] *= massive
            pair.send(value)
        value = correlated(512, 99)
        return relative_error(pair.send(value)[1:], value[1:])

    assert send_all(300.0) < 1.2 * send_all(1.0)


def test_a_long_period_learns_from_enough_rows():
    pair = Pair(Transform(bits=1, basis="eigen", refresh=2 * 16 * WIDTH), correlated(512))
    for seed in range(3):
        pair.send(correlated(512, seed))
    assert torch.linalg.matrix_rank(pair.states[0].own["covariance_CC"], rtol=1e-2) >= 8


def test_what_is_too_wide_for_a_basis_is_coded_by_channels():
    wide = Transform(bits=2, basis="eigen")
    assert wide.new_state(1 << 20, torch.device("cpu")) is None
    assert wide.nbytes((4, 1 << 20), torch.float32) == Transform(bits=2).nbytes((4, 1 << 20), torch.float32)


def test_a_decomposition_that_fails_leaves_the_channels(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("not converged")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    channel, eigen = (
        Pair(Transform(bits=2, basis=basis, refresh=2), correlated(512)) for basis in ("channel", "eigen")
    )
    for seed in range(6):
        without, with_failure = (
            relative_error(p.send(correlated(512, seed)), correlated(512, seed)) for p in (channel, eigen)
        )
    assert with_failure == pytest.approx(without, rel=0.05)


def test_another_default_dtype_changes_nothing():
    value = correlated(256)
    expected = Pair(Transform(bits=2), value).send(value)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(Pair(Transform(bits=2), value).send(value), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("basis", ["channel", "eigen"])
def test_what_is_too_small_arrives_as_zeros_and_what_is_too_large_saturates(basis):
    pair = Pair(Transform(bits=3, basis=basis, refresh=2), normal(200, WIDTH), holds_memory=True)
    for _ in range(5):
        assert not pair.send(normal(200, WIDTH) * 1e-41).any()
        out = pair.send(normal(200, WIDTH).sign() * torch.finfo(torch.float32).max)
        assert out.isfinite().all()
        assert out.abs().amax() < 2.0**116
        assert torch.equal(*pair.memories)


def test_massive_tokens_leave_the_others_alone():
    calm = normal(509, WIDTH)
    value = torch.cat([normal(3, WIDTH) * 1e4, calm])
    out = Pair(Transform(bits=3), value).send(value)
    assert relative_error(out[3:], calm) < 1.2 * ERRORS[3]
    assert relative_error(out[:3], value[:3]) < 2.0**-16  # bfloat16


@pytest.mark.parametrize("num_broken", [1, 7])
@pytest.mark.parametrize("basis", ["channel", "eigen"])
def test_rows_that_are_not_finite_arrive_so_and_stay_out_of_memories_and_bases(num_broken, basis):
    """More of them than outliers have room."""
    pair = Pair(Transform(bits=3, basis=basis, refresh=2), correlated(300), holds_memory=True)
    broken = torch.arange(num_broken) * 40
    for seed in range(8):
        before = pair.memories[0].clone()
        value = correlated(300, seed)
        value[broken, 5] = torch.tensor([torch.inf, -torch.inf, torch.nan])[seed % 3]
        out = pair.send(value)
        is_broken = torch.zeros(300, dtype=torch.bool).index_fill_(0, broken, True)
        assert out[is_broken].isnan().all()
        assert relative_error(out[~is_broken], value[~is_broken]) < 0.1
        assert torch.equal(pair.memories[0][is_broken], before[is_broken])
        assert torch.equal(*pair.memories)


def test_a_basis_that_has_become_stale_does_no_harm():
    """The spectrum jumps to other directions at twice the size: no worse than without a basis, by much."""
    turn = torch.linalg.qr(normal(WIDTH, WIDTH, seed=3)).Q
    channel, eigen = (
        Pair(Transform(bits=2, basis=basis, refresh=3), correlated(512)) for basis in ("channel", "eigen")
    )
    for seed in range(7):
        for pair in (channel, eigen):
            pair.send(correlated(512, seed))
    jumped = 2 * correlated(512, 7) @ turn
    stale, without = (relative_error(pair.send(jumped), jumped) for pair in (eigen, channel))
    assert stale < 1.5 * without


# Bases


def test_a_basis_arrives_in_slices_and_is_used_from_an_agreed_message_on():
    pair = Pair(Transform(bits=2, basis="eigen", refresh=REFRESH), correlated(256))
    for number in range(4 * REFRESH):
        pair.send(correlated(256, number))
        used = pair.states[1].shared["used"]
        assert used.any() == (number >= 2 * REFRESH)
        assert torch.equal(used, pair.states[0].shared["used"])
        if number == 2 * REFRESH:
            first = used.clone()
    assert not torch.equal(first, used), "a new basis each period"


def eigen_ends(**options):
    codec = {"name": "transform", "bits": 2, "basis": "eigen", "refresh": 2}
    return Ends(activations={"codec": codec}, **options)


def test_a_basis_outlives_a_new_batch_shape_but_not_a_new_width():
    ends = eigen_ends()
    for seed in range(5):
        ends.pass_on(0, True, correlated(256, seed).view(2, 128, WIDTH))
    state = ends.sender.learned[0, "key"].state
    ends.pass_on(1, True, correlated(90, 6))
    assert ends.sender.learned[0, "key"].state is state
    assert state.num_messages == 6
    ends.pass_on(0, True, normal(90, 48))
    assert ends.sender.learned[0, "key"].state.num_messages == 1


@pytest.mark.parametrize("num_before", [1, 2, 3, 4, 5])
def test_a_resumed_run_is_the_uninterrupted_one(num_before):
    """Also while a basis is being computed, or on its way."""
    codec = {"name": "transform", "bits": 2, "basis": "eigen", "refresh": 4}
    ends, others = (Ends(activations={"codec": codec}) for _ in range(2))
    for seed in range(2 * num_before):
        ends.pass_on(0, True, correlated(256, seed))
    for mine, other in ((ends.sender, others.sender), (ends.receiver, others.receiver)):
        other.load_state_dict(mine.state_dict())
    for seed in range(10, 16):
        value = correlated(256, seed)
        assert torch.equal(ends.pass_on(0, True, value), others.pass_on(0, True, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "codec", [{"name": "transform", "bits": 2, "basis": "eigen", "refresh": 2}, ["int8", "int4"]]
)
def test_measuring_errors_changes_no_message(codec, dtype):
    ends, measured = (Ends(activations={"codec": codec}) for _ in range(2))
    for step in range(6):
        for end in (measured.sender, measured.receiver):
            end.begin_step(step, 1, measures_error=True)
        for end in (ends.sender, ends.receiver):
            end.begin_step(step, 1)
        value = correlated(256, step).to(dtype)
        received = measured.pass_on(0, True, value)
        assert torch.equal(ends.pass_on(0, True, value), received)
    traffic = measured.sender.traffic
    traffic.settle()
    assert traffic.error_square > 0


def test_a_basis_that_differs_is_found_by_verify():
    ends = eigen_ends(verify=True)
    for step in range(5):
        ends.pass_on(0, True, correlated(256, step))
    ends.receiver.learned[0, "key"].state.shared["used"][3] += 1
    with pytest.raises(VerificationError, match="memory"):
        ends.pass_on(0, True, correlated(256, 5))


def test_a_basis_of_the_coordinates_themselves_is_the_channel_form():
    """What time is measured with."""
    channel, eigen = (
        Pair(Transform(bits=3, basis=basis, refresh=4), correlated(512)) for basis in ("channel", "eigen")
    )
    for state in eigen.states:
        eigenbasis.put_identity_(state, 4)
    value = correlated(512)
    errors = [relative_error(pair.send(value), value) for pair in (channel, eigen)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
