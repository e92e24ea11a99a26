"""The DeepSpeed engine, on real ranks: bit-identical where nothing is compressed, equal memories where
something is, every kind of model and data, and one clear error where the input is bad."""

from itertools import islice

import pytest
import torch

from clapping_ds.codecs import CODECS
from clapping_ds.links import Choice, Decision
from tests import models, stress
from tests.cluster import RankError, free_groups

NONE = {"strategy": "fu", "p_new": 1, "activations": {"delta": "none"}, "gradients": {"delta": "none"}}
INT2 = {"strategy": "fc", "refresh": "slot", "activations": {"delta": "int2"}, "gradients": {"delta": "int2"}}


def compare(options, steps=4):
    """Losses of stock DeepSpeed, of three engines that must equal it, and of one that must not."""
    blocks = {"no block": None, "off": {"enabled": False, "p_new": 0.5}, "none": NONE, "int2": INT2}
    stock = models.losses(None, {**options, "stock": True}, steps)
    return stock, {name: models.losses(block, options, steps) for name, block in blocks.items()}


def assert_identical_to_stock(outcomes):
    for stock, ours in outcomes:
        assert ours["no block"] == ours["off"] == ours["none"] == stock
        assert ours["int2"] != stock


BF16 = {"bf16": {"enabled": True}}
ZERO1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
CHECKPOINTING = {"pipeline": {"use_reentrant": False}}
CASES = {
    "fp32": {},
    "tuple": {"kind": "tuple"},
    "tied": {"kind": "tied"},
    "bf16": {"ds": BF16},
    "bf16 ZeRO-1": {"ds": {**BF16, **ZERO1}},
    "fp32 ZeRO-1": {"ds": ZERO1},
    "clipping": {"ds": {"gradient_clipping": 0.1}},
    "checkpointing": {"ds": CHECKPOINTING, "module_options": {"activation_checkpoint_interval": 1}},
    "dynamic shape": {"module_options": {"dynamic_shape": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_two_stages_equal_stock(two_ranks, case):
    assert_identical_to_stock(two_ranks.run(compare, CASES[case]))


@pytest.mark.parametrize("case", ["fp32", "tuple", "tied", "bf16 ZeRO-1"])
def test_four_stages_equal_stock(four_ranks, case):
    assert_identical_to_stock(four_ranks.run(compare, {**CASES[case], "num_stages": 4}))


def at_depths(num_stages, block, settings):
    """Losses, memories and most payloads of a wire under each setting."""
    found = []
    for setting in settings:
        ds = {"gradient_accumulation_steps": 8}
        engine = models.make_engine({**block, **setting}, num_stages, ds=ds)
        losses = models.train(engine, 5)
        most_payloads = max(wire.most_payloads for wire in engine._stage.wires.values())
        found.append((losses, models.memories(engine), most_payloads))
        del engine
        free_groups()
    return found


@pytest.mark.parametrize("block", [NONE, INT2], ids=["none", "int2"])
def test_losses_and_memories_are_the_same_at_every_depth(two_ranks, four_ranks, block):
    depths = [0, 1, 3, 8] if block is NONE else [3]
    settings = [{"overlap": False}, {"in_flight": "auto"}, *({"in_flight": depth} for depth in depths)]
    for ranks, num_stages in ((two_ranks, 2), (four_ranks, 4)):
        for blocking, *others in ranks.run(at_depths, num_stages, block, settings):
            assert all(other[:2] == blocking[:2] for other in others)
            for depth, (_, _, most_payloads) in zip(depths, others[1:], strict=True):
                assert most_payloads <= depth + 2


@pytest.mark.parametrize("case", ["fp32", "bf16 ZeRO-1", "clipping"])
def test_two_stages_of_two_replicas_equal_stock(four_ranks, case):
    assert_identical_to_stock(four_ranks.run(compare, CASES[case]))


def memories_of(blocks, num_stages, kind, steps):
    found = []
    for block in blocks:
        engine = models.make_engine(block, num_stages=num_stages, kind=kind)
        models.train(engine, steps)
        found.append((engine.grid.get_data_parallel_id(), models.memories(engine)))
        del engine
        free_groups()
    return found


def all_blocks():
    """Every codec as delta, with each kind of key in turn; tests/test_channel.py has all pairs."""
    for index, delta in enumerate(CODECS):
        key = ({}, {"key": "none"}, {"key": "int8"})[index % 3]
        direction = {"delta": delta, "min_numel": 1024, **key}
        yield {"strategy": "fc", "refresh": "slot", "activations": direction, "gradients": direction}


def assert_ends_are_equal(by_rank, blocks):
    for index, block in enumerate(blocks):
        ends = {}
        for replica, memories in (rank[index] for rank in by_rank):
            for channel, bits in memories.items():
                ends.setdefault((replica, *channel), []).append(bits)
        for channel, (one, other) in ends.items():
            assert one == other, f"{channel} with {block}"
            if block["activations"]["delta"] != "none":
                assert len(one) == 4, "a memory for each slot"


@pytest.mark.parametrize("kind", ["plain", "tuple"])
def test_memories_of_two_stages_are_equal(two_ranks, kind):
    blocks = list(all_blocks())[:: 1 if kind == "plain" else 3]
    assert_ends_are_equal(two_ranks.run(memories_of, blocks, 2, kind, 3), blocks)


def test_memories_of_four_stages_are_equal(four_ranks):
    blocks = list(all_blocks())[::4]
    assert_ends_are_equal(four_ranks.run(memories_of, blocks, 4, "plain", 3), blocks)


def test_memories_of_replicas_are_equal_at_the_ends_of_each_link(four_ranks):
    blocks = list(all_blocks())[2::4]
    assert_ends_are_equal(four_ranks.run(memories_of, blocks, 2, "plain", 3), blocks)


def reports(block, steps):
    engine = models.make_engine(block)
    models.train(engine, steps)
    early = [row["memory_bytes"] for row in engine.clapping_report()]
    models.train(engine, steps)
    return early, engine.clapping_report()


@pytest.mark.parametrize(("strategy", "key_bytes"), [("fu", 2 * 64 * 64 * 4), ("fc", 64 * 32 + 64 * 2)])
def test_bytes_and_memory_equal_the_formula(two_ranks, strategy, key_bytes):
    """Messages of 2 x 64 x 64 fp32 values in 64 groups; int2 takes 2,048 code and 128 scale bytes."""
    block = {**INT2, "strategy": strategy, "refresh": "cycle"}
    for early, report in two_ranks.run(reports, block, 5):
        assert {row["direction"] for row in report} == {"activations", "gradients"}
        for row in report:
            num_fresh = 4 + 9 * 2
            delta_bytes = 64 * 32 + 64 * 2
            assert row["messages"] == 40
            assert row["payload_bytes"] == num_fresh * key_bytes + (40 - num_fresh) * delta_bytes
            assert row["raw_bytes"] == 40 * 2 * 64 * 64 * 4
            assert row["memory_bytes"] == 4 * 2 * 64 * 64 * 4
        assert early == [row["memory_bytes"] for row in report]


def with_evaluation(block, evaluates, stock=False):
    engine = models.make_engine(block, kind="tuple", stock=stock)
    data, found, evaluations = models.batches(), [], []
    for step in range(4):
        found.append(float(engine.train_batch(data_iter=data)))
        if evaluates:
            before = None if stock else models.memories(engine)
            held_out = models.batches(seed=9)
            evaluations.append(float(engine.eval_batch(held_out, num_micro_batches=step + 1)))
            assert stock or models.memories(engine) == before
    return found, evaluations


def test_evaluation_is_raw_and_changes_nothing(two_ranks):
    for block in (NONE, INT2):
        (alone, _), *_ = two_ranks.run(with_evaluation, block, False)
        (between, _), *_ = two_ranks.run(with_evaluation, block, True)
        assert alone == between
    stock = two_ranks.run(with_evaluation, None, True, True)
    assert two_ranks.run(with_evaluation, NONE, True) == stock


def lazily(sizes):
    """Which samples each loading stage used, as the first token of each micro-batch."""
    engine = models.make_engine({**INT2, "refresh": "cycle"})
    used = []
    original = engine._stage.sampler.next

    def spying():
        batch = original()
        used.append(int(batch[0][0, 0]) * 1000 + int(batch[0][0, 1]))
        return batch

    engine._stage.sampler.next = spying
    data = models.batches()
    drawn = 0

    def counting():
        nonlocal drawn
        for batch in data:
            drawn += 1
            yield batch

    source = counting()
    for size in sizes:
        engine.set_train_batch_size(size * models.BATCH)
        engine.train_batch(data_iter=source)
    return used, drawn, {slot for channel in engine._stage.channels.values() for slot in channel.held}


def test_both_loading_stages_replay_the_same_batches(two_ranks):
    (first, drawn, _), (last, also_drawn, _) = two_ranks.run(lazily, [4, 4, 4])
    assert first == last
    assert drawn == also_drawn == 4 + 2 + 2
    assert [a == b for a, b in zip(first[:4], first[4:8], strict=True)] == [False, False, True, True]


def test_number_of_micro_batches_changes(two_ranks):
    for used, drawn, slots in two_ranks.run(lazily, [4, 2, 6]):
        assert len(used) == 12
        assert drawn == 4 + 1 + 4  # slots 2 to 5 are new, and it is the turn of 3 to 5
        assert slots == set(range(6))
    assert two_ranks.run(lazily, [4, 2])[0][2] == {0, 1}


def with_lengths(lengths, stock=False):
    engine = models.make_engine(None if stock else NONE, stock=stock)
    found = []
    for step, length in enumerate(lengths):
        if stock:
            engine.reset_activation_shape()
        found.append(float(engine.train_batch(data_iter=models.batches(seed=step, length=length))))
    return found


def test_a_curriculum_needs_no_call_of_ours(two_ranks):
    lengths = [16, 16, 32, 32, 64]
    assert two_ranks.run(with_lengths, lengths) == two_ranks.run(with_lengths, lengths, True)


def short_last_batch(block):
    engine = models.make_engine(block)
    sizes = [2, 2, 2, 1, 2, 2, 2, 2, 2, 1, 1, 2]
    data = iter([next(models.batches(seed=i, size=size)) for i, size in enumerate(sizes)])
    found = [float(engine.train_batch(data_iter=data)) for _ in range(3)]
    return found, models.memories(engine)


def test_batches_of_unequal_size(two_ranks):
    (first, one), (second, other) = two_ranks.run(short_last_batch, {**INT2, "p_new": 1.0 - 1e-9})
    assert first == second
    assert one == other


def from_training_data(block, stock=False):
    tokens, labels = zip(*islice(models.batches(size=1), 64), strict=True)
    data = torch.utils.data.TensorDataset(torch.cat(tokens), torch.cat(labels))
    engine = models.make_engine(block, stock=stock, training_data=data)
    return [float(engine.train_batch()) for _ in range(3)]


def test_training_data(two_ranks):
    assert two_ranks.run(from_training_data, NONE) == two_ranks.run(from_training_data, None, True)
    one, other = two_ranks.run(from_training_data, INT2)
    assert one == other


def not_finite(block):
    engine = models.make_engine(block, stock=block is None)
    data = models.batches()
    engine.train_batch(data_iter=data)
    if engine.is_first_stage():
        next(engine.module.parameters()).data[5] = float("inf")
    loss = float(engine.train_batch(data_iter=data))
    if block is None:
        return loss, {}
    slots = [slot for channel in engine._stage.channels.values() for slot in channel.held.values()]
    assert all(bool(held.memory.isfinite().all()) for slot in slots for held in slot.values())
    return loss, models.memories(engine)


def test_what_is_not_finite_reaches_the_loss_but_not_the_memories(two_ranks):
    (stock, _), *_ = two_ranks.run(not_finite, None)
    (loss, one), (_, other) = two_ranks.run(not_finite, {**INT2, "p_new": 1 - 1e-9})
    assert stock != stock
    assert loss != loss
    assert one == other


# Links and depth that are decided after the first steps


def with_links(block, num_stages, steps=6):
    engine = models.make_engine(block, num_stages)
    models.train(engine, steps)
    return engine._stage.decision, engine._stage.in_flight, models.memories(engine), engine.clapping_report()


def test_links_auto_leaves_fast_links_alone(two_ranks, tmp_path):
    block = {**INT2, "links": {"write": str(tmp_path / "links.json"), "min_gain": 0.5}}
    (one, *_, report), (other, *_) = two_ranks.run(with_links, block, 2)
    assert one == other == Decision.read(str(tmp_path / "links.json"), 2)
    assert [choice.codec.name for choice in one.choices] == ["none", "none"]
    for row in report:
        before, after = 3 * 4 * (2048 + 128), 3 * 4 * 2 * 64 * 64 * 4
        assert row["payload_bytes"] == before + after
        assert row["memory_bytes"] == 0


def test_links_from_a_file_that_only_the_first_rank_sees(four_ranks, tmp_path):
    path = tmp_path / "links.json"
    codecs = iter(["int2", "none", "int8", "eden2", "none", "int4"])
    choices = [
        Choice(link=f"{i}-{i + 1}", direction=name, codec=CODECS[codec](name=codec), mbit_per_s=1.0,
               latency_ms=1.0, raw_ms=1.0, compressed_ms=1.0)
        for i in range(3) for name in ("activations", "gradients") for codec in [next(codecs)]
    ]  # fmt: skip
    Decision(num_stages=4, in_flight=2, stage_ms=1.0, choices=choices).write(str(path))
    block = {**INT2, "links": {"read": str(path)}}
    ends = {}
    for decision, in_flight, memories, _ in four_ranks.run(with_links, block, 4):
        assert (decision.choices, in_flight) == (choices, 2)
        for channel, bits in memories.items():
            ends.setdefault(channel, []).append(bits)
    assert all(one == other for one, other in ends.values())
    assert [bool(ends[choice.link, choice.direction][0][0, 0]) for choice in choices] == [
        True, False, True, True, False, True,
    ]  # fmt: skip
    outcomes = four_ranks.outcomes(models.make_engine_only, block, 2)
    assert_same_error(outcomes, "ValueError", "written for 4 stages; accepted: a file written for 2 stages")


def test_delays_on_random_ranks_change_nothing(four_ranks):
    stress.check(four_ranks, steps=30)


# Bad input


def assert_same_error(outcomes, kind, message):
    for outcome in outcomes:
        assert isinstance(outcome, RankError), "a rank went on"
        assert outcome.kind == kind
        assert outcome.message == outcomes[0].message
        assert message in outcome.message


@pytest.mark.parametrize(
    ("block", "message"),
    [({"p_neu": 0.5}, "clapping.p_neu = 0.5: unknown key; accepted: enabled"),
     ({"p_new": 2}, "clapping.p_new = 2: accepted: less than or equal to 1"),
     ({"gradients": {"delta": "int5"}}, "unknown codec; accepted: none, int8"),
     ({"in_flight": -1}, "clapping.in_flight = -1: accepted: 'auto', or a whole number"),
     ({"in_flight": 5}, "clapping.in_flight = 5: accepted: 'auto', or 0 to 4, the number of micro-batches"),
     ({"links": {"ladder": ["int8", "int5"]}}, "clapping.links.ladder.1 = {'name': 'int5'}: unknown codec"),
     ({"links": {"read": "/nowhere"}}, "clapping.links.read = '/nowhere': [Errno 2]"),
     ({"gradients": {"delta": "topk", "min_numel": 8}}, "accepted: a block of at most min_numel")],
)  # fmt: skip
def test_a_wrong_block_is_one_error_on_every_rank(two_ranks, block, message):
    assert_same_error(two_ranks.outcomes(models.make_engine_only, block), "ValueError", message)


def test_one_stage_is_refused(two_ranks):
    outcomes = two_ranks.outcomes(models.make_engine_only, {"p_new": 0.5}, 1)
    assert_same_error(outcomes, "ValueError", "num_stages=1): there is no link to compress")
    two_ranks.run(models.make_engine_only, {"enabled": False}, 1)


def test_dual_pipe_v_is_refused(two_ranks):
    outcomes = two_ranks.outcomes(models.make_dual_pipe_v, {"p_new": 0.5})
    assert_same_error(outcomes, "ValueError", "DualPipeVModule: accepted: a PipelineModule")


def ends_in_mid_step(ending_ranks):
    engine = models.make_engine(INT2 | {"refresh": "cycle"})
    data = list(islice(models.batches(), 40))
    ends = engine.global_rank in ending_ranks
    iterator = iter(data[:5] if ends else data)
    losses = [float(engine.train_batch(data_iter=iterator))]
    weights = [p.detach().clone() for p in engine.module.parameters()]
    try:
        engine.train_batch(data_iter=iterator)
    except StopIteration as error:
        message = str(error)
    assert all(torch.equal(a, b) for a, b in zip(weights, engine.module.parameters(), strict=True))
    rest = iter(data[5:]) if ends else iterator
    losses += [float(engine.train_batch(data_iter=rest)) for _ in range(2)]
    return message, losses, models.memories(engine)


def without_end():
    engine = models.make_engine(INT2 | {"refresh": "cycle"})
    return models.train(engine, 3)


@pytest.mark.parametrize("ending_ranks", [(0,), (1,), (0, 1)])
def test_an_iterator_that_ends_in_mid_step_stops_every_rank_and_loses_nothing(two_ranks, ending_ranks):
    (message, losses, one), (also, _, other) = two_ranks.run(ends_in_mid_step, ending_ranks)
    assert message == also
    assert "data_iter ended in step 1, which needs 2 new micro-batches" in message
    assert losses == two_ranks.run(without_end)[0]
    assert one == other


def test_an_iterator_that_ends_stops_four_stages(four_ranks):
    assert_same_error(
        four_ranks.outcomes(models.train_on_too_little), "StopIteration", "data_iter ended in step 0"
    )
