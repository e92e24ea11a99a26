"""A checkpoint holds everything, is whole at any moment, and one that does not fit is said not to."""

import contextlib
import io
from pathlib import Path

import pytest
import torch

from clapping_ds.autotune.decision import Choice, Decision
from clapping_ds.codecs import Eden, Quantizer
from clapping_ds.config import DIRECTIONS
from tests import models
from tests.commands import killed
from tests.models import INT2, PLACES, POOL

LOWRANK = {
    "strategy": "key_delta", "lazy": {"p_new": 0.5, "refresh": "slot"},
    "activations": {"delta": {"name": "lowrank", "rank": 2}, "key": "eden3"},
    "gradients": {"delta": "eden1", "key": "int8"},
}  # fmt: skip


def interrupted(block, folder, resumed_block=None):
    """Losses and what is held after 3 more steps: uninterrupted, and by a new engine from the checkpoint."""
    found = []
    for resumes in (False, True):
        engine = models.make_engine((resumed_block or block) if resumes else block)
        data = models.batches()
        if resumes:
            engine.load_checkpoint(folder)
            for _ in range(engine.clapping_num_drawn):
                next(data)
        else:
            for _ in range(4):
                engine.train_batch(data_iter=data)
            engine.save_checkpoint(folder)
        losses = [float(engine.train_batch(data_iter=data)) for _ in range(3)]
        found.append((losses, models.memories(engine)))
    return found


START = {"codec": {"name": "transform", "bits": 0.5, "basis": "eigen", "refresh": 2}, "start": {"steps": 5}}
STARTS = {"activations": START, "gradients": START}
"""Which ends one step after the checkpoint."""
UNDECIDED = {**POOL, "lazy": {"pool": 2}, "links": {"min_gain": 0.5, "ladder": ["int2"]}}


@pytest.mark.parametrize(
    "block",
    [INT2, LOWRANK, STARTS, UNDECIDED],
    ids=["int2", "lowrank and eden", "start", "lazy sampling off"],
)
def test_a_resumed_run_is_the_uninterrupted_one(two_ranks, tmp_path, block):
    for uninterrupted, resumed in two_ranks.run(interrupted, block, str(tmp_path)):
        assert uninterrupted == resumed


@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_with_a_pool_is_the_uninterrupted_one_wherever_it_is_held(two_ranks, tmp_path, place):
    block, elsewhere = ({**POOL, "memory": PLACES[name]} for name in (place, "disk"))
    for uninterrupted, resumed in two_ranks.run(interrupted, block, str(tmp_path), elsewhere):
        assert uninterrupted == resumed


def test_without_memories_in_the_checkpoint_the_next_step_is_all_fresh(two_ranks, tmp_path):
    block = {**LOWRANK, "checkpoint_memory": False}
    for (_, _), (losses, _) in two_ranks.run(interrupted, block, str(tmp_path)):
        assert torch.tensor(losses).isfinite().all()
    assert not list(tmp_path.rglob("clapping_rank_*"))


def taken_back(block, folder):
    """The loss after a checkpoint, that of the same engine when it has loaded it, and what is held then."""
    engine = models.make_engine(block)
    models.train(engine, 2)
    engine.save_checkpoint(folder)
    before = models.train(engine, 1)
    models.train(engine, 3, length=32)
    engine.load_checkpoint(folder)
    return before, models.train(engine, 1), models.memories(engine)


STEPWISE = {**INT2, "lazy": {"refresh": "step"}}  # step 2 has no fresh slot, hence the checkpoint's shapes


def test_an_engine_that_loads_its_own_checkpoint_forgets_what_came_after(two_ranks, tmp_path):
    outcomes = two_ranks.run(taken_back, {**STEPWISE, "in_flight": 0}, str(tmp_path))
    for before, after, memories in outcomes:
        assert before == after
        assert memories == outcomes[0][2]


def test_an_engine_loads_a_checkpoint_from_before_its_links_were_decided(two_ranks, tmp_path):
    block = {**STEPWISE, "links": {"min_gain": 0.5, "lazy_gain": 0.0}}
    (_, losses, one), (_, also_losses, other) = two_ranks.run(taken_back, block, str(tmp_path))
    assert losses == also_losses
    assert one == other


# What does not fit


