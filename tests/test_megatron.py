"""The Megatron-Core engine, in the real schedules on real ranks: bit-identical where nothing is compressed,
the DeepSpeed engine's losses where something is, equal memories, and one clear error where input is bad."""

import json
import subprocess
import sys

import pytest
import torch
from megatron.core import dist_checkpointing

from clapping_ds.engines.megatron import MegatronPipeline
from tests import megatron_cpu, models
from tests.cluster import RankError, free_groups


def both(delta, key=None):
    direction = {"delta": delta} if key is None else {"delta": delta, "key": key}
    return {"activations": direction, "gradients": direction}


NONE = {"strategy": "fu", "p_new": 1, **both("none")}
LAZY_NONE = {"strategy": "fu", "refresh": "slot", **both("none")}
BLOCKS = {
    "fc int2": {"strategy": "fc", "refresh": "slot", **both("int2")},
    "int8 key + int2 delta": {"strategy": "fu", "refresh": "slot", **both("int2", "int8")},
    "direct int4": {"strategy": "direct", **both("int4")},
}
LENGTHS = {"lengths": (64, 48, 32)}
UNBATCHED = {"batch_p2p_comm": False}
OVERLAP = {**UNBATCHED, "overlap_p2p_comm": True}
FLUSH = {**OVERLAP, "overlap_p2p_comm_warmup_flush": True}
FREED = {"deallocate_pipeline_outputs": True}


def runs(settings, num_ranks, steps=4):
    """Losses and memories of one training run per (block, options)."""
    found = []
    for block, options in settings:
        found.append(megatron_cpu.train(block, num_ranks, steps=steps, **options))
        free_groups()
    return found


def losses_of(cluster, settings, steps=4):
    """Losses per setting: those of the rank that has the last stage."""
    return [losses for losses, _ in cluster.run(runs, settings, len(cluster.pipes), steps)[-1]]


def assert_finite_and_falling(losses):
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < losses[0]


# Stock Megatron-Core exchanges the messages of two links on gloo if two ranks have several chunks and its
# sends are batched, or tell shapes; so there the reference is the same layers on four stock ranks.


@pytest.mark.parametrize(
    "ours", [{}, UNBATCHED, FREED, LENGTHS], ids=["1F1B", "unbatched", "freed", "lengths"]
)
def test_two_ranks_equal_stock(two_ranks, ours):
    compressed = (BLOCKS["fc int2"], ours)
    stock, none, int2 = losses_of(two_ranks, [(None, {**ours}), (NONE, ours), compressed])
    assert_finite_and_falling(stock)
    assert none == stock
    assert int2 != stock


@pytest.mark.parametrize("lengths", [{}, LENGTHS], ids=["one length", "lengths"])
def test_two_ranks_of_two_chunks_equal_four_stock_ranks(two_ranks, four_ranks, lengths):
    schedules = [{}, UNBATCHED, FREED, OVERLAP, FLUSH, {**FLUSH, **FREED}]
    stock = losses_of(four_ranks, [(None, lengths)])[0]
    assert_finite_and_falling(stock)
    settings = [(NONE, {"num_chunks": 2, **lengths, **schedule}) for schedule in schedules]
    assert losses_of(two_ranks, settings) == [stock] * len(settings)


@pytest.mark.parametrize("schedule", [OVERLAP, FLUSH], ids=["overlap", "flush"])
def test_two_ranks_of_two_chunks_equal_stock(two_ranks, schedule):
    options = {"num_chunks": 2, **schedule}
    stock, none = losses_of(two_ranks, [(None, options), (NONE, options)])
    assert_finite_and_falling(stock)
    assert none == stock


FOUR_RANKS = {
    "1F1B": {},
    "1F1B, lengths": LENGTHS,
    "interleaved": {"num_chunks": 2},
    "interleaved, overlap, flush": {"num_chunks": 2, **FLUSH},
}


