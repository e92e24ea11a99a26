"""Gradients of replicas in DeepSpeed pipelines, on real ranks: two stages of two replicas, one of four."""

import contextlib
import io
import json
import os
import signal
import time
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

import clapping_ds
from clapping_ds.gradients import layout
from clapping_ds.link.verification import checksum
from tests import models
from tests.cluster import Cluster, assert_replicas_are_equal, assert_same_error
from tests.deepspeed.test_fp16 import on_cpu
from tests.models import NONE, ZERO1

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 3, "hysteresis": 1}}
EDEN4 = {"name": "eden4", "scale": "unbiased"}
SIGN = {"scatter": "sign", "gather": "sign"}
CASES = {
    "fp32": {},
    "fp32, clipping": {"ds": {"gradient_clipping": 0.1}},
    "tied": {"kind": "tied"},
    "fp32 ZeRO-1": {"ds": ZERO1},
    "bf16": {"ds": BF16},
    "bf16 ZeRO-1, clipping": {"ds": {**BF16, **ZERO1, "gradient_clipping": 0.1}},
    "fp16 ZeRO-1": {"ds": {**FP16, **ZERO1}},
}


def block_of(plan):
    """Nothing compressed on the links, so that what differs is the replicas' doing."""
    return {**NONE, "data_parallel": {"min_numel": 512, **plan}}


def find_weights(engine):
    return [checksum(weight.detach().contiguous()) for weight in engine.module.parameters()]


def trained(block, options, steps):
    """Losses; checksums of this rank's weights; what went over the wire."""
    on_cpu()
    engine = models.make_engine(block, **options)
    losses = models.train(engine, steps)
    rows = engine.clapping_report() if block is not None and not options.get("stock") else []
    replicas = [row for row in rows if row["link"].startswith("replicas") and row["direction"] != "raw"]
    return losses, (engine.stage_id, find_weights(engine)), replicas


def compare(options, blocks, steps=4):
    stock = trained(None, {**options, "stock": True}, steps)
    return stock, [trained(block, options, steps) for block in blocks]


ALONE = ("fp32, clipping", "bf16 ZeRO-1, clipping")
"""Of one stage and four replicas as well; all of two and two."""


@pytest.mark.parametrize(
    ("case", "num_stages"), [*((case, 2) for case in CASES), *((case, 1) for case in ALONE)]
)
def test_replicas(four_ranks, case, num_stages):
    """Stock, bit for bit, where nothing is compressed; else near it, all replicas alike, and fewer bytes."""
    blocks = [block_of({"scatter": "none", "gather": "none"}), block_of({"scatter": EDEN4, "gather": EDEN4}),
              block_of({**SIGN, "warmup_steps": 1})]  # fmt: skip
    options = {**CASES[case], "num_stages": num_stages}
    outcomes = four_ranks.run(compare, options, blocks)
    for number in range(3):
        assert_replicas_are_equal([ours[number][1] for _, ours in outcomes])
    for (losses, weights, _), ((raw, raw_weights, _), (eden, *_), (sign, *_)) in outcomes:
        assert raw == losses
        assert raw_weights == weights
        assert eden[0] == losses[0], "no gradient was used yet"
        assert eden != losses and sign != losses
        assert sign[:2] == losses[:2], "the first step is a warm-up"
        assert eden == pytest.approx(losses, rel=0.02)
        assert sign == pytest.approx(losses, rel=0.1)
    rows = outcomes[0][1][1][2]
    is_split = "bf16" in case or "ZeRO" in case
    ways = ["scatter"] if is_split or num_stages == 2 else ["scatter", "gather"]
    assert [row["direction"] for row in rows] == ways * 4
    bits = 32 if case in ("fp32", "fp32, clipping", "tied") else None
    for row in rows:
        assert 4 < row["bits_per_value"] < 4.4, "groups of small pieces are filled up"
        assert bits is None or row["ratio"] == pytest.approx(bits / row["bits_per_value"])


def tied_weights(plan):
    """After some steps: whether the copies of each tied weight on two stages are alike on all ranks."""
    engine = models.make_engine(block_of(plan), num_stages=2, kind="tied")
    models.train(engine, 5)
    found = []
    for weight, group in engine.module.get_tied_weights_and_groups():
        told = [None, None]
        dist.all_gather_object(told, checksum(weight.detach()), group=group)
        found.append(told[0] == told[1])
    return found, find_weights(engine)