def saved_and_loaded(saving, loading, folder, spoils=None):
    """What the first rank says when a checkpoint of one run is loaded into another, and the next losses."""
    engine = models.make_engine(**saving)
    models.train(engine, 3)
    num_drawn = getattr(engine, "clapping_num_drawn", 0)
    engine.save_checkpoint(folder)
    if spoils is not None and engine.global_rank == 1:
        spoils(folder)
    torch.distributed.barrier()
    engine = models.make_engine(**loading)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        engine.load_checkpoint(folder)
    assert engine.clapping_num_drawn == num_drawn
    losses = models.train(engine, 2)
    return said.getvalue(), losses, models.memories(engine), engine._endpoints.step


def truncate(folder):
    (file,) = Path(folder).rglob("clapping_rank_00001.pt")
    file.write_bytes(file.read_bytes()[:1000])


def remove(folder):
    (file,) = Path(folder).rglob("clapping_rank_00001.pt")
    file.unlink()


def write_another_format(folder):
    (file,) = Path(folder).rglob("clapping_rank_00001.pt")
    torch.save({"step": 3, "fresh": [True] * 4, "num_drawn": 12}, file)


def write_a_class_that_is_gone(folder):
    """Reading it raises ModuleNotFoundError, which no list of a broken file's errors would hold."""
    import sys
    import types

    module = types.ModuleType("gone")
    exec("class Batch: pass", module.__dict__)
    sys.modules["gone"] = module
    (file,) = Path(folder).rglob("clapping_rank_00001.pt")
    torch.save({"held": module.Batch()}, file)
    del sys.modules["gone"]


OTHER_CODEC = {**INT2, "activations": {"delta": "int4"}}
MORE_SLOTS = {"gradient_accumulation_steps": 6}
DIFFERENT = "the checkpoint is of another configuration, number of micro-batches, stages or ranks"
MISSING = "the checkpoint has no state of clapping_ds for every rank"


