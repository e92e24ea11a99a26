"""The choice of codecs and depth, from measurements that are made up."""

import json
from types import SimpleNamespace

import pytest
import torch

from clapping_ds import ClappingConfig
from clapping_ds.autotune import tuning
from clapping_ds.autotune.decision import (
    Candidate,
    Decision,
    Direction,
    Measured,
    Speed,
    decide,
    describe_memory,
)
from clapping_ds.codecs import Quantizer, Raw
from clapping_ds.config import LazyConfig

RAW_BYTES = 1_000_000
LADDER = [("int8", 1 / 4), ("int4", 1 / 8), ("int2", 1 / 16)]


def config(**block):
    return ClappingConfig.from_ds_config({"clapping": {"strategy": "direct", "links": "auto"} | block})


def direction(link, name, transfer_s, codec_s=0.0, latency_s=0.0, key_ratio=None):
    """A direction on which a raw message takes `transfer_s`."""
    candidates = [Candidate(Raw(), RAW_BYTES, RAW_BYTES, 0.0)]
    for codec, ratio in LADDER:
        num_bytes = int(RAW_BYTES * ratio)
        key_bytes = num_bytes if key_ratio is None else int(RAW_BYTES * key_ratio)
        candidates.append(Candidate(Quantizer(name=codec), key_bytes, num_bytes, codec_s))
    return Direction(link, name, RAW_BYTES, Speed(RAW_BYTES / transfer_s, latency_s), candidates)


def pipeline(transfers_s, compute_s=1.0, stored_bytes=100, free_bytes=None, **options):
    """What every stage measured, where link number i takes transfers_s[i] for a raw message."""
    measured = []
    for stage in range(len(transfers_s) + 1):
        sent = []
        if stage < len(transfers_s):
            sent.append(direction(f"{stage}-{stage + 1}", "activations", transfers_s[stage], **options))
        if stage > 0:
            sent.append(direction(f"{stage - 1}-{stage}", "gradients", transfers_s[stage - 1], **options))
        measured.append(Measured(stage, compute_s, stored_bytes, free_bytes, sent))
    return measured


def names(decision):
    return {(choice.link, choice.direction): choice.codec.name for choice in decision.choices}


def test_each_link_gets_the_lightest_codec_that_takes_it_off_the_critical_path():
    found = names(decide(pipeline([0.001, 2.0, 6.0, 100.0]), config(), 16))
    assert [found[f"{i}-{i + 1}", "activations"] for i in range(4)] == ["none", "int8", "int4", "int2"]
    assert [found[f"{i}-{i + 1}", "gradients"] for i in range(4)] == ["none", "int8", "int4", "int2"]


def test_a_link_off_the_critical_path_gets_none_whatever_the_default():
    block = {"activations": {"codec": "int2"}, "gradients": {"codec": "int2"}}
    decision = decide(pipeline([0.1]), config(**block), 16)
    assert set(names(decision).values()) == {"none"}
    assert "No link needs compression" in decision.advice()[-1]
    assert decide(pipeline([9.0]), config(), 16).advice() == []
    for strategy, member in (("direct", "codec"), ("fc", "delta"), ("fu", "delta")):
        plan = config(strategy=strategy, activations={member: "int2"}).plan("activations")
        mine = plan.with_codec(decision.codec("0-1", "activations"))
        assert mine.key == Raw()
        assert mine.mean_bits_per_value(torch.bfloat16) == 16


def test_a_codec_that_costs_more_than_it_saves_is_not_taken():
    assert set(names(decide(pipeline([1.5], codec_s=0.6), config(), 16)).values()) == {"none"}
    assert set(names(decide(pipeline([3.0], codec_s=0.6), config(), 16)).values()) == {"int8"}


def test_min_gain_is_what_a_heavier_codec_must_save():
    for min_gain, codec in ((0.0, "int2"), (0.3, "int8")):
        links = {"min_gain": min_gain}
        assert set(names(decide(pipeline([4.3]), config(links=links), 16)).values()) == {codec}


