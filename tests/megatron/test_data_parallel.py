"""Gradients of Megatron-Core's DistributedDataParallel, on real ranks: two stages of two replicas, one of
four; with and without the distributed optimizer, and overlapped with the backward pass or not."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import nn

from clapping_ds.gradients.layout import Piece
from clapping_ds.hosts.megatron.gradients import _make_masters
from tests.cluster import assert_replicas_are_equal, assert_same_error, free_groups
from tests.megatron import replicas
from tests.megatron.runs import FLUSH
from tests.models import NONE

EDEN4 = {"name": "eden4", "scale": "unbiased"}
SIGN = {"scatter": "sign", "gather": "sign"}
EXACT = {"scatter": "none", "gather": "eden4"}
"""The second way is not used between two replicas, nor with the distributed optimizer: then this is stock,
but for the order in which more than two gradients are added up."""
SPLIT = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True}
CASES = {
    "plain": {},
    "overlap": {"ddp": OVERLAP},
    "distributed": {"ddp": {**SPLIT, "check_for_nan_in_grad": True}},
    "distributed, overlap, tied": {"ddp": {**SPLIT, **OVERLAP, "overlap_param_gather": True}, "ties": True},
    "fp16, distributed": {"ddp": {**SPLIT, "grad_reduce_in_fp32": True}, "dtype": torch.float16},
    "bf16, overlap": {"ddp": OVERLAP, "dtype": torch.bfloat16},
}
SETTINGS = [("plain", 2), ("overlap", 1), ("distributed", 1), ("distributed, overlap, tied", 2),
            ("fp16, distributed", 2), ("bf16, overlap", 2)]  # fmt: skip
"""With the number of stages."""
ROUNDING = 3 * 3 * 2.0**-24 * 10
"""In each of 3 steps each sum has 3 additions, each with half a unit in the last place; and ten times as much
where gradients nearly cancel. Ten times less is measured."""


def block_of(plan):
    """Nothing compressed on the links, so that what differs is the replicas' doing."""
    return {**NONE, "data_parallel": {"min_numel": 512, **plan}}


def ran(block, num_stages, options, steps=3):
    """Losses and norms; this rank's stage and weights; what went over the wire."""
    with replicas.parallel(num_stages, options.get("num_chunks", 1)):
        run = replicas.Run(block, **options)
        figures = run.train(steps)
        rows = run.pipeline.clapping_report() if block is not None else []
        found = figures, run.weights(), [row for row in rows if row["link"].startswith("replicas")]
    free_groups()
    return found


def compared(plans, num_stages, options):
    """Of stock, then of each plan."""
    return [ran(block, num_stages, options) for block in (None, *map(block_of, plans))]


def assert_near(figures, stock, tolerance):
    for step, of_stock in zip(figures, stock, strict=True):
        for value, expected in zip(step, of_stock, strict=True):
            assert value == (None if expected is None else pytest.approx(expected, rel=tolerance))


@pytest.mark.parametrize(("case", "num_stages"), SETTINGS)
def test_replicas(four_ranks, case, num_stages):
    """Stock, bit for bit, where nothing is compressed; else near it, all replicas alike, and fewer bytes."""
    plans = [{"scatter": "none", "gather": "none"}, EXACT, {"scatter": EDEN4, "gather": EDEN4},
             {**SIGN, "warmup_steps": 1}]  # fmt: skip
    outcomes = four_ranks.run(compared, plans, num_stages, CASES[case])
    is_split = "distributed" in case
    for (stock, weights, _), none, exact, eden, sign in outcomes:
        assert none[:2] == (stock, weights)
        if num_stages == 2:
            assert exact[:2] == (stock, weights)
        assert_near(exact[0], stock, ROUNDING if is_split else 0.02)
        assert_near(eden[0], stock, 0.02)
        assert_near(sign[0], stock, 0.4)
        assert sign[0][0] == stock[0] and sign[0][1][0] == stock[1][0], "the first step is a warm-up"
        assert eden[0][0] != stock[0] and eden[1] != weights != sign[1]
    for number in range(1 + len(plans)):
        assert_replicas_are_equal([of_rank[number][1] for of_rank in outcomes])
    if "tied" in case and num_stages == 2:
        first, last = outcomes[0], outcomes[-1]
        assert all(one[1][1][0] == other[1][1][-2] for one, other in zip(first, last, strict=True))
    rows = outcomes[0][3][2]
    ways = ["scatter"] if is_split or num_stages == 2 else ["scatter", "gather"]
    rows = [row for row in rows if row["direction"] != "raw"]
    assert [row["direction"] for row in rows] == ways * 4
    assert {row["link"] for row in rows} == {f"replicas {stage}" for stage in range(num_stages)}
    assert all(4 < row["bits_per_value"] < 4.5 for row in rows)


