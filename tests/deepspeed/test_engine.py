"""The DeepSpeed engine, on real ranks: bit-identical where nothing is compressed, equal memories where
something is, bytes as the formula says."""

import contextlib
import io

import pytest
import torch.distributed as dist

from clapping_ds.codecs import CODECS
from tests import models
from tests.cluster import free_groups
from tests.models import INT2, NONE, ZERO1


def compare(options, steps=4):
    """Losses of stock DeepSpeed, of three engines that must equal it, and of one that must not."""
    blocks = {"no block": None, "off": {"enabled": False, "strategy": "fu"}, "none": NONE, "int2": INT2}
    stock = models.losses(None, {**options, "stock": True}, steps)
    return stock, {name: models.losses(block, options, steps) for name, block in blocks.items()}


def assert_identical_to_stock(outcomes):
    for stock, ours in outcomes:
        assert ours["no block"] == ours["off"] == ours["none"] == stock
        assert ours["int2"] != stock


BF16 = {"bf16": {"enabled": True}}
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


def announced(ds):
    """What the first rank prints of the block, and the dtype of what crosses the link."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        engine = models.make_engine(NONE, ds=ds)
    models.train(engine, 1)
    (spec,) = engine._endpoint.channels[ends_that_send(engine)[0]].specs
    return said.getvalue(), spec.dtype.itemsize * 8


def ends_that_send(engine):
    return [end for end in engine._endpoint.channels if end.sends]


@pytest.mark.parametrize("ds", [{}, BF16, {**BF16, "communication_data_type": "fp32"}], ids=repr)
def test_the_saving_that_is_told_is_against_what_would_be_sent(two_ranks, ds):
    (said, num_bits), _ = two_ranks.run(announced, ds)
    assert f"saving against {num_bits} bit" in said


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
        most_payloads = max(wire.most_payloads for wire in engine._endpoint.wires.values())
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
    """Every codec as delta, with each kind of key in turn; tests/core/test_channel.py has all pairs."""
    for index, delta in enumerate(CODECS):
        key = ({}, {"key": "none"}, {"key": "int8"})[index % 3]
        direction = {"delta": delta, "min_numel": 1024, **key}
        strategy = "key_delta" if key else "fc"
        lazy = {"refresh": "slot"}
        yield {"strategy": strategy, "lazy": lazy, "activations": direction, "gradients": direction}


def assert_ends_are_equal(by_rank, blocks):
    for index, block in enumerate(blocks):
        ends = {}
        for replica, memories in (rank[index] for rank in by_rank):
            for channel, bits in memories.items():
                ends.setdefault((replica, *channel), []).append(bits)
        for channel, (one, other) in ends.items():
            assert one == other, f"{channel} with {block}"
            if block["activations"]["delta"] != "none":
                slots = [place for place in one if len(place) == 3]  # not what codecs learned
                assert len(slots) == 4, "a memory for each slot"


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


def names_of_events(folder, num_stages, data_parallel):
    """Of a monitor that only the first rank has: links and directions, by figure."""
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "run"}
    ds = {**ZERO1, "steps_per_print": 2, **({"csv_monitor": monitor} if dist.get_rank() == 0 else {})}
    block = {**INT2, "data_parallel": data_parallel} if data_parallel is not None else INT2
    models.train(models.make_engine(block, num_stages, ds=ds), 2)
    dist.barrier()
    names = [path.stem for path in (folder / "run").glob("Train_Clapping_*.csv")]
    return {
        figure: {name.split("_")[2] + " " + name.split("_")[3] for name in names if name.endswith(figure)}
        for figure in ("relative_error", "held_back")
    }


def test_the_monitor_of_the_first_rank_shows_every_link(four_ranks, tmp_path):
    four, *_ = four_ranks.run(names_of_events, tmp_path / "4", 4, None)
    both = ("activations", "gradients")
    assert four["relative_error"] == {f"{link} {way}" for link in ("0-1", "1-2", "2-3") for way in both}
    replicas, *_ = four_ranks.run(names_of_events, tmp_path / "2", 2, {"scatter": "eden2"})
    assert {"0-1 activations", "0-1 gradients"} <= replicas["relative_error"]
    assert len(replicas["held_back"]) >= 2


@pytest.mark.parametrize(("strategy", "key_bytes"), [("fu", 2 * 64 * 64 * 4), ("fc", 64 * 32 + 64 * 2)])
def test_bytes_and_memory_equal_the_formula(two_ranks, strategy, key_bytes):
    """Messages of 2 x 64 x 64 fp32 values in 64 groups; int2 takes 2,048 code and 128 scale bytes."""
    block = {**INT2, "strategy": strategy, "lazy": {"refresh": "cycle"}}
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