def test_tied_weights_stay_equal(four_ranks):
    assert all(found == [True] for found, _ in four_ranks.run(tied_weights, SIGN))


def partly_optimized(ds):
    """An optimizer that has not all weights that train: losses of stock, and of ours."""
    found = []
    for stock in (True, False):
        model = models.pipeline(2)
        config = {
            "train_micro_batch_size_per_gpu": models.BATCH, "gradient_accumulation_steps": 4,
            "steps_per_print": 1000, **ds,
        }  # fmt: skip
        if not stock:
            config["clapping"] = block_of({})
        weights = list(model.parameters())[1:]
        optimizer = torch.optim.AdamW(weights, lr=3e-3)
        if stock:
            deepspeed.PipelineEngine, deepspeed.DualPipeVEngine = models.STOCK_ENGINES
        start = deepspeed.initialize if stock else clapping_ds.initialize
        engine, *_ = start(model=model, optimizer=optimizer, config=config)
        found.append(models.train(engine, 3))
    return found


@pytest.mark.parametrize("ds", [{}, ZERO1, {**BF16, **ZERO1}], ids=["fp32", "fp32 ZeRO-1", "bf16 ZeRO-1"])
def test_weights_that_the_optimizer_has_not_are_left_out(four_ranks, ds):
    for stock, ours in four_ranks.run(partly_optimized, ds):
        assert ours[0] == stock[0]
        assert ours == pytest.approx(stock, rel=0.02)


def frozen(plan):
    """One layer's weights do not train, another's get no gradient in some steps."""

    def make(block, stock):
        model = models.pipeline(2)
        layers = [layer for layer in model.modules() if isinstance(layer, models.Mix)]
        layers[0].linear.weight.requires_grad_(False)
        config = {
            "train_micro_batch_size_per_gpu": models.BATCH, "gradient_accumulation_steps": 4,
            "steps_per_print": 1000, "clapping": block,
        }  # fmt: skip
        return models.start(model, config, stock)

    found = []
    for block, stock in ((None, True), (block_of({"scatter": "none"}), False), (block_of(plan), False)):
        engine = make(block or {"enabled": False}, stock)
        found.append((models.train(engine, 4), (engine.stage_id, find_weights(engine))))
    return found


def test_frozen_parameters_are_left_out(four_ranks):
    outcomes = four_ranks.run(frozen, {"scatter": EDEN4, "gather": EDEN4})
    for number in range(3):
        assert_replicas_are_equal([of_rank[number][1] for of_rank in outcomes])
    for stock, _, coded in outcomes:
        assert coded[0] == pytest.approx(stock[0], rel=0.02)


def skipped(block, overflow_step, steps):
    """Losses, skipped steps and loss scales; weights; what is held back before and after the skipped step."""
    on_cpu()
    engine = models.make_engine(block, 2, ds={**FP16, **ZERO1})
    data, found, held = models.batches(engine.grid.get_data_parallel_id()), [], []
    for step in range(steps):
        if step == overflow_step:
            engine.optimizer.loss_scaler.cur_scale = 2.0**40
        leg = engine._gradients.averaging.exchange.legs["scatter"]
        scale = engine._gradients.averaging.exchange.scale
        if step in (overflow_step, overflow_step + 1):
            held.append({place: e.clone() / scale for place, e in leg.feedback.error.values.items()})
        loss = float(engine.train_batch(data_iter=data))
        found.append((loss, engine.skipped_steps, engine.optimizer.loss_scaler.cur_scale))
    before, after = held
    is_kept = all(torch.allclose(after[p], before[p], rtol=1e-6, atol=0) for p in before)
    return found, (engine.stage_id, find_weights(engine)), is_kept and before.keys() == after.keys()


def test_a_skipped_step_leaves_no_error(four_ranks):
    """After an overflow what is held back is as before it, in units of the loss."""
    outcomes = four_ranks.run(skipped, block_of(SIGN), 3, 8)
    assert_replicas_are_equal([weights for _, weights, _ in outcomes])
    for found, _, is_kept in outcomes:
        losses, num_skipped, scales = zip(*found, strict=True)
        assert num_skipped[3] == num_skipped[2] + 1, "the step overflowed"
        assert len(set(scales)) > 2 and all(loss < 10 for loss in losses)
        assert is_kept


