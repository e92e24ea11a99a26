"""The exchange of gradients among replicas: equal means, bytes as the formula says, nothing lost."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from clapping_ds.codecs import CODECS, Eden
from clapping_ds.gradients import layout
from clapping_ds.gradients.delay import DelayedExchange
from clapping_ds.gradients.layout import Parameter
from tests.core.replicas import NodeReplicas, Replicas, mean_of, same_bits

NONE = {"scatter": "none", "gather": "none"}
CODED = [name for name in CODECS if name not in ("none", "transform")]
LIST = ["lowrank", "eden1"]


def plan_of(codec, feedback="auto"):
    return {"scatter": codec, "gather": codec, "error_feedback": feedback}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uncompressed_it_is_the_mean(size, dtype):
    replicas = Replicas(size, NONE, tied=(1,))
    gradients = replicas.draw(0, dtype)
    means = replicas.average(0, gradients)
    for mine in means:
        for number, mean in mean_of(gradients).items():
            # Tied ones are added up in their own dtype: sums of up to 8, rounded at each of three additions.
            atol = torch.finfo(dtype).eps * (6 if number == 1 else 1)
            torch.testing.assert_close(mine[number], mean.to(dtype), rtol=0, atol=atol)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("feedback", ["none", "ef14", "ef21", "ef21_sgdm"])
@pytest.mark.parametrize("codec", [*CODED, LIST], ids=str)
def test_replicas_get_equal_bits(codec, feedback, size):
    replicas = Replicas(size, plan_of(codec, feedback))
    for step in range(3):
        first, *others = replicas.average(step, replicas.draw(step, torch.bfloat16))
        assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("size", [2, 3])
def test_without_feedback_the_mean_over_steps_is_right(size):
    replicas = Replicas(size, plan_of({"name": "eden2", "scale": "unbiased"}, "none"))
    gradients = replicas.draw(0)
    num_steps = 100
    total = {n: torch.zeros(p.shape) for n, p in enumerate(replicas.parameters)}
    for step in range(num_steps):
        for n, mean in replicas.average(step, gradients)[0].items():
            total[n] += mean / num_steps
    for n, mean in mean_of(gradients).items():
        # The error of a step has a variance below 0.14 per way, and falls with the number of steps.
        assert (total[n] - mean).square().mean().sqrt() < 2 * (0.28 / num_steps) ** 0.5


@pytest.mark.parametrize("codec", ["sign", "eden1", "int2", "topk", LIST], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_ef14_sends_all_in_the_end(codec, size):
    """Sum of gradients = sum of what was used + what is held back, on both ways."""
    replicas = Replicas(size, plan_of(codec, "ef14"), shapes=((24, 64), (32, 64)))
    given = {n: torch.zeros(p.shape) for n, p in enumerate(replicas.parameters)}
    used = {n: torch.zeros(p.shape) for n, p in enumerate(replicas.parameters)}
    for step in range(12):
        gradients = replicas.draw(step)
        means = replicas.average(step, gradients)[0]
        for n, mean in mean_of(gradients).items():
            given[n] += mean
            used[n] += means[n]
    for n, parameter in enumerate(replicas.parameters):
        kept = torch.zeros(parameter.shape.numel())
        for exchange in replicas.exchanges:
            for leg, share in (("scatter", 1 / size), ("gather", 1.0)):
                for (name, start, stop), error in exchange.legs[leg].feedback.error.values.items():
                    if name == parameter.name:
                        kept[start:stop] += share * error
        torch.testing.assert_close(given[n].view(-1), used[n].view(-1) + kept, rtol=0, atol=1e-4)


@pytest.mark.parametrize("feedback", ["ef14", "ef21"])
def test_feedback_finds_a_gradient_that_stays(feedback):
    replicas = Replicas(3, plan_of("eden1", feedback))
    gradients = replicas.draw(0)
    total = {n: torch.zeros(p.shape) for n, p in enumerate(replicas.parameters)}
    for step in range(60):
        means = replicas.average(step, gradients)[0]
        for n in total:
            total[n] += means[n] / 60
    for n, mean in mean_of(gradients).items():
        found = means[n] if feedback == "ef21" else total[n]
        assert (found - mean).norm() < 0.1 * mean.norm()


def test_bytes_are_what_the_formula_says():
    """2 (N - 1) / N of all values at 4 bits and a bfloat16 scale per 128, in pieces of whole groups."""
    for size in (2, 4):
        replicas = Replicas(size, plan_of("eden4"), shapes=((4 * 128, 128), (8 * 128, 64), (64,)))
        replicas.average(0, replicas.draw(0))
        num_values = 2 * 4 * 128 * 128
        sent = [sum(leg.traffic.payload_bytes for leg in e.legs.values()) for e in replicas.exchanges]
        assert sent == [2 * (size - 1) * num_values // size * (4 + 16 / 128) / 8] * size
        raw = [sum(leg.traffic.raw_bytes for leg in e.legs.values()) for e in replicas.exchanges]
        assert raw == [2 * (size - 1) * num_values // size * 4] * size


def halves(number):
    """An optimizer's parts that heed no rows."""
    numel = {0: 24 * 64, 1: 16 * 4 * 64, 2: 7}[number]
    return [(0, 0, 1000 + number), (1, 1000 + number, numel)] if number < 2 else [(0, 0, 7)]


