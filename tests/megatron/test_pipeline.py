"""The Megatron-Core engine, in the real schedules on real ranks: bit-identical where nothing is compressed,
the DeepSpeed engine's losses where something is, equal memories, and one clear error where input is bad."""

import json
import subprocess
import sys

import pytest
import torch

from tests import models
from tests.cluster import assert_same_error
from tests.megatron import runs
from tests.megatron.runs import BLOCKS, CHUNKS, FLUSH, FREED, INT2, LENGTHS, NONE, OVERLAP, UNBATCHED
from tests.models import PLACES, POOL


def assert_finite_and_falling(losses):
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < losses[0]


def assert_memories_are_equal(found):
    """found: by rank, the memories by channel. Every channel has two ends, on one rank or on two."""
    ends = {}
    for memories in found:
        for channel, held in memories.items():
            ends.setdefault(channel, []).extend(held)
    assert ends
    for one, other in ends.values():
        assert one == other


def holds_memory(memories):
    return any(tensors for held in memories.values() for slots in held for tensors in slots.values())


# As stock
#
# The layers have the same weights however they are cut, so one loss is right for all schedules. Stock
# interleaved schedules are left out where they fail on gloo: two ranks with several chunks exchange the
# messages of two links if sends are batched, and four hang when shapes are told.

AS_STOCK = {
    "2 ranks": ([{}, FREED, FLUSH], [{}, UNBATCHED, FREED, CHUNKS, {**CHUNKS, **UNBATCHED}, OVERLAP]),
    "2 ranks, lengths": ([LENGTHS], [LENGTHS, {**CHUNKS, **LENGTHS}, {**FLUSH, **LENGTHS}]),
    "4 ranks": ([{}, CHUNKS, FLUSH], [{}, CHUNKS, {**FLUSH, **FREED}]),
    "4 ranks, lengths": ([LENGTHS], [LENGTHS, {**CHUNKS, **LENGTHS}, {**FLUSH, **LENGTHS}]),
}


@pytest.mark.parametrize("case", AS_STOCK)
def test_without_compression_losses_are_those_of_the_stock_communicator(request, case):
    num_ranks = int(case[0])
    cluster = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks])
    stock, ours = AS_STOCK[case]
    settings = [*((None, options) for options in stock), *((NONE, options) for options in ours)]
    if case == "2 ranks":
        settings += [({**NONE, "overlap": False}, OVERLAP), ({**NONE, "verify": True}, {**FLUSH, **FREED})]
    losses = [losses for losses, _ in cluster.run(runs.runs, settings, num_ranks)[-1]]
    assert_finite_and_falling(losses[0])
    assert losses == [losses[0]] * len(settings)


def test_many_micro_batches_of_a_chunk_may_wait_for_its_turn(two_ranks):
    options = {**CHUNKS, "num_micro_batches": 8}
    deep = {**FLUSH, "num_micro_batches": 8, "microbatch_group_size_per_vp_stage": 8}
    found = two_ranks.run(runs.runs, [(NONE, options), (NONE, deep)], 2, 2)
    (shallow, _), (ours, _) = found[-1]
    assert ours == shallow


# As the DeepSpeed engine

ROUNDING = 3 * 2.0**-24
"""Each layer's operations are the same, micro-batches are added up in the same order in both hosts, and the
codecs draw from the same seeds. Only the mean over the 4 micro-batches is taken elsewhere: by DeepSpeed in
fp32, with 3 roundings of half a unit in the last place each."""


def assert_losses_are_deepspeeds(deepspeed_ranks, our_ranks, num_stages, blocks, options):
    theirs = deepspeed_ranks.run(runs.deepspeed_losses, num_stages, blocks, 5)[-1]
    found = [
        our_ranks.run(runs.runs, [(block, its) for block in blocks], len(our_ranks.pipes), 5)
        for its in options
    ]
    for by_rank in found:
        ours = [losses for losses, _ in by_rank[-1]]
        assert ours == [pytest.approx(losses, rel=ROUNDING, abs=0) for losses in theirs]
        for number, block in enumerate(blocks):
            memories = [runs_of_rank[number][1] for runs_of_rank in by_rank]
            assert_memories_are_equal(memories)
            assert holds_memory(memories[0]) == (block["strategy"] != "direct")


def test_losses_of_two_stages_are_the_deepspeed_engines(two_ranks):
    assert_losses_are_deepspeeds(two_ranks, two_ranks, 2, list(BLOCKS.values()), [{}])