@pytest.mark.parametrize(
    ("saving", "loading", "spoils", "reason"),
    [({"clapping": INT2}, {"clapping": OTHER_CODEC}, None, DIFFERENT),
     ({"clapping": INT2}, {"clapping": INT2, "ds": MORE_SLOTS}, None, DIFFERENT),
     ({"clapping": None}, {"clapping": INT2}, None, MISSING),
     ({"clapping": INT2}, {"clapping": INT2}, remove, MISSING),
     ({"clapping": INT2}, {"clapping": INT2}, truncate, MISSING),
     ({"clapping": INT2}, {"clapping": INT2}, write_another_format, MISSING),
     ({"clapping": INT2}, {"clapping": INT2}, write_a_class_that_is_gone, MISSING)],
    ids=["codec", "micro-batches", "stock", "a rank's file is missing", "a rank's file is broken",
         "a rank's file is of another format", "a rank's file holds a class that is gone"],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_one_line_and_the_run_goes_on(
    two_ranks, tmp_path, saving, loading, spoils, reason
):
    outcomes = two_ranks.run(saved_and_loaded, saving, loading, str(tmp_path), spoils)
    (said, losses, one, _), (silent, also_losses, other, _) = outcomes
    ours = [line for line in said.splitlines() if line.startswith("clapping")]
    assert ours == [f"clapping: {reason}: the next step is all fresh, and codecs learn anew"]
    cannot_read = spoils in (truncate, write_a_class_that_is_gone)
    assert ("clapping: rank 1 cannot read" if cannot_read else "") in silent
    assert cannot_read or "clapping" not in silent
    assert losses == also_losses
    assert one == other


def of_another_number_of_stages(folder):
    engine = models.make_engine(INT2, num_stages=4)
    models.train(engine, 2)
    engine.save_checkpoint(folder)
    engine = models.make_engine(INT2, num_stages=2)
    engine.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
    return models.train(engine, 2), engine.grid.get_data_parallel_id(), models.memories(engine)


def test_another_number_of_stages_loads_by_deepspeeds_rules(four_ranks, tmp_path):
    ends = {}
    for losses, replica, memories in four_ranks.run(of_another_number_of_stages, str(tmp_path)):
        assert torch.tensor(losses).isfinite().all()
        for channel, bits in memories.items():
            ends.setdefault((replica, *channel), []).append(bits)
    assert all(one == other for one, other in ends.values())


def decided(engine):
    plans = {end: channel.plan for end, channel in engine._endpoint.channels.items()}
    return engine._endpoint.in_flight, plans, engine._tuning.is_watching


def counters(folder):
    engine = models.make_engine({**INT2, "links": "auto", "verify": True})
    models.train(engine, 5)
    engine.save_checkpoint(folder)
    before = engine.clapping_report(), decided(engine)
    engine = models.make_engine({**INT2, "links": "auto", "verify": True})
    engine.load_checkpoint(folder)
    return before == (engine.clapping_report(), decided(engine))


def test_counters_and_decided_links_are_in_the_checkpoint(two_ranks, tmp_path):
    assert two_ranks.run(counters, str(tmp_path)) == [True, True]


def of_other_tuning(saving, loading, folder, num_steps):
    """Before and after a load by another configuration: depth, codecs, whether links are to be measured."""
    engine = models.make_engine(saving)
    models.train(engine, num_steps)
    engine.save_checkpoint(folder)
    engine = models.make_engine(loading)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        engine.load_checkpoint(folder)
    codecs = {channel.plan.delta.name for channel in engine._endpoint.channels.values()}
    loaded = engine._endpoint.in_flight, codecs, engine._tuning.is_watching, "all fresh" in said.getvalue()
    models.train(engine, 2)
    return loaded


@pytest.mark.parametrize(
    ("saving", "loading", "num_steps", "expected"),
    [(INT2, {**INT2, "in_flight": 3}, 5, (3, {"int2"}, False, False)),
     ({**INT2, "in_flight": 1}, {**INT2, "in_flight": 1, "links": "auto"}, 5, (1, {"int2"}, True, False)),
     ({**INT2, "links": "auto"}, {**INT2, "links": "auto"}, 2, (0, {"int2"}, True, False)),
     ({**INT2, "links": {"min_gain": 0.5}}, {**INT2, "in_flight": 0}, 5, (0, {"int2"}, False, True)),
     ({**INT2, "in_flight": 1}, {**INT2, "in_flight": 1, "memory": {}}, 2, (1, {"int2"}, False, False))],
    ids=["explicit depth", "links to be measured", "not measured yet", "chosen links, no longer open",
         "the same, spelt otherwise"],
)  # fmt: skip
def test_a_load_changes_only_what_the_configuration_leaves_open(
    two_ranks, tmp_path, saving, loading, num_steps, expected
):
    (first, second) = two_ranks.run(of_other_tuning, saving, loading, str(tmp_path), num_steps)
    assert first == expected
    assert second[:3] == expected[:3]


def depth_alone(folder):
    """Codecs chosen before a checkpoint, and after a run that loaded them has measured its depth; what it
    wrote of a decision."""
    links = {"ladder": ["eden3"], "min_gain": 0.99, "write": f"{folder}/links.json"}
    engine = models.make_engine({**INT2, "in_flight": 1, "links": links})
    models.train(engine, 2)
    stage = engine._endpoint
    for end, channel in stage.channels.items():
        stage.set_plan(end, channel.plan.with_codec(Eden(name="eden3")))
    engine._endpoints.links_are_measured = True
    engine.save_checkpoint(folder)
    engine = models.make_engine({**INT2, "links": links})
    engine.load_checkpoint(folder)
    models.train(engine, 5)
    codecs = {channel.plan.delta.name for channel in engine._endpoint.channels.values()}
    chosen = {choice.codec.name for choice in engine._tuning.decision.choices}
    return codecs, chosen, engine._tuning.is_watching, Path(links["write"]).exists()


def test_a_depth_that_is_measured_after_a_load_leaves_codecs_and_file_alone(two_ranks, tmp_path):
    assert two_ranks.run(depth_alone, str(tmp_path)) == [({"eden3"}, {"eden3"}, False, False)] * 2


def test_links_from_a_file_are_not_measured_after_a_load(two_ranks, tmp_path):
    path = tmp_path / "links.json"
    choices = [
        Choice(link="0-1", direction=name, codec=Quantizer(name="int2"), mbit_per_s=1.0, latency_ms=1.0,
               raw_ms=1.0, compressed_ms=1.0)
        for name in DIRECTIONS
    ]  # fmt: skip
    Decision(num_stages=2, in_flight=2, stage_ms=1.0, choices=choices).write(str(path))
    block = {**INT2, "links": {"read": str(path)}}
    for loaded in two_ranks.run(of_other_tuning, INT2, block, str(tmp_path), 2):
        assert loaded == (2, {"int2"}, False, False)


def test_a_run_that_is_killed_ends_as_if_it_never_had_been(tmp_path):
    (report,) = killed.check(tmp_path, kills=1, victims=[1])
    assert "all equal" in report
