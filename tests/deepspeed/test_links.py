"""Links and depth that the DeepSpeed engine decides after its first steps, and blocks that it refuses."""

import pytest

from clapping_ds.autotune.decision import Choice, Decision
from clapping_ds.codecs import CODECS
from tests import models
from tests.cluster import assert_same_error
from tests.commands import stress
from tests.models import INT2


def with_links(block, num_stages, steps=6):
    engine = models.make_engine(block, num_stages)
    models.train(engine, steps)
    decision, in_flight = engine._tuning.decision, engine._endpoint.in_flight
    return decision, in_flight, models.memories(engine), engine.clapping_report()


def test_links_auto_leaves_fast_links_alone(two_ranks, tmp_path):
    block = {**INT2, "links": {"write": str(tmp_path / "links.json"), "min_gain": 0.5}}
    (one, *_, report), (other, *_) = two_ranks.run(with_links, block, 2)
    assert one == other == Decision.read(str(tmp_path / "links.json"), 2)
    assert [choice.codec.name for choice in one.choices] == ["none", "none"]
    assert not one.lazy.pays
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
    assert [bool(ends[choice.link, choice.direction][0][0, 0, 0]) for choice in choices] == [
        True, False, True, True, False, True,
    ]  # fmt: skip
    outcomes = four_ranks.outcomes(models.make_engine_only, block, 2)
    assert_same_error(outcomes, "ValueError", "written for 4 stages; accepted: a file written for 2 stages")


def test_delays_on_random_ranks_change_nothing(four_ranks):
    stress.check(four_ranks, steps=30)


# Bad input


@pytest.mark.parametrize(
    ("block", "message"),
    [({"p_neu": 0.5}, "clapping.p_neu = 0.5: unknown key; accepted: enabled"),
     ({"strategy": "fu", "lazy": {"p_new": 2}}, "clapping.lazy.p_new = 2: accepted: less than or equal to 1"),
     ({"gradients": {"codec": "int5"}}, "unknown codec; accepted: none, int8"),
     ({"in_flight": -1}, "clapping.in_flight = -1: accepted: 'auto', or a whole number"),
     ({"in_flight": 5}, "clapping.in_flight = 5: accepted: 'auto', or 0 to 4, the number of micro-batches"),
     ({"links": {"ladder": ["int8", "int5"]}}, "clapping.links.ladder.1 = {'name': 'int5'}: unknown codec"),
     ({"links": {"read": "/nowhere"}}, "clapping.links.read = '/nowhere': [Errno 2]"),
     ({"links": {"write": "/nowhere/a.json"}}, "clapping.links.write = '/nowhere/a.json': No such file"),
     ({"gradients": {"codec": "topk", "min_numel": 8}}, "accepted: a block of at most min_numel")],
)  # fmt: skip
def test_a_wrong_block_is_one_error_on_every_rank(two_ranks, block, message):
    assert_same_error(two_ranks.outcomes(models.make_engine_only, block), "ValueError", message)


def test_one_stage_is_refused(two_ranks):
    outcomes = two_ranks.outcomes(models.make_engine_only, {"strategy": "fu"}, 1)
    assert_same_error(outcomes, "ValueError", "num_stages=1): there is no link to compress")
    two_ranks.run(models.make_engine_only, {"enabled": False}, 1)


def test_dual_pipe_v_is_refused(two_ranks):
    outcomes = two_ranks.outcomes(models.make_dual_pipe_v, {"strategy": "fu"})
    assert_same_error(outcomes, "ValueError", "DualPipeVModule: accepted: a PipelineModule")