WEIGHTS = {"scatter": EDEN4, "weights": "eden4"}
BF16 = {"dtype": torch.bfloat16}
OF_WEIGHTS = {
    "bf16": {"ddp": SPLIT, **BF16},
    "bf16, overlap": {"ddp": {**SPLIT, **OVERLAP, "overlap_param_gather": True}, **BF16},
    "fp16": {"ddp": {**SPLIT, "grad_reduce_in_fp32": True}, "dtype": torch.float16},
    "bf16, tied": {"ddp": {**SPLIT, **OVERLAP, "overlap_param_gather": True}, "ties": True, **BF16},
    "bf16, chunks": {"ddp": {**SPLIT, **OVERLAP, "overlap_param_gather": True}, **BF16, **FLUSH},
}


@pytest.mark.parametrize("case", OF_WEIGHTS)
def test_changes_of_weights(four_ranks, case):
    plans = [{**WEIGHTS, "weights": "none", "scatter": "none"}, WEIGHTS, {**WEIGHTS, "warmup_steps": 2}]
    outcomes = four_ranks.run(compared, plans, 2, OF_WEIGHTS[case])
    for stock, none, ours, warm in outcomes:
        assert none[:2] == stock[:2]
        assert_near(ours[0], stock[0], 0.05)
        assert ours[1] != stock[1] != warm[1]
        assert warm[0][:2] == stock[0][:2], "the third step's gradients are the first that are compressed"
    for number in range(4):
        assert_replicas_are_equal([of_rank[number][1] for of_rank in outcomes])
        if "tied" in case:
            first, last = outcomes[0][number][1], outcomes[-1][number][1]
            assert first[1][0] == last[1][-2]
    rows = [row for row in outcomes[0][2][2] if row["direction"] != "raw"]
    assert [row["direction"] for row in rows] == ["scatter", "weights"] * 4
    assert all(4 < row["bits_per_value"] < 7 for row in rows)


def not_gathered():
    """Of replicas that did not gather all weights before the first step that compresses; of masters that are
    not finite: losses and weights."""
    found = []
    with replicas.parallel(1):
        ddp = {**SPLIT, "overlap_param_gather": True}
        run = replicas.Run(block_of({**WEIGHTS, "warmup_steps": 2}), ddp, dtype=torch.bfloat16)
        run.train(2)
        for chunk in run.chunks:
            chunk.disable_forward_pre_hook(param_sync=False)
        run.step()
        for chunk in run.chunks:
            chunk.enable_forward_pre_hook()
        run.train(2)
        found.append(run.weights())
        if dist.get_rank() == 0:
            run.optimizer.chained_optimizers[0].shard_fp32_from_float16_groups[0][-1].data[0] = torch.nan
        run.train(1)
        found.append((0, [int(w.isnan().sum()) for chunk in run.chunks for w in chunk.parameters()]))
        found.append(run.train(1)[0][0])
    free_groups()
    return found