@pytest.mark.parametrize(("ranks", "options"), [("two_ranks", FLUSH), ("four_ranks", {})])
def test_losses_of_four_stages_are_the_deepspeed_engines(request, four_ranks, ranks, options):
    assert_losses_are_deepspeeds(
        four_ranks, request.getfixturevalue(ranks), 4, list(BLOCKS.values()), [options]
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_memories_are_equal_at_both_ends_after_50_steps(two_ranks, name):
    options = [{}, {**FLUSH, **LENGTHS}] if name == "fc int2" else [{}]
    found = two_ranks.run(runs.runs, [(BLOCKS[name], its) for its in options], 2, 50)
    for runs_of_ranks in zip(*found, strict=True):
        memories = [memories for _, memories in runs_of_ranks]
        assert_memories_are_equal(memories)
        assert holds_memory(memories[0]) == (name != "direct int4")
        assert_finite_and_falling(runs_of_ranks[-1][0])


def test_memories_of_gradients_follow_the_loss_scale(two_ranks):
    """Equal to the last digit: multiplying by powers of two commutes with every rounding of the codec."""
    block = {"strategy": "fc", "lazy": {"p_new": 0.1, "refresh": "slot"}, **runs.both("int8")}
    constant, changing = (
        two_ranks.run(runs.scaled, block, scales) for scales in ([1.0] * 6, [1, 1, 1024, 8, 0.5, 64])
    )
    assert constant == changing
    assert_memories_are_equal([memories for _, memories in changing])


# Sampling, evaluation, state


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_evaluation_is_stock_and_touches_no_memory(two_ranks, num_chunks):
    for (ours, stock), untouched, fresh_samples in two_ranks.run(runs.evaluated, num_chunks):
        assert ours == stock
        assert untouched
        assert fresh_samples == 4 * models.LENGTH


def test_consumed_samples_are_the_fresh_ones(two_ranks):
    # The schedule is told LENGTH as its micro-batch size, see megatron_cpu.Trainer.
    found = two_ranks.run(runs.drawn_batches, runs.LAZY_NONE)
    assert found[0] == found[1]
    num_drawn, consumed = found[0]
    assert 4 < num_drawn < 80
    assert consumed == num_drawn * models.LENGTH


def test_micro_batches_of_another_size_are_all_fresh(two_ranks):
    outcomes = two_ranks.run(runs.resized, 32)
    for (first, other, same), _ in outcomes:
        assert all(first) and all(other) and not all(same)
    assert_memories_are_equal([memories for _, memories in outcomes])
    (_, other, _), _ = two_ranks.run(runs.resized, models.LENGTH)[0]
    assert not all(other)


def test_consumed_samples_are_those_of_all_replicas(four_ranks):
    for drawn, kept, why in four_ranks.run(runs.counted_with_other_replicas):
        assert kept == drawn == 2 * 4 * models.LENGTH
        assert why is not None


def test_each_step_may_have_iterators_of_its_own(two_ranks):
    for anew, single in two_ranks.run(runs.with_data_of_each_step):
        assert anew == single


def test_a_resumed_run_is_the_uninterrupted_one(two_ranks, tmp_path):
    block = {**POOL, "memory": PLACES["disk"]}
    for uninterrupted, from_file, sharded in two_ranks.run(runs.interrupted, block, str(tmp_path)):
        assert uninterrupted == from_file == sharded


@pytest.mark.parametrize(
    ("change", "reason"),
    [("missing", "no state of clapping_ds for every rank"),
     ("a chunk", "no state of clapping_ds for every rank"),
     ("seed", "of another configuration")],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_said_to_and_all_is_fresh(two_ranks, change, reason):
    for why, fresh, count in two_ranks.run(runs.misfit, change):
        assert reason in why
        assert fresh == [[True] * 4] * 2
        assert count == 4 * models.LENGTH


def test_the_report_has_a_row_per_channel(two_ranks):
    (rows, first), (again, second) = two_ranks.run(runs.figures)
    assert rows == again
    links = ["0-1", "1-2", "2-3"]
    assert sorted((row["link"], row["direction"]) for row in rows) == [
        (link, direction) for link in links for direction in ("activations", "gradients")
    ]
    assert all(row["relative_error"] > 0 and row["ratio"] > 15 for row in rows)
    assert first.num_messages == second.num_messages == 6 * 4


# Bad input

LAZY = [{"strategy": "fc", "lazy": {"p_new": p_new}} for p_new in (0.5, 5)]
BAD_INPUT = {
    "key": ({"p_neu": 1}, None, "clapping.p_neu = 1: unknown key"),
    "one rank": (LAZY, None, "less than or equal to 1 (rank 1)"),
    "another": ([{"seed": 1}, {"seed": 2}], None, "clapping.seed: 1 (rank 0); 2 (rank 1)"),
    "in_flight": ({"in_flight": 2}, None, "clapping.in_flight = 2 with Megatron-Core"),
    "links": ({"links": "auto"}, None, "clapping.links = 'auto' with Megatron-Core"),
    "blocking": ({"overlap": False}, "lengths", "clapping.overlap = false with variable_seq_lengths"),
    "one iterator": ({}, "one iterator", "1 data iterators with 2 model chunks"),
    "same iterator": ({}, "same iterator", "the same object for several model chunks; accepted: an"),
    "micro-batches": ({}, "micro-batches", "num_microbatches: 4 (rank 0); 8 (rank 1)"),
    "loss scale": ({}, "loss scale", "has a grad_scale_func: False (rank 0); True (rank 1)"),
    "adjusts": ({}, "adjusts", "adjust_tensor_shapes_fn"),
    "communicator": ({}, "communicator", "p2p_communicator = 'mine'"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_error_on_every_rank(two_ranks, case):
    block, change, message = BAD_INPUT[case]
    assert_same_error(two_ranks.outcomes(runs.train_with, block, change), "ValueError", message)


def test_a_step_whose_data_ended_can_be_tried_again(two_ranks):
    for (losses, none), (again, num_ends) in zip(
        *(two_ranks.run(runs.tried_again, interrupts) for interrupts in (False, True)), strict=True
    ):
        assert (none, num_ends) == (0, 1)
        assert again == losses


def test_the_configuration_may_be_a_file(two_ranks, tmp_path):
    file, broken = tmp_path / "clapping.json", tmp_path / "broken.json"
    file.write_text(json.dumps({"clapping": {"strategy": "fc"}}))
    assert two_ranks.run(runs.from_source, str(file)) == [(True, "fc")] * 2
    file.write_text('{"other": 1}')
    assert two_ranks.run(runs.from_source, str(file)) == [(False, "direct")] * 2, "no block: stock"
    file.write_text("[]")
    broken.write_text("{")
    missing = tmp_path / "missing"
    for source, message in (
        (file, "is no JSON object; accepted"), (broken, "broken.json is no JSON"), (missing, "No such file"),
    ):  # fmt: skip
        assert_same_error(two_ranks.outcomes(runs.from_source, source), "ValueError", message)


def test_disabled_is_the_stock_schedule(two_ranks):
    assert two_ranks.run(runs.disabled) == [("megatron.core.pipeline_parallel.schedules", [])] * 2


def test_without_megatron_only_its_engine_raises():
    code = (
        "import sys; sys.modules['megatron'] = None; import clapping_ds\n"
        "try: import clapping_ds.hosts.megatron.pipeline\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs Megatron-Core" in done.stdout
    assert "tested: megatron-core 0.16.1" in done.stdout


# The example


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_gpt_trains_on_the_corpus(two_ranks, chunks):
    blocks = [None, NONE, BLOCKS["direct int4"]]
    by_rank = two_ranks.run(runs.trained_gpt, blocks, {"chunks": chunks}, 8)
    for first, second in zip(*by_rank, strict=True):
        assert first.validations == second.validations
        assert_finite_and_falling([loss for _, loss, _ in first.validations])
        assert_finite_and_falling(first.train_losses)
    stock, none, direct = by_rank[0]
    assert none.train_losses == stock.train_losses
    assert [loss for _, loss, _ in none.validations] == [loss for _, loss, _ in stock.validations]
    assert direct.train_losses != stock.train_losses
    assert len(direct.report) == 2 * (2 * chunks - 1)


def test_tensor_parallel_ranks_compress_alike(four_ranks):
    """Ranks 0 and 1 are the first stage, 2 and 3 the second. The two ranks of a stage hold the same
    activations, and must do so after a codec that draws random signs."""
    eden = {"strategy": "fc", "lazy": {"refresh": "slot"}, **runs.both("eden3")}
    by_rank = four_ranks.run(runs.tensor_parallel_gpt, [None, NONE, eden])
    (stock, _), (none, _), (losses, _) = by_rank[0]
    assert none == stock
    assert_finite_and_falling(losses)
    memories = [runs_of_rank[-1][1] for runs_of_rank in by_rank]
    assert memories[0] == memories[1] == memories[2] == memories[3]
    assert holds_memory(memories[0])


def test_with_sequence_parallelism_each_rank_sends_its_part(four_ranks):
    """With layers that need no other rank's part: Megatron-Core's norms need apex for it."""
    by_rank = four_ranks.run(runs.parts_of_sequences, [None, NONE, INT2])
    for (stock, _), (none, _), _ in by_rank:
        assert none == stock
    assert_finite_and_falling(by_rank[-1][-1][0])
    memories = [runs_of_rank[-1][1] for runs_of_rank in by_rank]
    assert memories[0] == memories[2] != memories[1] == memories[3]


# Last: it leaves ranks that are not to be used again


def test_a_peer_that_stalls_is_named(two_ranks):
    timeout_s = 1.0
    message, took_s = two_ranks.run(runs.stalled, timeout_s, LENGTHS)[0]
    assert message.startswith("link 0-1, ")
    assert ", step 1, slot " in message
    assert "rank 1 ended or was silent for too long" in message
    assert took_s < timeout_s * 3