def resumed(plan, options, folder):
    """Losses and weights after 3 more steps: of a run that goes on, and of one that loads what it saved."""
    on_cpu()
    found = []
    engine = models.make_engine(block_of(plan), **options)
    data = models.batches(engine.grid.get_data_parallel_id())
    for _ in range(3):
        engine.train_batch(data_iter=data)
    engine.save_checkpoint(folder)
    other = models.make_engine(block_of(plan), **options)
    other.load_checkpoint(folder)
    for each in (engine, other):
        data = models.batches(engine.grid.get_data_parallel_id() + 50)
        losses = [float(each.train_batch(data_iter=data)) for _ in range(3)]
        found.append((losses, find_weights(each)))
    return found


RESUMED = [
    *((case, SIGN) for case in ("fp32", "bf16 ZeRO-1, clipping", "fp16 ZeRO-1")),
    *(
        (case, {**SIGN, "error_feedback": "ef21", "weights": "eden4"})
        for case in ("bf16 ZeRO-1, clipping", "fp16 ZeRO-1")
    ),
    *((case, {"delay": 2}) for case in ("fp32", "bf16 ZeRO-1, clipping")),
]


@pytest.mark.parametrize(("case", "plan"), RESUMED, ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(four_ranks, tmp_path, case, plan):
    options = {**CASES[case], "num_stages": 2}
    for whole, of_resumed in four_ranks.run(resumed, plan, options, str(tmp_path)):
        assert whole == of_resumed


def loaded_by_fewer(plan, folder):
    """A checkpoint of one stage and four replicas, read by two stages of two: what is said."""
    engine = models.make_engine(block_of(plan), num_stages=2)
    models.train(engine, 2)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        state = engine._gradients.averaging.state_dict()
        state["exchange"]["written by"]["replicas"] = (0, 4, None)
        reason = engine._gradients.averaging.load_state_dict(state)
    held = engine._gradients.averaging.exchange.legs["scatter"].feedback.error.values
    return reason, len(held)


def test_another_number_of_replicas_forgets_errors_and_says_so(four_ranks, tmp_path):
    for reason, num_held in four_ranks.run(loaded_by_fewer, SIGN, str(tmp_path)):
        assert "number of replicas" in reason
        assert num_held == 0


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        ({"node_size": 3}, {"num_stages": 1}, "node_size = 3 with 4 replicas; accepted: a divisor"),
        ({"node_size": 2}, {"num_stages": 1, "ds": BF16}, "node_size = 2 with an optimizer that is split"),
        ({"delay": 1}, {"num_stages": 2, "ds": {**FP16, **ZERO1}}, "delay = 1 with fp16"),
        ({}, {"num_stages": 4}, "data_parallel with 1 replica"),
        (
            {"scatter": "lowrank"},
            {"num_stages": 2, "ds": BF16},
            "scatter = 'lowrank' with an optimizer that is",
        ),
        ({"weights": "int8"}, {"num_stages": 2}, "weights = 'int8' with an optimizer that is not split"),
    ],
)
def test_what_cannot_be_is_one_error_everywhere(four_ranks, block, options, message):
    outcomes = four_ranks.outcomes(trained, block_of(block), options, 1)
    assert_same_error(outcomes, "ValueError", message)


def with_nodes(plan, steps=4):
    return trained(block_of(plan), {"num_stages": 1}, steps)


@pytest.mark.parametrize("plan", [{}, SIGN, {"scatter": "none", "gather": EDEN4}], ids=str)
def test_replicas_on_nodes_stay_equal(four_ranks, plan):
    outcomes = four_ranks.run(with_nodes, {**plan, "node_size": 2})
    assert_replicas_are_equal([weights for _, weights, _ in outcomes])


def verified(plan, breaks):
    engine = models.make_engine({**block_of(plan), "verify": True}, num_stages=1)
    models.train(engine, 2)
    if breaks and dist.get_rank() == 2:
        exchange = engine._gradients.averaging.exchange
        decode = exchange.decode
        exchange.decode = lambda *args: decode(*args) * 2
    return models.train(engine, 1)


def test_verify_finds_replicas_that_drift(four_ranks):
    assert all(four_ranks.run(verified, {}, False))
    outcomes = four_ranks.outcomes(verified, {}, True)
    assert {outcome.kind for outcome in outcomes} == {"VerificationError"}
    assert "replicas, step 2" in outcomes[0].message


