"""What goes wrong ends in one clear error on every rank that is left, in bounded time; nothing is lost."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from clapping_ds.stage.endpoint import ACTIVATIONS_FROM_PREVIOUS
from tests import models
from tests.cluster import RankError, assert_same_error
from tests.models import INT2, NONE

TIMEOUT_S = 4.0


# Handshake


def with_block_of(blocks, ds=None):
    rank = torch.distributed.get_rank()
    models.make_engine(blocks[rank], ds=None if ds is None else ds[rank])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [([{"seed": 1}, {"seed": 2}], "clapping.seed: 1 (rank 0); 2 (rank 1)"),
     ([{"strategy": "fc", "lazy": {"p_new": p_new}} for p_new in (0.5, 0.25)],
      "clapping.lazy.p_new: 0.5 (rank 0); 0.25 (rank 1)"),
     ([{"activations": {"codec": codec}} for codec in ("int4", "int2")],
      "activations.codec.name: 'int4' (rank 0); 'int2' (rank 1)"),
     ([{}, None], "clapping.enabled: True (rank 0); False (rank 1)"),
     ([{}, {"p_neu": 1}], "clapping.p_neu = 1: unknown key"),
     ([{"strategy": "fu", "lazy": {"p_new": 7}}, {"p_neu": 1}], "less than or equal to 1 (rank 0)")],
)  # fmt: skip
def test_ranks_that_differ_are_told_so_on_every_rank(two_ranks, blocks, message):
    assert_same_error(two_ranks.outcomes(with_block_of, blocks), "ValueError", message)


def test_micro_batches_that_differ_are_told_so(two_ranks):
    ds = [{"gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": 8}]
    outcomes = two_ranks.outcomes(with_block_of, [{}, {}], ds)
    assert_same_error(outcomes, "ValueError", "gradient_accumulation_steps: 4 (rank 0); 8 (rank 1)")


def with_another_version():
    from clapping_ds.stage import handshake

    original = handshake.__version__
    handshake.__version__ = f"0.{torch.distributed.get_rank()}"
    try:
        models.make_engine({})
    finally:
        handshake.__version__ = original


def test_versions_that_differ_are_told_so(two_ranks):
    outcomes = two_ranks.outcomes(with_another_version)
    assert_same_error(outcomes, "ValueError", "version of clapping_ds: '0.0' (rank 0); '0.1' (rank 1)")


# Verification


def verified(block):
    engine = models.make_engine(block)
    losses = models.train(engine, 4)
    return losses, models.memories(engine)


def test_verification_changes_no_loss(two_ranks):
    assert two_ranks.run(verified, {**INT2, "verify": True}) == two_ranks.run(verified, INT2)


# Faults that end a rank, or stop it: ranks of their own


def spoiled(spoil, block, folder):
    """Trains two steps and saves; then something happens on one rank; then one more step, timed."""
    engine = models.make_engine({**INT2, "timeout_s": TIMEOUT_S, **block}, engine_stages(), ds=AT_ONCE)
    data = models.batches()
    for _ in range(2):
        engine.train_batch(data_iter=data)
    engine.save_checkpoint(folder)
    spoil(engine)
    start = time.perf_counter()
    try:
        engine.train_batch(data_iter=data)
    except (ConnectionError, RuntimeError) as error:
        return type(error).__name__, str(error), time.perf_counter() - start
    return None


AT_ONCE = {"gradient_accumulation_steps": 4}


def engine_stages():
    return torch.distributed.get_world_size()


def change_a_memory(engine):
    if engine.global_rank == 1:
        engine._endpoints.fresh = [False] * 4
        engine._endpoints.coin = engine._endpoints.coin.__class__(1e-9, "slot", 0)
        channel = engine._endpoint.channels[ACTIVATIONS_FROM_PREVIOUS]
        channel.held[2][0].memory[0, 0, 0] += 1
    else:
        engine._endpoints.coin = engine._endpoints.coin.__class__(1e-9, "slot", 0)


def sleep_in_the_forward_pass(engine):
    if engine.global_rank == 1:
        engine.module.forward = _sleeping(engine.module.forward)


def _sleeping(forward):
    def wrapped(*args, **kwargs):
        time.sleep(TIMEOUT_S * 2.5)
        return forward(*args, **kwargs)

    return wrapped


def die_in_the_forward_pass(engine):
    def wrapped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if engine.global_rank == 1:
        engine.module.forward = wrapped


def assert_the_last_checkpoint_is_whole(folder, num_ranks):
    assert (folder / "latest").read_text() == "global_step2"
    assert len(list((folder / "global_step2").glob("clapping_rank_*.pt"))) == num_ranks
    assert not list(folder.rglob("*unfinished*"))


def test_memories_that_differ_are_found_by_verification(fresh_ranks, tmp_path):
    (kind, message, took_s), (other_kind, other, other_took_s) = fresh_ranks(2).run(
        spoiled, change_a_memory, {"verify": True}, str(tmp_path)
    )[::-1]
    assert_the_last_checkpoint_is_whole(tmp_path, 2)
    assert kind == "VerificationError"
    assert "link 0-1, activations, step 2, slot 2: memory: expected " in message
    assert other_kind == "ConnectionError"
    # By what it sends or by what it waits for, whichever meets the closed connection first.
    assert re.match(r"link 0-1, (activations|gradients), step 2, slot \d: ", other)
    assert "rank 1 ended or was silent for too long" in other
    assert max(took_s, other_took_s) < TIMEOUT_S * 2


def test_a_peer_that_stalls_is_named(fresh_ranks, tmp_path):
    ranks = fresh_ranks(2)
    (kind, message, took_s), _ = ranks.outcomes(spoiled, sleep_in_the_forward_pass, {}, str(tmp_path))
    assert_the_last_checkpoint_is_whole(tmp_path, 2)
    assert kind == "ConnectionError"
    assert message.startswith("link 0-1, ")
    assert ", step 2, slot " in message
    assert "rank 1 ended or was silent for too long" in message
    assert took_s < TIMEOUT_S * 2


def test_a_peer_that_dies_is_named_and_no_rank_hangs(fresh_ranks, tmp_path):
    outcomes = fresh_ranks(4).outcomes(spoiled, die_in_the_forward_pass, {}, str(tmp_path))
    assert_the_last_checkpoint_is_whole(tmp_path, 4)
    assert isinstance(outcomes[1], RankError)
    assert outcomes[1].kind == "dead"
    for rank, (kind, message, took_s) in ((rank, outcomes[rank]) for rank in (0, 2)):
        assert kind == "ConnectionError"
        assert f"link {'0-1' if rank == 0 else '1-2'}, " in message
        assert "rank 1 ended or was silent for too long" in message
        assert took_s < TIMEOUT_S * 2
    assert outcomes[3][2] < TIMEOUT_S * 3, "it waits for rank 2, which waited for rank 1"


# Survivors


def survive(folder):
    """Two replicas of two stages; the second rank dies in the third step, the others save and end."""
    engine = models.make_engine({**NONE, "timeout_s": TIMEOUT_S}, num_stages=2)
    data = models.batches(engine.grid.get_data_parallel_id())
    for _ in range(2):
        engine.train_batch(data_iter=data)
    die_in_the_forward_pass(engine)
    try:
        engine.train_batch(data_iter=data)
    except (ConnectionError, RuntimeError):
        is_whole = engine.clapping_save_survivors(folder, {"mine": 7})
        Path(folder, f"rank{engine.global_rank}").write_text(str(is_whole))
    os._exit(1)


def go_on(folder):
    """Losses of an uninterrupted run, and of one that starts from the survivors' checkpoint."""
    found = []
    for resumes in (False, True):
        engine = models.make_engine(NONE, num_stages=2)
        data = models.batches(engine.grid.get_data_parallel_id())
        if resumes:
            _, client_state = engine.load_checkpoint(folder)
            assert (client_state["mine"], engine.global_steps, engine.clapping_num_drawn) == (7, 2, 8)
            for _ in range(engine.clapping_num_drawn):
                next(data)
        found.append([float(engine.train_batch(data_iter=data)) for _ in range(3 if resumes else 5)])
    return found