def test_what_replicas_do_not_have_alike_is_gathered_and_what_is_not_finite_shows(two_ranks):
    outcomes = two_ranks.run(not_gathered)
    for number in range(2):
        assert_replicas_are_equal([of_rank[number] for of_rank in outcomes])
    for _, (_, num_nans), loss in outcomes:
        assert sum(num_nans) > 0 and loss != loss


def find_distances():
    """By kind of weight, squared: its distance to the owner's master copy, and what three steps changed."""
    found = {"compressed": [0.0, 0.0], "raw": [0.0, 0.0]}
    with replicas.parallel(1):
        run = replicas.Run(block_of(WEIGHTS), SPLIT, dtype=torch.bfloat16)
        gradients = run.pipeline.gradients
        started = [weight.detach().float().flatten() for weight in gradients.weights]
        run.train(3)
        masters = _make_masters(gradients.optimizers, gradients.weights)
        exchange = gradients.averaging.exchange
        for number, weight in enumerate(gradients.weights):
            of_kind = found["compressed" if weight.dim() > 1 and weight.numel() >= 512 else "raw"]
            for owner, start, stop in exchange.cut(number):
                if owner == exchange.collective.place and start < stop:
                    master = masters(Piece(number, start, stop))
                    mine = weight.detach().flatten()[start:stop]
                    of_kind[0] += float((mine - master).square().sum())
                    of_kind[1] += float((master - started[number][start:stop]).square().sum())
    free_groups()
    return found


def test_weights_follow_their_master_copies(two_ranks):
    """But for what one message loses of a change, and the rounding to bf16."""
    for found in two_ranks.run(find_distances):
        for distance, change in found.values():
            assert 0 < distance < 0.05 * change


def test_replicas_on_nodes(four_ranks):
    plan = {"scatter": "none", "gather": EDEN4, "node_size": 2}  # two nodes: as EXACT
    outcomes = four_ranks.run(compared, [plan], 1, {"ddp": OVERLAP})
    for (stock, *_), ours in outcomes:
        assert_near(ours[0], stock, ROUNDING)
    assert_replicas_are_equal([ours[1] for _, ours in outcomes])


def test_model_chunks(four_ranks):
    """Two on each rank, whose bucket groups are reduced in the order of chunks."""
    options = {"ddp": {**SPLIT, **OVERLAP}, **FLUSH}
    outcomes = four_ranks.run(compared, [EXACT, {"scatter": EDEN4}], 2, options)
    for stock, exact, eden in outcomes:
        assert exact[:2] == stock[:2]
        assert_near(eden[0], stock[0], 0.02)
    for number in range(3):
        assert_replicas_are_equal([of_rank[number][1] for of_rank in outcomes])


def scaled():
    """Runs of stock and of what must be the same, in pairs."""
    per_token = {"calculate_per_token_loss": True}
    averages = {"ddp": {**SPLIT, "average_in_collective": True}}  # not by gloo, in stock
    pairs = [({"ddp": SPLIT}, averages), (per_token, per_token), ({"ddp": SPLIT, **per_token},) * 2]
    return [(ran(None, 2, stock)[0], ran(block_of(EXACT), 2, ours)[0]) for stock, ours in pairs]


def test_gradients_are_scaled_as_in_stock(four_ranks):
    for stock, ours in (pair for of_rank in four_ranks.run(scaled) for pair in of_rank):
        assert ours == stock


def forced():
    """Where the schedule is told to all-reduce."""
    found = []
    for block in (None, block_of({})):
        with replicas.parallel(1):
            run = replicas.Run(block)
            found.append([run.step(force_all_reduce=True) for _ in range(2)])
        free_groups()
    return found


def repeated():
    """With a backward pass that no step follows, and without; whether all errors are alike."""
    found = []
    for num_passes in (1, 2):
        with replicas.parallel(1):
            run = replicas.Run(block_of(SIGN))
            run.step()
            for _ in range(num_passes):
                run.start_data()
                run.backward()
            run.optimizer.step()
            found.append((run.weights(), run.exchange.legs["scatter"].feedback.measure()))
        free_groups()
    return found