@pytest.mark.parametrize("codec", ["eden4", "sign", "none"])
def test_where_the_optimizer_is_split_each_gets_its_part(codec):
    replicas = Replicas(2, plan_of(codec), cut=halves)
    gradients = replicas.draw(0)
    means = replicas.average(0, gradients)
    exact = mean_of(gradients)
    error = {"none": 1e-6, "eden4": 0.15, "sign": 0.8}[codec]
    for owner, mine in enumerate(means):
        for number in (0, 1):
            _, start, stop = halves(number)[owner]
            part, true = mine[number].view(-1)[start:stop], exact[number].view(-1)[start:stop]
            assert (part - true).norm() <= error * true.norm()
    assert all(exchange.legs["gather"].traffic.num_messages == 0 for exchange in replicas.exchanges)


@pytest.mark.parametrize("codec", ["eden4", "sign", "topk", "fp8_e4m3", LIST], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_what_is_not_finite_reaches_every_replica_and_no_error(codec, size):
    replicas = Replicas(size, plan_of(codec))
    replicas.average(0, replicas.draw(0))
    before = [exchange.state_dict()["legs"] for exchange in replicas.exchanges]
    held = [[{p: v.clone() for p, v in kind.items()} for leg in of.values() for kind in leg["held"].values()]
            for of in before]  # fmt: skip
    gradients = replicas.draw(1)
    gradients[1][0].view(-1)[17] = torch.inf
    first, *others = replicas.average(1, gradients, accepted=False)
    assert not first[0].view(-1)[17].isfinite()
    assert all(same_bits(first, other) for other in others)
    for exchange, known in zip(replicas.exchanges, held, strict=True):
        kinds = [kind.values for leg in exchange.legs.values() for kind in leg.feedback.held.values()]
        for kind, was in zip(kinds, known, strict=True):
            assert kind.keys() == was.keys()
            assert all(torch.equal(kind[place], was[place]) for place in kind), "a skipped step left an error"
    replicas.average(2, gradients)
    for exchange in replicas.exchanges:
        for leg in exchange.legs.values():
            for kind in leg.feedback.held.values():
                assert all(values.isfinite().all() for values in kind.values.values())


def test_what_is_held_follows_the_loss_scale():
    one, other = (Replicas(3, plan_of("sign")) for _ in range(2))
    gradients = one.draw(0)
    scaled = [{n: g * 1024 for n, g in of.items()} for of in gradients]
    one.average(0, gradients)
    other.average(0, gradients)
    for exchange in other.exchanges:
        exchange.rescale(1024.0)
    first, second = one.average(1, gradients)[0], other.average(1, scaled)[0]
    assert all(torch.equal(first[n] * 1024, second[n]) for n in first)


@pytest.mark.parametrize("feedback", ["ef14", "ef21", "ef21_sgdm"])
@pytest.mark.parametrize("codec", ["sign", LIST], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(codec, feedback):
    whole = Replicas(3, plan_of(codec, feedback))
    for step in range(3):
        whole.average(step, whole.draw(step))
    resumed = Replicas(3, plan_of(codec, feedback))
    for new, old in zip(resumed.exchanges, whole.exchanges, strict=True):
        assert new.describe() == old.describe()
        new.load_state_dict(old.state_dict())
    for step in range(3, 6):
        gradients = whole.draw(step)
        assert same_bits(whole.average(step, gradients)[0], resumed.average(step, gradients)[0])


def test_every_replica_draws_for_itself():
    """Equal gradients, and so equal errors if the draws were equal: with N of them the error falls."""
    codec = {"name": "eden2", "scale": "unbiased"}
    errors = {}
    for size in (2, 8):
        replicas = Replicas(size, {"scatter": codec, "gather": "none", "error_feedback": "none"})
        gradients = [replicas.draw(0)[0]] * size
        mean = replicas.average(0, gradients)[0][0]
        errors[size] = float((mean - gradients[0][0]).square().mean())
    assert 2 < errors[2] / errors[8] < 8, "a quarter, of few values"


def test_parameters_keep_their_errors_in_other_messages():
    """As after torch's DDP has made its buckets anew."""
    one, other = (Replicas(3, plan_of("eden1")) for _ in range(2))
    gradients = one.draw(0)
    one.average(0, gradients)
    other.average(0, gradients)
    held = {p: v.clone() for p, v in one.exchanges[0].legs["scatter"].feedback.error.values.items()}
    later = one.draw(1)
    parts = []
    for numbers in ([1], [0, 2]):
        rounds = [e.start({n: of[n] for n in numbers}) for e, of in zip(other.exchanges, later, strict=True)]
        parts.append(rounds)
    for rounds in parts:
        for each in rounds:
            each.advance()
    for rounds in parts:
        for each in rounds:
            each.finish()
    for exchange in other.exchanges:
        exchange.end_step()
    error = other.exchanges[0].legs["scatter"].feedback.error.values
    assert error.keys() == held.keys()
    assert not any(torch.equal(error[place], held[place]) for place in held)


def test_a_codec_that_does_not_fit_leaves_a_section_raw():
    replicas = Replicas(3, plan_of({"name": "topk", "block": 4096}), shapes=((8, 64),))
    gradients = replicas.draw(0)
    mean = mean_of(gradients)[0]
    torch.testing.assert_close(replicas.average(0, gradients)[0][0], mean)


def test_a_changed_payload_is_found():
    replicas = Replicas(3, plan_of("eden4"), verifies=True)
    gradients = replicas.draw(0)
    rounds = [e.start(of) for e, of in zip(replicas.exchanges, gradients, strict=True)]
    for (_, place), item in replicas.mail.posted.items():
        if place == 1 and isinstance(item, tuple):
            item[0][-1] ^= 1
    with pytest.raises(RuntimeError, match="step 0: scatter from rank 1: payload: expected"):
        rounds[0].advance()


def test_the_measured_error_is_the_codecs():
    replicas = Replicas(3, plan_of({"name": "eden2", "scale": "unbiased"}, "none"), shapes=((256, 128),))
    replicas.average(0, replicas.draw(0), measures_error=True)
    traffic = replicas.exchanges[0].legs["scatter"].traffic
    assert traffic.relative_error == pytest.approx(0.133**0.5, rel=0.1)
    assert Eden(name="eden2").bits == 2


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_on_nodes_it_is_the_mean(num_nodes):
    replicas = NodeReplicas(num_nodes, 2, NONE, tied=(1,))
    gradients = replicas.draw(0)
    first, *others = replicas.average(0, gradients)
    assert all(same_bits(first, other) for other in others)
    for number, mean in mean_of(gradients).items():
        torch.testing.assert_close(first[number], mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("codec", ["eden4", "sign", LIST], ids=str)
def test_between_nodes_every_value_crosses_once(codec):
    replicas = NodeReplicas(2, 2, plan_of(codec), shapes=((4 * 128, 128), (64,)))
    gradients = replicas.draw(0)
    first, *others = replicas.average(0, gradients)
    assert all(same_bits(first, other) for other in others)
    if codec == "eden4":
        mean = mean_of(gradients)[0]
        assert (first[0] - mean).norm() < 0.1 * mean.norm()
        sent = [exchange.legs["scatter"].traffic.payload_bytes for exchange in replicas.exchanges]
        assert sent == [4 * 128 * 128 // 2 * (4 + 16 / 128) / 8] * 4, "of each replica its half, once"


def test_replicas_with_other_means_are_found():
    replicas = Replicas(3, plan_of("eden4"), verifies=True)
    replicas.average(0, replicas.draw(0))
    replicas.exchanges[2].decode = lambda leg, step, section, *_: torch.zeros(section.shape.numel())
    with pytest.raises(RuntimeError, match="step 1: rank 2 has another mean of weight 0, weight 1"):
        replicas.average(1, replicas.draw(1))


def average_late(delayed, step, gradients):
    """One step of all replicas."""

    def run(exchange, mine):
        exchange.exchange.begin_step(step)
        exchange.average_(mine)
        exchange.exchange.end_step()

    with ThreadPoolExecutor(len(delayed)) as threads:
        list(threads.map(run, delayed, gradients))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("delay", [1, 2])
def test_old_gradients_are_those_of_some_steps_ago(size, delay):
    replicas = Replicas(size, {})
    delayed = [DelayedExchange(exchange, delay) for exchange in replicas.exchanges]
    means = []
    for step in range(delay + 3):
        gradients = replicas.draw(step)
        means.append(mean_of(gradients))
        average_late(delayed, step, gradients)
        for number, found in gradients[0].items():
            if step < delay:
                assert not found.any()
            else:
                true = means[step - delay][number]
                assert (found - true).norm() < 0.2 * true.norm(), "the error of eden4 on both ways"


@pytest.mark.parametrize("feedback", ["ef14", "ef21"])
def test_what_is_on_its_way_may_be_saved_in_between(feedback):
    """Two rounds arrive at once then, and the second builds on what the first one left."""
    found = []
    for saves in (False, True):
        replicas = Replicas(3, plan_of("sign", feedback))
        delayed = [DelayedExchange(exchange, 2) for exchange in replicas.exchanges]
        for step in range(7):
            gradients = replicas.draw(step)
            average_late(delayed, step, gradients)
            if saves and step == 3:
                with ThreadPoolExecutor(3) as threads:
                    list(threads.map(DelayedExchange.state_dict, delayed))
        found.append(gradients[0])
    assert same_bits(*found)


def test_what_is_tied_travels_by_itself():
    parameters = [Parameter("table", torch.Size((64, 64)), True), Parameter("weight", torch.Size((64, 64)))]
    (bucket,) = layout.make_buckets(parameters, range(2), 3, layout.cut_rows(parameters, 3), 512, False)
    assert bucket.tied == (0,) and not bucket.raw
    assert {piece.number for of in bucket.sections for each in of for piece in each.pieces} == {1}


def test_a_load_in_a_run_that_has_stepped_is_as_in_a_new_one():
    old, used, new = (Replicas(3, plan_of("sign")) for _ in range(3))
    old.average(0, old.draw(0))
    saved = [exchange.state_dict() for exchange in old.exchanges]
    for exchange in used.exchanges:
        exchange.begin_step(5)
    rounds = [e.start(of) for e, of in zip(used.exchanges, used.draw(5), strict=True)]
    for each in rounds:
        each.advance()
    for replicas in (used, new):
        for exchange, state in zip(replicas.exchanges, saved, strict=True):
            exchange.load_state_dict(state)
    gradients = old.draw(1)
    assert same_bits(used.average(1, gradients)[0], new.average(1, gradients)[0])


def test_a_state_does_not_change_with_the_next_steps():
    replicas = Replicas(2, plan_of("sign"))
    replicas.average(0, replicas.draw(0))
    state = replicas.exchanges[0].state_dict()["legs"]["scatter"]["held"]["error"]
    before = {place: error.clone() for place, error in state.items()}
    replicas.exchanges[0].rescale(4.0)
    replicas.average(1, replicas.draw(1))
    assert state.keys() == before.keys()
    assert all(torch.equal(state[place], before[place]) for place in state)


@pytest.mark.parametrize("size", [2, 3])
def test_a_running_mean_is_taken_once(size):
    """Of a constant gradient after 10 steps 1 - 0.9^10 = 0.65, whatever the number of replicas."""
    replicas = Replicas(size, plan_of("int8", "ef21_sgdm"))
    gradients = [replicas.draw(0)[0]] * size
    for step in range(10):
        mean = replicas.average(step, gradients)[0]
    assert mean[0].norm() / gradients[0][0].norm() == pytest.approx(1 - 0.9**10, rel=0.02)


def test_scalars_and_odd_shapes_are_exchanged():
    shapes = ((), (3,), (1, 5), (0, 4), (7, 300), (2, 3, 200))
    for replicas in (Replicas(3, {}, shapes), NodeReplicas(2, 2, {}, shapes)):
        gradients = replicas.draw(0)
        first, *others = replicas.average(0, gradients)
        assert all(same_bits(first, other) for other in others)
        for number, mean in mean_of(gradients).items():
            assert (first[number] - mean).norm() <= 0.2 * mean.norm() + 1e-6


def test_other_dtypes_are_refused():
    replicas = Replicas(2, {})
    gradients = {0: torch.zeros(24, 64, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"weight 0, whose gradient is torch\.float64; accepted: fp32"):
        replicas.exchanges[0].start(gradients)


def test_every_bucket_has_as_much_of_each_owner(monkeypatch):
    """Also where an optimizer gives each consecutive parameters; or one is sent to while all others wait."""
    monkeypatch.setattr(layout, "BUCKET_NUMEL", 4096)
    shapes = [(64, 64)] * 8 + [(64,)]
    parameters = [Parameter(f"weight {n}", torch.Size(shape)) for n, shape in enumerate(shapes)]

    def cut(number):
        return [(number // 2, 0, 64 * 64)] if number < 8 else [(3, 0, 64)]

    buckets = layout.make_buckets(parameters, range(9), 4, cut, 512, has_matrices=False)
    assert len(buckets) == 8
    for bucket in buckets:
        assert [sum(each.shape.numel() for each in of) for of in bucket.sections] == [1024] * 4
    pieces = sorted(piece for b in buckets for of in b.sections for each in of for piece in each.pieces)
    covered = [(p.number, value) for p in pieces for value in range(p.start, p.stop)]
    assert covered == [(n, value) for n in range(8) for value in range(4096)]
    assert buckets[0].raw == (8,) and not any(bucket.raw for bucket in buckets[1:])


@pytest.mark.parametrize("codec", ["eden4", "sign", LIST], ids=str)
def test_buckets_change_no_mean(monkeypatch, codec):
    whole = Replicas(3, plan_of(codec), shapes=((48, 64), (64, 64)))
    gradients = whole.draw(0)
    expected = whole.average(0, gradients)[0]
    monkeypatch.setattr(layout, "BUCKET_NUMEL", 2048)
    parts = Replicas(3, plan_of(codec), shapes=((48, 64), (64, 64)))
    first, *others = parts.average(0, gradients)
    assert all(same_bits(first, other) for other in others)
    for number, mean in mean_of(gradients).items():
        error = (expected[number] - mean).norm()
        assert (first[number] - mean).norm() < 1.5 * error
