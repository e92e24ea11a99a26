"""Loss curves and what follows from them: every run is a block, times are those of the model by hand."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.codecs.peers import tah_quant
from benchmarks.files import RESULTS
from benchmarks.training import curves, reuse, time_to_loss, wan
from benchmarks.training.curves import (
    TAH_QUANT,
    TASKS,
    UNCOMPRESSED,
    Run,
    find_target,
    list_blocks,
    list_runs,
)
from benchmarks.training.real_time import add_up
from benchmarks.training.time_to_loss import OVERLAPPED, STOCK, Times, find_crossing, find_loss, find_step
from clapping_ds import ClappingConfig
from clapping_ds.stage.sampling import Coin

BLOCKS = [block for task in TASKS.values() for block in list_blocks(task).values()] + [
    *reuse.BLOCKS.values(),
    *wan.BLOCKS.values(),
]


def test_every_run_is_a_block():
    for block in BLOCKS:
        assert ClappingConfig.from_ds_config({"clapping": block}).enabled


def test_the_committed_curves_are_of_these_runs():
    rows = curves.read_curves(RESULTS / "time_to_loss_curves.csv")
    runs = {(row["task"], row["name"], row["num_links"]) for row in rows}
    assert runs <= {(run.task, run.name, run.num_links) for run in list_runs([1])}
    assert time_to_loss.list_trained(rows)


def test_runs_are_there_once_and_uncompressed_ones_come_first():
    runs = list_runs([1, 2])
    assert len(set(runs)) == len(runs)
    assert [run.name for run in runs[: 2 * len(TASKS)]] == [UNCOMPRESSED] * 2 * len(TASKS)


def test_the_same_samples_are_used_four_times():
    coin = Coin(reuse.P_NEW, "cycle", 1234, reuse.POOL)
    drawn = sum(sum(coin.toss(step, reuse.NUM_SLOTS)) for step in range(reuse.STEPS))
    assert drawn == reuse.NUM_MINI_BATCHES * reuse.NUM_SLOTS


def test_a_run_ends_when_it_is_as_good_as_uncompressed_twice(monkeypatch):
    task = replace(TASKS["byte GPT"], steps=4, most_steps=8, interval=2, warm_up_steps=2, pool=2)
    monkeypatch.setitem(curves.TASKS, "byte GPT", task)
    uncompressed = curves.measure(Run("byte GPT", UNCOMPRESSED, 3, 1), None)
    assert [row["step"] for row in uncompressed] == [2, 4]
    assert find_target(uncompressed, "byte GPT", 1) == uncompressed[-1]["loss"]
    for target, last in ((100.0, 4), (0.0, 8)):
        rows = curves.measure(Run("byte GPT", "lazy, uncompressed, pool", 1, 1), target)
        assert rows[-1]["step"] == last
    assert curves.measure(Run("byte GPT", TAH_QUANT, 1, 1), 100.0)[-1]["bits as sent"] == pytest.approx(
        tah_quant().bits, abs=1e-3
    )


CURVE = [(10, 3.0), (20, 2.0), (30, 2.5), (40, 1.0)]


def test_a_loss_is_reached_between_two_validations():
    assert find_crossing(CURVE, 2.5) == 15
    assert find_crossing(CURVE, 1.75) == 35
    assert find_crossing(CURVE, 0.9) is None
    assert find_loss(CURVE, 15) == 2.5
    assert find_loss(CURVE, 5) is None
    assert find_loss(CURVE, 400) == 1.0


def test_steps_that_fill_the_pool_take_their_own_time():
    times = Times(first=4.0, later=1.0, first_steps=10)
    assert [times.after(steps) for steps in (0, 5, 10, 30)] == [0, 20, 40, 60]
    assert [times.count_steps(times.after(steps)) for steps in (5, 10, 30)] == [5, 10, 30]


def test_a_link_that_takes_no_time_leaves_compute_alone():
    """3 stages and 8 micro-batches: the last stage waits for two forwards, the first for two backwards."""
    step = find_step(2, 8, 1e-9, 16.0, 16.0, 1.0, 0.0, False)
    assert step == pytest.approx(8 + 2)


def test_a_slow_link_takes_the_time_of_its_bytes():
    """One way at a time with stock, both at once with ours: about half."""
    stock, overlapped, fewer = (
        find_step(1, 16, 64.0, bits, bits, 1.0, 0.0, is_stock)
        for bits, is_stock in ((16.0, True), (16.0, False), (2.0, False))
    )
    assert overlapped == pytest.approx(16 * 64, rel=0.1)
    assert stock == pytest.approx(2 * overlapped, rel=0.1)
    assert fewer == pytest.approx(overlapped / 8, rel=0.1)


def test_codecs_hold_a_stage_up():
    """At the end of a pipeline with two of a link's four passes."""
    assert find_step(1, 8, 1e-9, 16.0, 16.0, 1.0, 0.5, False) == pytest.approx(1.25 * 9)