def test_steps_that_are_not_as_usual(two_ranks):
    for stock, ours in two_ranks.run(forced):
        assert ours == stock
    for once, twice in two_ranks.run(repeated):
        assert once == twice


def skipped(plan, ddp, overflow_step, steps):
    """Norms; weights; whether what is held back is after the skipped step what it was before it."""
    held, norms = [], []
    with replicas.parallel(2):
        run = replicas.Run(block_of(plan), {**ddp, "grad_reduce_in_fp32": True}, dtype=torch.float16)
        for step in range(steps):
            if step == overflow_step:
                run.optimizer.chained_optimizers[0].grad_scaler._scale.fill_(2.0**40)
            values = run.exchange.legs["scatter"].feedback.error.values
            scale = run.exchange.scale
            held.append({place: error / scale for place, error in values.items()})
            norms.append(run.step()[1])
        weights = run.weights()
    before, after = held[overflow_step : overflow_step + 2]
    is_kept = all(torch.allclose(after[p], before[p], rtol=1e-6, atol=0) for p in before)
    return norms, weights, is_kept and len(before) > 0 and before.keys() == after.keys()


SKIPPED = {
    "plain": (SIGN, {}),
    "distributed": (SIGN, {**SPLIT, **OVERLAP}),
    "weights": ({**SIGN, "weights": "eden4"}, {**SPLIT, **OVERLAP, "overlap_param_gather": True}),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_a_skipped_step_leaves_no_error(four_ranks, case):
    outcomes = four_ranks.run(skipped, *SKIPPED[case], 3, 6)
    assert_replicas_are_equal([weights for _, weights, _ in outcomes])
    for norms, _, is_kept in outcomes:
        assert None not in norms[:3] and norms[3] is None, "the fourth step overflowed"
        assert is_kept


def resumed(plan, options, folder):
    """Figures and weights after 3 more steps: of a run that goes on, and of one that loads what it saved."""
    found = []
    with replicas.parallel(2):
        run = replicas.Run(block_of(plan), **options)
        run.train(3)
        file = f"{folder}/{dist.get_rank()}.pt"
        torch.save(run.state_dict(), file)
        other = replicas.Run(block_of(plan), **options)
        assert other.load_state_dict(torch.load(file, weights_only=False)) is None
        for each in (run, other):
            each.start_data()
            found.append((each.train(3), each.weights(), each.pipeline.consumed_samples))
        state = run.pipeline.state_dict()
        state["gradients"]["exchange"]["written by"]["replicas"] = (0, 4, None)
        return *found, other.pipeline.load_state_dict(state), other.exchange.legs["scatter"].memory_nbytes


EF21 = {"scatter": "eden1", "gather": "eden1", "error_feedback": "ef21"}
RESUMED = {
    "plain": (EF21, CASES["plain"]),
    "distributed": (EF21, CASES["distributed"]),
    "weights": ({**EF21, "weights": "eden4"}, OF_WEIGHTS["bf16, overlap"]),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(four_ranks, tmp_path, case):
    for whole, again, why, num_held in four_ranks.run(resumed, *RESUMED[case], str(tmp_path)):
        assert whole == again
        assert "number of replicas" in why and num_held == 0


def refused_then_stock():
    """Figures of a run whose `weights` were refused, and of stock."""
    found = []
    with replicas.parallel(1):
        for block in (None, block_of({"weights": "int8"})):
            run = replicas.Run(block, SPLIT, compresses=False)
            if block is not None:
                with pytest.raises(ValueError, match="parameters in fp32"):
                    run.pipeline.compress_gradients(run.chunks, run.optimizer)
                run.run = get_forward_backward_func()
            found.append((run.train(2), run.weights()))
    free_groups()
    return found


def test_what_is_refused_leaves_stock(two_ranks):
    for stock, refused in two_ranks.run(refused_then_stock):
        assert refused == stock


def with_tensor_parallel_ranks():
    """Layers that each of them has as a whole, and one that is said to be a part."""
    with replicas.parallel(1, tensor_model_parallel_size=2):
        run = replicas.Run(block_of(SIGN), tensor_model_parallel_size=2)
        run.train(2)
        rows = [row for row in run.pipeline.clapping_report() if row["direction"] != "raw"]
        weights, num_rows = run.weights(), len(rows)
        run = replicas.Run(None, tensor_model_parallel_size=2)
        run.chunks[0].module.layers[1].linear.weight.tensor_model_parallel = True
        pipeline = replicas.MegatronPipeline({"clapping": block_of(SIGN)}, run.config)
        pipeline.compress_gradients(run.chunks, run.optimizer)
        tied = [each.name for each in pipeline.gradients.averaging.parameters if not each.is_tied]
        return weights, num_rows, tied


def test_what_tensor_parallel_ranks_have_as_a_whole_stays_equal(four_ranks):
    outcomes = four_ranks.run(with_tensor_parallel_ranks)
    assert_replicas_are_equal([weights for weights, *_ in outcomes])
    for _, num_rows, compressed in outcomes:
        assert num_rows == 0
        assert compressed == ["layers.1.linear.weight"]


# Bad input


def misused(plan, num_stages, change):
    """Of a script that does something wrong, on both ranks or on one."""
    with replicas.parallel(num_stages):
        options = {"ddp": SPLIT} if change == "split" else {}
        run = replicas.Run(block_of(plan), compresses=change in (None, "split", "twice"), **options)
        chunks, on_one = run.chunks, dist.get_rank() == 1
        if change == "instances" and on_one:
            chunks[0].ddp_config.num_distributed_optimizer_instances = 2
        if change == "experts" and on_one:
            chunks[0].expert_parallel_bucket_groups = chunks[0].bucket_groups
        if change == "loads":
            run.pipeline.load_state_dict(run.pipeline.state_dict())
        if change == "not at all":
            run.step()
        run.pipeline.compress_gradients(nn.Linear(2, 2) if change == "module" else chunks, run.optimizer)


BAD_INPUT = {
    "delay": ({"delay": 1}, 1, None, "data_parallel.delay = 1 with Megatron-Core"),
    "weights": ({"weights": "int8"}, 1, None, "weights = 'int8' with an optimizer that is not split"),
    "no master": ({"weights": "int8"}, 1, "split", "data_parallel.weights with parameters in fp32"),
    "one replica": ({}, 2, None, "data_parallel with 1 replica"),
    "node_size": ({"node_size": 3}, 1, None, "node_size = 3 with 2 replicas"),
    "split node": ({"node_size": 2}, 1, "split", "node_size = 2 with"),
    "matrices": ({"scatter": "lowrank"}, 1, "split", "scatter = 'lowrank' with an optimizer that is split"),
    "twice": ({}, 1, "twice", "compress_gradients was called for these model chunks before"),
    "instances": ({}, 1, "instances", "num_distributed_optimizer_instances = 2; accepted: 1"),
    "experts": ({}, 1, "experts", "expert_model_parallel_size > 1"),
    "module": ({}, 1, "module", "a model chunk of Linear; accepted: of Megatron-Core's"),
    "not at all": ({}, 1, "not at all", "data_parallel in a training step before compress_gradients"),
    "loads": ({}, 1, "loads", "load_state_dict with clapping.data_parallel before compress_gradients"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_error_on_every_rank(two_ranks, case):
    *settings, message = BAD_INPUT[case]
    assert_same_error(two_ranks.outcomes(misused, *settings), "ValueError", message)


def without_data_parallel():
    with replicas.parallel(2):
        run = replicas.Run(NONE)
        return run.pipeline.gradients, run.train(1), "gradients" in run.pipeline.state_dict()


def test_without_data_parallel_nothing_changes(two_ranks):
    (nothing, figures, _), _ = two_ranks.run(without_data_parallel)
    assert nothing is None and figures[0][1] > 0