@pytest.mark.parametrize("case", FOUR_RANKS)
def test_four_ranks_equal_stock(four_ranks, case):
    options = FOUR_RANKS[case]
    stock, none, int2 = losses_of(
        four_ranks, [(None, options), (NONE, options), (BLOCKS["fc int2"], options)]
    )
    assert_finite_and_falling(stock)
    assert none == stock
    assert int2 != stock


def test_four_ranks_of_two_chunks_equal_stock_with_lengths(four_ranks):
    # Stock interleaved schedules hang on gloo when they tell shapes, so the reference is 1F1B.
    settings = [
        (None, LENGTHS),
        (NONE, {"num_chunks": 2, **LENGTHS}),
        (NONE, {"num_chunks": 2, **FLUSH, **LENGTHS}),
    ]
    stock, none, overlapped = losses_of(four_ranks, settings)
    assert none == overlapped == stock


def test_many_micro_batches_of_a_chunk_may_wait_for_its_turn(two_ranks):
    options = {"num_chunks": 2, "num_micro_batches": 16}
    deep = {**options, **FLUSH, "microbatch_group_size_per_vp_stage": 16}
    shallow, ours = losses_of(two_ranks, [(NONE, options), (NONE, deep)], steps=2)
    assert ours == shallow


def test_sends_that_block_and_memory_elsewhere_change_nothing(two_ranks):
    block = BLOCKS["fc int2"]
    blocking = {**block, "overlap": False}
    for options in ({}, UNBATCHED, {"num_chunks": 2, **OVERLAP}):
        first, second = two_ranks.run(runs, [(block, options), (blocking, options)], 2)[-1]
        assert first == second


# The same mathematics through two hosts


def deepspeed_losses(num_stages, blocks):
    found = []
    for block in blocks:
        engine = models.make_engine(block, num_stages, ds={"gradient_clipping": 0.0})
        found.append(models.train(engine, 6))
        del engine
        free_groups()
    return found


def test_losses_are_the_deepspeed_engines(two_ranks, four_ranks):
    """Equal to the last digit: each layer's operations are the same, micro-batches are added up in the same
    order in both hosts, and the codecs draw from the same seeds. Only the mean over micro-batches is taken
    elsewhere: by DeepSpeed in fp32, of 4 values, so 3 roundings of half a unit in the last place each."""
    blocks = list(BLOCKS.values())
    for cluster, num_stages, options in (
        (two_ranks, 2, {}),
        (four_ranks, 4, {}),
        (two_ranks, 4, {"num_chunks": 2}),
    ):
        theirs = (four_ranks if num_stages == 4 else two_ranks).run(deepspeed_losses, num_stages, blocks)[-1]
        ours = losses_of(cluster, [(block, options) for block in blocks], steps=6)
        rounding = 3 * 2.0**-24
        assert ours == [pytest.approx(losses, rel=rounding, abs=0) for losses in theirs]


def assert_memories_are_equal(found):
    """found: by rank, the memories by channel. Every channel has two ends, on one rank or on two."""
    ends = {}
    for memories in found:
        for channel, held in memories.items():
            ends.setdefault(channel, []).extend(held)
    assert ends
    for one, other in ends.values():
        assert one == other


@pytest.mark.parametrize(
    "options", [{}, LENGTHS, {"num_chunks": 2, **FLUSH}], ids=["1F1B", "lengths", "2 chunks"]
)
def test_memories_are_equal_at_both_ends_after_50_steps(two_ranks, options):
    settings = [(block, options) for block in BLOCKS.values()]
    found = two_ranks.run(runs, settings, 2, 50)
    for number, name in enumerate(BLOCKS):
        memories = [runs_of_rank[number][1] for runs_of_rank in found]
        assert_memories_are_equal(memories)
        holds = any(tensors for held in memories[0].values() for slots in held for tensors in slots.values())
        assert holds == (name != "direct int4")