def test_traffic_is_that_of_a_large_model():
    traffic = time_to_loss.find_traffic("byte GPT", "direct transform 2, learned")
    assert (traffic.key_bits, traffic.p_new) == (pytest.approx(2.15, abs=0.02), 1.0)
    aqsgd = time_to_loss.find_traffic("byte GPT", "aqsgd int4")
    assert aqsgd == (16.0, 4.125, 0.0, 16.0, 80)
    start = time_to_loss.find_traffic("byte GPT", "direct transform 1, learned, start")
    # One token of 128 has no codes.
    assert (start.first_bits - start.key_bits, start.first_steps) == (pytest.approx(3 * 127 / 128), 40)
    assert time_to_loss.find_traffic("byte GPT", STOCK).key_bits == 16.0


def row_of(name, step, loss, num_links=3):
    return {"task": "byte GPT", "name": name, "num_links": num_links, "seed": 1, "step": step, "loss": loss,
            "codec share": 0.0}  # fmt: skip


def test_the_table_names_the_fastest():
    rows = [row_of(UNCOMPRESSED, step, loss) for step, loss in ((160, 3.0), (320, 2.0))]
    rows += [row_of("direct eden4", step, loss) for step, loss in ((320, 2.5), (640, 1.5))]
    rows += [row_of(TAH_QUANT, step, 2.5) for step in (320, 640)]
    found = list(time_to_loss.list_rows(time_to_loss.list_trained(rows)))
    mine = {
        row["run"]: row for row in found if (row["links"], row["micro-batches"], row["rho"]) == (3, 8, 64)
    }
    assert mine[STOCK]["of stock"] == mine[OVERLAPPED]["of overlapped"] == 1
    assert mine["direct eden4"]["steps"] == 480
    assert mine["direct eden4"]["of overlapped"] == pytest.approx(1.5 * 4.125 / 16, rel=0.1)
    assert mine[TAH_QUANT]["time"] is None
    best = {
        (row["links"], row["rho"]): row for row in time_to_loss.find_best(found) if row["micro-batches"] == 8
    }
    assert best[3, 64]["ours"] == "direct eden4"
    assert best[3, 64]["best of others"] == OVERLAPPED
    assert best[1, 64]["ours"] == "-"


def test_steps_that_were_not_made_take_the_time_of_those_after_settling():
    assert add_up([9.0, 5.0, 5.0, 2.0, 4.0], 5) == 25
    assert add_up([9.0, 5.0, 5.0, 2.0, 4.0], 8) == 25 + 3 * 3


def test_the_contest_s_meter_gives_its_records():
    assert wan.find_metered_s(16) == pytest.approx(wan.RECORDS[wan.DENSE].step_s, rel=0.006)
    assert wan.find_hidden_s(16) < wan.find_metered_s(16)
    assert wan.find_best_metered_s(1) == min(wan.find_metered_s(1, number) for number in (8, 16, 32, 64))
    assert wan.find_best_metered_s(1) < wan.find_metered_s(1)


def test_a_start_counts_with_its_own_bits():
    traffic = wan.find_traffic(wan.Start(1, 0.5, 40, 4).block())
    assert traffic.bits == pytest.approx(0.75 + 0.07, abs=0.01)
    assert traffic.start_bits - traffic.bits == pytest.approx(4 - 0.75, abs=0.01)
    assert traffic.find_times(lambda bits: bits).after(100) == pytest.approx(
        40 * traffic.start_bits + 60 * traffic.bits
    )
    assert traffic.find_times(lambda bits: bits).after(30) == pytest.approx(30 * traffic.start_bits)


def test_the_rate_of_wan_rises_stays_and_falls_to_zero():
    rates = [wan.find_rate(step, 400) for step in range(400)]
    assert rates[:40] == [(step + 1) / 20 for step in range(40)]
    assert rates[40:120] == [2.0] * 80
    assert rates[260] == pytest.approx(1.0)
    assert rates[399] == pytest.approx(1 / 140)


def test_t_is_steps_times_the_time_of_a_step():
    def row(name: str, horizon: int, step: int, loss: float) -> dict[str, Any]:
        return {"name": name, "seed": 1, "horizon": horizon, "step": step, "loss": loss}

    rows = [row(wan.DENSE, 320, step, loss) for step, loss in ((300, 2.1), (320, 2.0))]
    rows += [row("direct eden4", 400, step, loss) for step, loss in ((380, 2.2), (400, 2.1))]
    assert [line["T of dense"] for line in wan.list_rows(rows)][3:6] == [None] * 3
    rows += [row("direct eden4", 500, step, loss) for step, loss in ((460, 2.1), (480, 1.9), (500, 1.8))]
    dense, _, _, metered, best, hidden, _, reference = wan.list_rows(rows)
    assert (dense["T of dense"], metered["steps of dense"]) == (1, 1.5)
    assert metered["T of dense"] == pytest.approx(
        1.5 * metered["mean step s"] / dense["mean step s"], rel=1e-3
    )
    assert hidden["T of dense"] < best["T of dense"] < metered["T of dense"]
    assert reference["T of dense"] == pytest.approx(181_487 / 293_889, rel=1e-3)
