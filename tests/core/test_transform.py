"""The transform codec: its statistics, its bases, and two ends that agree whatever adds their sums."""

import pytest
import torch

from clapping_ds.codecs import Context, Transform, bits_per_value
from clapping_ds.codecs.anchors import Anchors, find_anchors, prepare_search
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


def gathered(num_rows, seed=0, width=WIDTH):
    """Rows around 16 points, in channels of very different sizes."""
    size = torch.logspace(0, 2, width)
    point = torch.randint(16, (num_rows,), generator=torch.Generator().manual_seed(seed))
    return (3 * normal(16, width, seed=99)[point] + normal(num_rows, width, seed=seed + 1000)) * size


LEARNED = {
    "nothing": {},
    "basis": {"basis": "eigen"},
    "anchors": {"anchors": 16},
    "both": {"basis": "eigen", "anchors": 16},
}
"""By what is learned from earlier messages."""
EVERY_LEARNED = pytest.mark.parametrize("learned", LEARNED.values(), ids=LEARNED)
SOMETHING_LEARNED = pytest.mark.parametrize("learned", list(LEARNED.values())[1:], ids=list(LEARNED)[1:])


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


@pytest.mark.parametrize(("rows_per_outlier", "num_outliers"), [(16, 64), (128, 8), (1000, 2), (1 << 16, 1)])
def test_so_many_rows_travel_apart(rows_per_outlier, num_outliers):
    """Rounded to bfloat16, and no others, however large."""
    value = normal(1024, WIDTH)
    value[:64] *= 2.0 ** torch.arange(80, 16, -1)[:, None]
    ends = Pair(Transform(bits=4, rows_per_outlier=rows_per_outlier), value)
    out = ends.send(value)
    assert (out == value.bfloat16().float()).all(1).nonzero().flatten().tolist() == list(range(num_outliers))
    of_rows = num_outliers * (4 + 2 * WIDTH) + (1024 - num_outliers) * (4 + WIDTH // 2)
    of_channels = 4 * WIDTH
    assert ends.codec.nbytes(value.shape, value.dtype) == pytest.approx(of_rows + of_channels, abs=48)


@pytest.mark.parametrize(
    ("learned", "expected"),
    [
        ({"basis": "eigen"}, 8 / 256),
        ({"anchors": 1024}, 8 * 1024 / 4096 / 256 + 16 / 4096),
        ({"basis": "eigen", "anchors": 1024}, 8 * 5120 / 4096 / 256 + 16 / 4096),
    ],
)
def test_what_is_learned_costs_its_bytes_over_the_messages_of_a_period(learned, expected):
    """An int8 for each value of a basis [4096, 4096] and of anchors [1024, 4096]; and two bytes a row say
    which anchor is its own."""
    plain, learning = Transform(bits=2), Transform(bits=2, refresh=256, **learned)
    more = bits_per_value(learning, torch.bfloat16) - bits_per_value(plain, torch.bfloat16)
    assert more == pytest.approx(expected, rel=0.01)


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


@pytest.mark.parametrize("basis", ["channel", "eigen"])
def test_anchors_do_what_one_cloud_cannot(basis):
    """Nine tenths of the variance are between the points."""
    without, with_anchors = (
        Pair(Transform(bits=1, basis=basis, anchors=anchors, refresh=REFRESH), gathered(512))
        for anchors in (0, 64)
    )
    errors = [
        [relative_error(pair.send(value), value) for value in (gathered(512, seed) for seed in range(12))]
        for pair in (without, with_anchors)
    ]
    first, later = slice(0, 2 * REFRESH), slice(2 * REFRESH, None)
    assert errors[0][first] == errors[1][first], "until the first anchors are there"
    assert sum(errors[1][later]) < 0.25 * sum(errors[0][later])


def test_a_row_far_from_the_others_costs_them_nothing():
    """What an anchor leaves of rows differs in size; each has its scale."""
    pair = Pair(Transform(bits=3, anchors=16, refresh=2), gathered(512))
    for seed in range(4):
        pair.send(gathered(512, seed))
    value = gathered(512, 4)
    value[100] = 5 * gathered(1, 5)[0].flip(0)
    out, is_other = pair.send(value), torch.arange(512) != 100
    assert relative_error(out[100], value[100]) < 2 * ERRORS[3]
    assert relative_error(out[is_other], value[is_other]) < ERRORS[3] / 4


@pytest.mark.parametrize("bits", [2.03, 0, 9, "2"])
def test_bits_that_are_refused(bits):
    with pytest.raises(ValueError, match="bits"):
        Transform(bits=bits)


# Both ends agree


@pytest.mark.parametrize("anchors", [0, 16])
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memories_are_equal_when_one_end_adds_in_another_order(anchors, carry, dtype, monkeypatch):
    """The receiver's matrix product is cut at random, and its parts are added in a random order."""
    codec = Transform(bits=2, basis="eigen", refresh=2, anchors=anchors)
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


@EVERY_LEARNED
def test_deltas_of_a_constant_value_converge(learned):
    value = correlated(256)
    pair = Pair(Transform(bits=2, refresh=2, **learned), value, holds_memory=True, carry=True)
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


@EVERY_LEARNED
@pytest.mark.parametrize("kind", HARD)
def test_what_is_hard_arrives_finite_with_a_bounded_error(kind, learned):
    value = HARD[kind]
    pair = Pair(Transform(bits=4, refresh=2, **learned), value, holds_memory=True)
    for _ in range(6):
        out = pair.send(value)
        assert out.isfinite().all()
        assert torch.equal(*pair.memories)
        error, size = ((x.double() * 1e-30).square().sum() for x in (out - value, value))
        assert error <= LARGEST_ERRORS.get(kind, 0.02) * size


@pytest.mark.parametrize("anchors", [0, 16])
@pytest.mark.parametrize("size", [100, 1000])
def test_a_massive_channel_leaves_the_others_alone_with_a_memory_too(size, anchors):
    """Its mean sets the unit of the integers that both ends multiply."""
    codec = Transform(bits=6, basis="eigen", anchors=anchors, refresh=2)
    direct, remembering = (
        Pair(codec, correlated(512), holds_memory=holds_memory) for holds_memory in (False, True)
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
    rows_RC = pair.states[0].host["rows_RC"].float()
    assert torch.linalg.matrix_rank(rows_RC, rtol=1e-2) == 3, "one of each message"


def test_of_what_is_too_wide_nothing_is_learned():
    wide = Transform(bits=2, basis="eigen", anchors=16)
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


@EVERY_LEARNED
def test_what_is_too_small_arrives_as_zeros_and_what_is_too_large_saturates(learned):
    pair = Pair(Transform(bits=3, refresh=2, **learned), normal(200, WIDTH), holds_memory=True)
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
@EVERY_LEARNED
def test_rows_that_are_not_finite_arrive_so_and_stay_out_of_all_that_is_kept(num_broken, learned):
    """More of them than outliers have room."""
    pair = Pair(Transform(bits=3, refresh=2, **learned), correlated(300), holds_memory=True)
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


@SOMETHING_LEARNED
def test_what_has_become_stale_does_no_harm(learned):
    """The spectrum jumps to other directions at twice the size: no worse than if nothing were learned, by
    much."""
    turn = torch.linalg.qr(normal(WIDTH, WIDTH, seed=3)).Q
    plain, learning = (
        Pair(Transform(bits=2, refresh=3, **options), correlated(512)) for options in ({}, learned)
    )
    for seed in range(7):
        for pair in (plain, learning):
            pair.send(correlated(512, seed))
    jumped = 2 * correlated(512, 7) @ turn
    stale, without = (relative_error(pair.send(jumped), jumped) for pair in (learning, plain))
    assert stale < 1.5 * without


# What is learned


@SOMETHING_LEARNED
def test_it_arrives_in_slices_and_is_used_from_an_agreed_message_on(learned):
    pair = Pair(Transform(bits=2, refresh=REFRESH, **learned), correlated(256))
    for number in range(4 * REFRESH):
        pair.send(correlated(256, number))
        used = pair.states[1].shared["used"]
        assert used.any() == (number >= 2 * REFRESH)
        assert torch.equal(used, pair.states[0].shared["used"])
        if number == 2 * REFRESH:
            first = used.clone()
    assert not torch.equal(first, used), "new ones each period"


def learning_ends(**options):
    codec = {"name": "transform", "bits": 2, "basis": "eigen", "anchors": 16, "refresh": 2}
    return Ends(activations={"codec": codec}, **options)


def test_it_outlives_a_new_batch_shape_but_not_a_new_width():
    ends = learning_ends()
    for seed in range(5):
        ends.pass_on(0, True, correlated(256, seed).view(2, 128, WIDTH))
    state = ends.sender.learned[0, "key"].state
    ends.pass_on(1, True, correlated(90, 6))
    assert ends.sender.learned[0, "key"].state is state
    assert state.num_messages == 6
    ends.pass_on(0, True, normal(90, 48))
    assert ends.sender.learned[0, "key"].state.num_messages == 1


@SOMETHING_LEARNED
@pytest.mark.parametrize("num_before", [1, 2, 3, 4, 5])
def test_a_resumed_run_is_the_uninterrupted_one(num_before, learned):
    """Also while something is being learned, or on its way."""
    codec = {"name": "transform", "bits": 2, "refresh": 4, **learned}
    ends, others = (Ends(activations={"codec": codec}) for _ in range(2))
    for seed in range(2 * num_before):
        ends.pass_on(0, True, correlated(256, seed))
    for mine, other in ((ends.sender, others.sender), (ends.receiver, others.receiver)):
        other.load_state_dict(mine.state_dict())
    for seed in range(10, 16):
        value = correlated(256, seed)
        assert torch.equal(ends.pass_on(0, True, value), others.pass_on(0, True, value))


@EVERY_LEARNED
def test_a_user_s_autocast_changes_no_message(learned):
    codec = {"name": "transform", "bits": 2, "refresh": 2, **learned}
    ends, others = (Ends(activations={"codec": codec}) for _ in range(2))
    for seed in range(6):
        value = correlated(256, seed)
        with torch.autocast("cpu"):
            received = ends.pass_on(0, True, value)
        assert torch.equal(received, others.pass_on(0, True, value))


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


def test_a_difference_is_found_by_verify():
    ends = learning_ends(verify=True)
    for step in range(5):
        ends.pass_on(0, True, correlated(256, step))
    ends.receiver.learned[0, "key"].state.shared["used"][3] += 1
    with pytest.raises(VerificationError, match="memory"):
        ends.pass_on(0, True, correlated(256, 5))


@SOMETHING_LEARNED
def test_a_plain_state_is_as_if_nothing_were_learned(learned):
    """What time is measured with."""
    plain, learning = (Pair(Transform(bits=3, **options), correlated(512)) for options in ({}, learned))
    for state in learning.states:
        learning.codec.warm_up_(state, WIDTH)
    value = correlated(512)
    errors = [relative_error(pair.send(value), value) for pair in (plain, learning)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_slices_hold_all_that_is_learned_to_the_last_byte():
    """Of 7 messages a period, whose slices do not divide it evenly."""
    pair = Pair(Transform(bits=2, basis="eigen", anchors=3, refresh=7), gathered(256))
    for number in range(3 * 7):
        pair.send(gathered(256, number))
    used = pair.states[1].shared["used"]
    layout = pair.codec.layout(WIDTH)
    assert len(used) == WIDTH * (WIDTH + 1) + WIDTH * (3 + 1) == layout.nbytes
    basis, anchors = layout.basis(used), layout.anchors(used)
    assert (basis.integers.abs().amax(1) >= 64).all()
    assert basis.exponents.all()
    assert anchors.integers.any(1).all()
    assert anchors.exponents.any()


# Anchors


def test_points_that_rows_gather_around_are_found():
    """Of rows that come in turn, one of each, each far from the others."""
    centre_KC = 10 * normal(4, 32, seed=1)
    row_RC = centre_KC.repeat(64, 1) + 0.1 * normal(256, 32)
    anchor_KC, nearest_R = find_anchors(row_RC, 4)
    distance_44 = torch.cdist(anchor_KC, centre_KC)
    assert (distance_44.amin(0) < 0.1).all()
    assert torch.equal(torch.cdist(row_RC, anchor_KC).argmin(1), nearest_R)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 100])
def test_few_rows_have_few_anchors(num_rows):
    """One for eight, and the others at zero."""
    anchor_KC, nearest_R = find_anchors(normal(num_rows, 32), 64)
    assert anchor_KC.any(1).sum() == -(-num_rows // 8)
    assert len(nearest_R) == num_rows


def test_the_nearest_anchor_is_found_by_the_coordinates_that_matter():
    """Of 400 coordinates anchors differ in 100."""
    anchor_KC = torch.cat([torch.zeros(16, 300), normal(16, 100)], 1)
    anchors = Anchors(torch.zeros(16, 400, dtype=torch.int8), torch.zeros(400, dtype=torch.int8))
    anchors.write_(anchor_KC)
    row_MC = anchor_KC.repeat(8, 1) + 0.3 * normal(128, 400, seed=2)
    assert torch.equal(prepare_search(anchors).find_nearest(row_MC), torch.arange(16).repeat(8))


def test_anchors_travel_as_integers_that_are_near():
    anchor_KC = normal(64, 48) * torch.logspace(-6, 6, 48)
    anchors = Anchors(torch.zeros(64, 48, dtype=torch.int8), torch.zeros(48, dtype=torch.int8))
    anchors.write_(anchor_KC)
    largest_C = anchor_KC.abs().amax(0)
    assert ((anchors.values - anchor_KC).abs() <= largest_C / 128).all()