def test_memories_are_equal_on_four_ranks(four_ranks):
    options = {"num_chunks": 2}
    for block in BLOCKS.values():
        assert_memories_are_equal([found[0][1] for found in four_ranks.run(runs, [(block, options)], 4, 10)])


# Sampling, evaluation, state


def evaluated(num_chunks):
    with megatron_cpu.parallel(2, num_chunks):
        trainer = megatron_cpu.Trainer(BLOCKS["fc int2"], num_chunks, **(OVERLAP if num_chunks > 1 else {}))
        stock = megatron_cpu.Trainer(None, num_chunks, **(OVERLAP if num_chunks > 1 else {}))
        first = trainer.evaluate(), stock.evaluate()
        trainer.step()
        before = megatron_cpu.memories(trainer.pipeline)
        trainer.num_micro_batches = 8
        trainer.evaluate()
        return first, before == megatron_cpu.memories(trainer.pipeline), trainer.pipeline.fresh_samples


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_evaluation_is_stock_and_touches_no_memory(two_ranks, num_chunks):
    for (ours, stock), untouched, fresh_samples in two_ranks.run(evaluated, num_chunks):
        assert ours == stock
        assert untouched
        assert fresh_samples == 4 * models.LENGTH


def drawn_batches(block):
    with megatron_cpu.parallel(2):
        trainer = megatron_cpu.Trainer(block)
        for _ in range(20):
            trainer.step()
        sampler = trainer.pipeline.chunks.stages[0].sampler
        return sampler.num_drawn, trainer.pipeline.consumed_samples


def test_consumed_samples_are_the_fresh_ones(two_ranks):
    # The schedule is told LENGTH as its micro-batch size, see megatron_cpu.Trainer.
    found = two_ranks.run(drawn_batches, LAZY_NONE)
    assert found[0] == found[1]
    num_drawn, consumed = found[0]
    assert 4 < num_drawn < 80
    assert consumed == num_drawn * models.LENGTH