def test_uncompressed_keys_count():
    """Steps of raw keys take as long whatever the codec; it can only help in the others."""
    fu = config(strategy="fu")
    measured = pipeline([4.0], key_ratio=1.0)
    assert set(names(decide(measured, fu, 16)).values()) == {"int8"}


LAZY = {"strategy": "fc", "lazy": {"p_new": 0.25, "refresh": "cycle"}}


@pytest.mark.parametrize(
    ("transfer_s", "pays", "codec"),
    [(0.1, False, "none"), (8.0, False, "int4"), (30.0, True, "int3"), (500.0, True, "int3")],
    ids=["a fast link", "one that the ladder takes care of", "a slow one", "a very slow one"],
)
def test_lazy_sampling_pays_where_no_codec_of_the_ladder_is_enough(transfer_s, pays, codec):
    """Keys as small as the smallest codec of the ladder, deltas a sixteenth of that (int3 is theirs)."""
    measured = pipeline([transfer_s], key_ratio=1 / 16)
    own = Candidate(Quantizer(name="int3"), RAW_BYTES // 16, RAW_BYTES // 256, 0.0, is_of_ladder=False)
    for rank in measured:
        for direction in rank.sent:
            direction.candidates.append(own)
    decision = decide(measured, config(strategy="fu", lazy=LAZY["lazy"]), 16)
    assert (decision.lazy.pays, decision.choices[0].codec.name) == (pays, codec)


def test_lazy_sampling_does_not_pay_where_a_step_is_as_fast_without_it():
    """With `fc` a key is of the same codec as a delta: nothing is saved by replaying samples."""
    decision = decide(pipeline([100.0]), config(**LAZY), 16)
    assert not decision.lazy.pays
    assert decision.lazy.step_ms == decision.lazy.all_new_step_ms
    assert decision.choices[0].codec.name == "int2"


def test_lazy_sampling_with_raw_keys_is_slower_than_all_new():
    decision = decide(pipeline([10.0], key_ratio=1.0), config(strategy="fu"), 16)
    assert not decision.lazy.pays
    assert decision.lazy.step_ms > decision.lazy.all_new_step_ms


def test_lazy_gain_is_what_lazy_sampling_must_save():
    """Keys are smaller than any codec of the ladder here."""
    measured = pipeline([160.0], key_ratio=1 / 64)
    lazy = {"p_new": 0.9, "refresh": "cycle"}
    for gain, pays in ((0.2, True), (0.9, False)):
        decision = decide(measured, config(strategy="fu", lazy=lazy, links={"lazy_gain": gain}), 100)
        assert decision.lazy.pays is pays
        assert pays or "does not pay" in decision.advice()[0]


def test_where_codecs_and_sampling_are_settled_they_are_not_decided_again():
    """Of a run that goes on from a checkpoint with `in_flight` "auto": depth alone."""
    open_block, lazy = config(strategy="fu"), LAZY["lazy"]
    measured = pipeline([10.0], key_ratio=1.0)
    for rank in measured:
        for direction in rank.sent:
            del direction.candidates[:-1]
    decision = decide(measured, open_block, 16, open_block.sampling)
    assert (decision.lazy, decision.choices[0].codec.name) == (None, "int2")
    assert decision.choices[0].compressed_ms == pytest.approx(1e3 * (0.5 * 10 + 0.5 * 10 / 16), rel=1e-3)
    all_new = decide(measured, config(strategy="fu", lazy=lazy), 16, LazyConfig(p_new=1.0))
    assert all_new.choices[0].compressed_ms == pytest.approx(1e4)


def test_where_all_samples_are_new_nothing_is_decided_about_lazy_sampling():
    assert decide(pipeline([1.0]), config(), 16).lazy is None
    assert decide(pipeline([1.0]), config(strategy="fu", links=None), 16).lazy is None


def test_replicas_count_as_slow_as_the_slowest():
    decision = decide([*pipeline([0.001]), *pipeline([100.0])], config(), 16)
    assert set(names(decision).values()) == {"int2"}
    assert decision.num_stages == 2


def test_every_rank_decides_alike():
    measured = pipeline([0.5, 3.0, 9.0], codec_s=0.1, latency_s=0.2)
    assert decide(measured, config(), 8) == decide(list(reversed(measured)), config(), 8)


def test_depth():
    """Off the critical path by int8, a message takes 0.25 + 0.5 s each way: 1.5 stage times in all."""
    slow = pipeline([1.0], latency_s=0.5)
    assert decide(slow, config(), 16).in_flight == 2
    assert decide(slow, config(in_flight=7), 16).in_flight == 7
    assert decide(slow, config(overlap=False), 16).in_flight == 0
    assert decide(pipeline([0.001]), config(), 16).in_flight == 0
    assert decide(pipeline([0.1], latency_s=50.0), config(), 16).in_flight == 16, "never more than there are"


def test_depth_stays_within_half_of_the_free_memory():
    slow = pipeline([0.1], latency_s=3.0, stored_bytes=100, free_bytes=600)
    decision = decide(slow, config(), 16)
    assert decision.in_flight == 3
    assert "stage 0 stores up to 5 micro-batches instead of 2, 0.0 MiB more" in describe_memory(
        decision, slow, 16
    )


def test_configured_links_keep_their_codec():
    block = ClappingConfig.from_ds_config({"clapping": {}})
    measured = [
        rank._replace(sent=[each._replace(candidates=each.candidates[2:3]) for each in rank.sent])
        for rank in pipeline([0.001])
    ]
    assert set(names(decide(measured, block, 4)).values()) == {"int4"}


# The file


def test_a_decision_survives_the_file(tmp_path):
    path = str(tmp_path / "links.json")
    decision = decide(pipeline([2.0, 100.0]), config(), 16)
    decision.write(path)
    assert Decision.read(path, 3) == decision


def test_a_wrong_file_is_one_error(tmp_path):
    path = tmp_path / "links.json"
    for text in ("", "[]", json.dumps({"num_stages": 2})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"accepted: a file written by links\.write"):
            Decision.read(str(path), 2)
    with pytest.raises(ValueError, match=r"accepted: a file written by links\.write"):
        Decision.read(str(tmp_path / "missing.json"), 2)
    decide(pipeline([2.0]), config(), 16).write(str(path))
    with pytest.raises(ValueError, match="written for 2 stages; accepted: a file written for 4 stages"):
        Decision.read(str(path), 4)


class Alone:
    """Stands in for `Control` on one rank."""

    def check(self, function):
        return function()


def test_what_was_found_of_replicas_is_added_to_the_file(tmp_path, monkeypatch):
    """A run that goes on after its links were measured does not empty the file; nor does one whose trial of
    replicas a checkpoint settled."""
    monkeypatch.setattr(tuning, "rank", lambda: 0)
    file = tmp_path / "links.json"
    decision = decide(pipeline([2.0]), config(), 4)
    decision.write(str(file))
    endpoints = SimpleNamespace(
        stages=[None],
        config=config(links={"write": str(file)}, data_parallel={}),
        control=Alone(),
        device=torch.device("cpu"),
    )
    tuning.Tuning(endpoints, num_stages=2).note_replicas(False)
    known = Decision.read(str(file), 2)
    assert known == decision.model_copy(update={"compresses_replicas": False})
    later = tuning.Tuning(endpoints, num_stages=2)
    later.decision = decision
    later._write()
    assert Decision.read(str(file), 2) == known
    file.unlink()
    tuning.Tuning(endpoints, num_stages=2).note_replicas(True)
    assert Decision.read(str(file), 2).compresses_replicas is True