def chosen(links, num_stages, steps):
    """Whether gradients are compressed after all was tried, and what was said of it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        engine = models.make_engine({**block_of({}), "links": links}, num_stages=num_stages)
        models.train(engine, steps)
    is_used = engine._gradients.averaging.is_used
    return is_used, said.getvalue(), (engine.stage_id, find_weights(engine))


def chosen_then_read(file, num_stages):
    return (
        chosen({"min_gain": 0.5, "write": file}, num_stages, 10),
        chosen({"read": file}, num_stages, 2),
    )


@pytest.mark.parametrize("num_stages", [1, 2])
def test_links_auto_measures_this_exchange_too(four_ranks, tmp_path, num_stages):
    """Between ranks of one machine nothing is gained; a run that reads what was written does not try."""
    file = str(tmp_path / "links.json")
    outcomes = four_ranks.run(chosen_then_read, file, num_stages)
    for number in range(2):
        assert_replicas_are_equal([of_rank[number][2] for of_rank in outcomes])
        assert not any(of_rank[number][0] for of_rank in outcomes)
    (_, said, _), (_, of_reader, _) = outcomes[0]
    assert "exchange of gradients, raw" in said and "none" in said
    assert "exchange of gradients, raw" not in of_reader
    assert json.loads(Path(file).read_text())["compresses_replicas"] is False


WEIGHTS = {"scatter": EDEN4, "weights": "eden4"}
SPLIT = {name: CASES[name] for name in CASES if "ZeRO" in name or "bf16" in name}


@pytest.mark.parametrize("case", SPLIT)
def test_changes_of_weights(four_ranks, case):
    """Of a split optimizer: replicas alike, near stock, a quarter of a byte per value and way."""
    options = {**SPLIT[case], "num_stages": 2}
    outcomes = four_ranks.run(compare, options, [block_of(WEIGHTS)], 5)
    assert_replicas_are_equal([ours[0][1] for _, ours in outcomes])
    for (stock, *_), ((losses, *_),) in outcomes:
        assert losses != stock
        assert losses == pytest.approx(stock, rel=0.02)
    rows = outcomes[0][1][0][2]
    assert [row["direction"] for row in rows] == ["scatter", "weights"] * 4
    assert all(row["bits_per_value"] < 6 for row in rows), "vectors travel raw"


TIMEOUT_S = 3


def end(gradients):
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_and_end(gradients):
    time.sleep(2.5 * TIMEOUT_S)
    end(gradients)


def left_alone(how):
    """One replica ends, or sleeps, before it sends its gradients: what the other raises, and how soon."""
    engine = models.make_engine({**block_of({}), "timeout_s": TIMEOUT_S}, num_stages=1)
    models.train(engine, 2)
    if dist.get_rank() == 1 and how == "dies":
        engine._gradients.averaging.average_ = end
    elif dist.get_rank() == 1:
        engine._gradients.averaging.average_ = sleep_and_end
    start_s = time.monotonic()
    try:
        models.train(engine, 1)
    except ConnectionError as error:
        return str(error), time.monotonic() - start_s
    return None


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_replica_that_is_gone_is_told(how):
    cluster = Cluster(2)
    try:
        message, took_s = cluster.outcomes(left_alone, how)[0]
    finally:
        cluster.close()
    assert "replicas, step 2: exchange of gradients: rank 1 ended or was silent for too long" in message
    assert took_s < 3 * TIMEOUT_S


def in_many_buckets(ds):
    """Stock's losses; ours, with parts of parameters in buckets of their own; this rank's weights."""
    on_cpu()
    options = {"num_stages": 2, "ds": ds}
    stock, *_ = trained(None, {**options, "stock": True}, 5)
    whole, layout.BUCKET_NUMEL = layout.BUCKET_NUMEL, 2000
    try:
        losses, weights, _ = trained(block_of(WEIGHTS), options, 5)
    finally:
        layout.BUCKET_NUMEL = whole
    return stock, losses, weights


@pytest.mark.parametrize("case", ["fp32 ZeRO-1", "bf16 ZeRO-1, clipping"])
def test_parts_of_parameters_travel_in_several_buckets(four_ranks, case):
    outcomes = four_ranks.run(in_many_buckets, SPLIT[case]["ds"])
    assert_replicas_are_equal([weights for *_, weights in outcomes])
    for stock, losses, _ in outcomes:
        assert losses == pytest.approx(stock, rel=0.02)