def test_survivors_of_every_stage_save_what_the_next_run_goes_on_from(fresh_ranks, tmp_path):
    assert all(outcome.kind == "dead" for outcome in fresh_ranks(4).outcomes(survive, str(tmp_path)))
    assert "True" in {Path(tmp_path, f"rank{rank}").read_text() for rank in (0, 2, 3)}
    assert (tmp_path / "latest").read_text().startswith("survivors_step2_")
    assert not list(tmp_path.rglob("*unfinished*"))
    for uninterrupted, resumed in fresh_ranks(4).run(go_on, str(tmp_path)):
        assert resumed == uninterrupted[2:]


def run_ids():
    return [models.make_engine(NONE)._endpoints.run_id for _ in range(2)]


def test_each_run_has_a_name_of_its_own_so_that_survivors_of_two_never_mix(two_ranks):
    (first, second), others = two_ranks.run(run_ids)
    assert [first, second] == others
    assert first != second


def fail_at_the_end_of_a_step():
    """Batches counted after a step whose last message did not go: its weights are trained."""
    engine = models.make_engine(NONE)
    models.train(engine, 1)

    def fail():
        raise ConnectionError("rank 1 ended")

    engine._endpoint.end_step = fail
    with pytest.raises(ConnectionError):
        models.train(engine, 1)
    return engine.global_steps, engine.clapping_num_drawn


def test_the_position_in_the_data_is_that_of_the_weights_whatever_fails(two_ranks):
    assert two_ranks.run(fail_at_the_end_of_a_step) == [(2, 8), (2, 8)]


def without_a_survivor(folder):
    """What a rank saves when no other stage's rank has, and what with an optimizer that is split up."""
    engine = models.make_engine(NONE)
    found = engine.clapping_save_survivors(folder) if engine.global_rank == 0 else None
    engine = models.make_engine(NONE, ds={"zero_optimization": {"stage": 1}})
    try:
        engine.clapping_save_survivors(folder)
    except ValueError as error:
        return found, str(error)
    return None


def test_a_stage_without_a_survivor_leaves_the_last_checkpoint_in_place(two_ranks, tmp_path):
    (tmp_path / "latest").write_text("global_step5")
    (is_whole, message), (_, other) = two_ranks.run(without_a_survivor, str(tmp_path))
    assert is_whole is False
    assert message == other
    assert "zero_optimization.stage = 1 " in message
    assert (tmp_path / "latest").read_text() == "global_step5"