def interrupted(folder, sharded):
    """Losses and what is held after 3 more steps: uninterrupted, and resumed from what was saved."""
    rank = torch.distributed.get_rank()
    found = []
    with megatron_cpu.parallel(2, 2):
        for resumes in (False, True):
            trainer = megatron_cpu.Trainer(BLOCKS["int8 key + int2 delta"], 2, **OVERLAP)
            pipeline, file = trainer.pipeline, f"{folder}/{rank}.pt"
            if resumes:
                model, optimizer, state = torch.load(file, weights_only=False)
                if sharded:
                    (state,) = dist_checkpointing.load(pipeline.sharded_state_dict(), folder).values()
                trainer.model.load_state_dict(model)
                trainer.optimizer.load_state_dict(optimizer)
                pipeline.load_state_dict(state)
                for data in filter(None, trainer.data):
                    for _ in range(pipeline.consumed_samples // models.LENGTH):
                        next(data)
            else:
                for _ in range(4):
                    trainer.step()
                saved = trainer.model.state_dict(), trainer.optimizer.state_dict(), pipeline.state_dict()
                if sharded:
                    dist_checkpointing.save(pipeline.sharded_state_dict(), folder)
                torch.save(saved, file)
            losses = [trainer.step() for _ in range(3)]
            found.append((losses, megatron_cpu.memories(pipeline), pipeline.consumed_samples))
    return found


@pytest.mark.parametrize("sharded", [False, True], ids=["state_dict", "sharded_state_dict"])
def test_a_resumed_run_is_the_uninterrupted_one(two_ranks, tmp_path, sharded):
    for uninterrupted, resumed in two_ranks.run(interrupted, str(tmp_path), sharded):
        assert uninterrupted == resumed


def figures():
    with megatron_cpu.parallel(2, 2):
        trainer = megatron_cpu.Trainer(BLOCKS["fc int2"], 2)
        trainer.pipeline.measures_error = True
        trainer.step()
        return trainer.pipeline.clapping_report(), trainer.pipeline.clapping_traffic()


def test_the_report_has_a_row_per_channel(two_ranks):
    (rows, first), (again, second) = two_ranks.run(figures)
    assert rows == again
    links = ["0-1", "1-2", "2-3"]
    assert sorted((row["link"], row["direction"]) for row in rows) == [
        (link, direction) for link in links for direction in ("activations", "gradients")
    ]
    assert all(row["relative_error"] > 0 and row["ratio"] > 15 for row in rows)
    assert first.num_messages == second.num_messages == 6 * 4


# Bad input


def train_with(block, change):
    num_chunks = 2
    with megatron_cpu.parallel(2, num_chunks):
        rank = torch.distributed.get_rank()
        if isinstance(block, list):
            block = block[rank]
        options = {**OVERLAP, **(LENGTHS if change == "lengths" else {})}
        trainer = megatron_cpu.Trainer(block, num_chunks, **options)
        if change == "one iterator":
            trainer.data = trainer.data[:1]
        if change == "same iterator" and rank == 0:
            trainer.data = [trainer.data[0]] * 2
        if change == "ends" and rank == 1:
            trainer.data = [None, iter([next(trainer.data[1]) for _ in range(5)])]
        if change == "adjusts":
            run = trainer.run
            trainer.run = lambda **options: run(**options, adjust_tensor_shapes_fn=max)
        if change == "communicator":
            run = trainer.run
            trainer.run = lambda **options: run(**options, p2p_communicator="mine")
        return [trainer.step() for _ in range(20)]


BAD_INPUT = {
    "key": ({"p_neu": 1}, None, "clapping.p_neu = 1: unknown key"),
    "one rank": ([{"p_new": 0.5}, {"p_new": 5}], None, "rank 1: clapping.p_new = 5"),
    "another": ([{"seed": 1}, {"seed": 2}], None, "rank 1 has the configuration"),
    "in_flight": ({"in_flight": 2}, None, "clapping.in_flight = 2 with Megatron-Core"),
    "links": ({"links": "auto"}, None, "clapping.links with Megatron-Core"),
    "blocking": ({"overlap": False}, "lengths", "clapping.overlap = false with variable_seq_lengths"),
    "one iterator": ({}, "one iterator", "1 data iterators with 2 model chunks"),
    "same iterator": ({}, "same iterator", "rank 0: data_iterator: the same object for several"),
    "adjusts": ({}, "adjusts", "adjust_tensor_shapes_fn"),
    "communicator": ({}, "communicator", "p2p_communicator = 'mine'"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_error_on_every_rank(two_ranks, case):
    block, change, message = BAD_INPUT[case]
    outcomes = two_ranks.outcomes(train_with, block, change)
    assert [type(outcome) for outcome in outcomes] == [RankError] * 2
    assert {outcome.kind for outcome in outcomes} == {"ValueError"}
    assert all(message in outcome.message for outcome in outcomes)


def test_an_iterator_that_ends_stops_every_rank(two_ranks):
    outcomes = two_ranks.outcomes(train_with, {"p_new": 0.5}, "ends")
    assert {outcome.kind for outcome in outcomes} == {"StopIteration"}


def from_source(source):
    with megatron_cpu.parallel(2):
        return MegatronPipeline(source, megatron_cpu.model_config(2)).config.strategy


def test_the_configuration_may_be_a_file(two_ranks, tmp_path):
    file = tmp_path / "clapping.json"
    file.write_text(json.dumps({"clapping": {"strategy": "fc"}}))
    assert two_ranks.run(from_source, str(file)) == ["fc", "fc"]
    file.write_text("{}")
    for source, message in ((file, 'no "clapping" block'), (tmp_path / "none.json", "No such file")):
        for outcome in two_ranks.outcomes(from_source, source):
            assert outcome.kind == "ValueError" and message in outcome.message


def disabled():
    with megatron_cpu.parallel(2):
        trainer = megatron_cpu.Trainer({"enabled": False})
        trainer.step()
        state = trainer.pipeline.state_dict()
        trainer.pipeline.load_state_dict(state)
        return trainer.run.__module__, trainer.pipeline.clapping_report()


def test_disabled_is_the_stock_schedule(two_ranks):
    assert two_ranks.run(disabled) == [("megatron.core.pipeline_parallel.schedules", [])] * 2


def test_without_megatron_only_its_engine_raises():
    code = (
        "import sys; sys.modules['megatron'] = None; import clapping_ds\n"
        "try: import clapping_ds.engines.megatron\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs Megatron-Core" in done.stdout
    assert "tested: megatron-core 0.16.1" in done.stdout


# The example


def trained_gpt(block, sizes):
    from launch.pretrain_gpt_megatron import MegatronRun, start_parallel, train

    run = MegatronRun(
        steps=8, warmup_steps=2, eval_interval=4, eval_batches=1, dtype="float32", clip_grad=0.0, **sizes
    )
    with megatron_cpu.on_cpu():
        start_parallel(run)
        try:
            return train(run, block and {"clapping": block})
        finally:
            megatron_cpu.parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_gpt_trains_on_the_corpus(two_ranks, chunks):
    found = {
        name: two_ranks.run(trained_gpt, block, {"chunks": chunks})
        for name, block in {"stock": None, "none": NONE, "direct": BLOCKS["direct int4"]}.items()
    }
    for first, second in found.values():
        assert first.validations == second.validations
        assert_finite_and_falling([loss for _, loss, _ in first.validations])
        assert_finite_and_falling(first.train_losses)
    stock, none, direct = (results[0] for results in found.values())
    assert none.train_losses == stock.train_losses
    assert [loss for _, loss, _ in none.validations] == [loss for _, loss, _ in stock.validations]
    assert direct.train_losses != stock.train_losses
    assert len(direct.report) == 2 * (2 * chunks - 1)


def gpt_memories(block):
    from launch.pretrain_gpt_megatron import MegatronRun, Trainer, start_parallel

    run = MegatronRun(dtype="float32", clip_grad=0.0, tensor_size=2)
    with megatron_cpu.on_cpu():
        start_parallel(run)
        try:
            trainer = Trainer(run, block and {"clapping": block})
            losses = [trainer.step() for _ in range(3)]
            return losses, megatron_cpu.memories(trainer.pipeline) if trainer.pipeline else {}
        finally:
            megatron_cpu.parallel_state.destroy_model_parallel()


def test_tensor_parallel_ranks_compress_alike(four_ranks):
    """Ranks 0 and 1 are the first stage, 2 and 3 the second. The two ranks of a stage hold the same
    activations, and must do so after a codec that draws random signs."""
    eden = {"strategy": "fc", "refresh": "slot", **both("eden3")}
    stock, none, found = (four_ranks.run(gpt_memories, block) for block in (None, NONE, eden))
    assert none[0][0] == stock[0][0]
    assert_finite_and_falling(found[0][0])
    memories = [memories_of_rank for _, memories_of_rank in found]
    assert memories[0] == memories[1] == memories[2] == memories[3]


def parts_of_sequences(block):
    with megatron_cpu.parallel(2, tensor_model_parallel_size=2):
        trainer = megatron_cpu.Trainer(block, sequence_parallel=True, tensor_model_parallel_size=2)
        losses = [trainer.step() for _ in range(3)]
        return losses, megatron_cpu.memories(trainer.pipeline) if trainer.pipeline else {}


def test_with_sequence_parallelism_each_rank_sends_its_part(four_ranks):
    """With layers that need no other rank's part: Megatron-Core's norms need apex for it."""
    stock, none, found = (
        four_ranks.run(parts_of_sequences, block) for block in (None, NONE, BLOCKS["fc int2"])
    )
    assert [losses for losses, _ in none] == [losses for losses, _ in stock]
    assert_finite_and_falling(found[-1][0])
    memories = [memories_of_rank for _, memories_of_rank in found]
    assert memories[0] == memories[2] != memories[1] == memories[3]
