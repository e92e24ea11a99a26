"""The benchmark over shaped links: its arithmetic, what it refuses, and that it leaves nothing behind."""

import os
import subprocess
import sys

import pytest

from benchmarks.files import read_csv, write_csv
from benchmarks.links import network, pipeline
from benchmarks.links.rows import Compute, Wire, bound_s, compared, plot, timing, traffic
from benchmarks.training.compare import STOCK
from clapping_ds import ClappingConfig
from launch.gpt import GPTConfig

NO_WIRE = Wire(activations_s=0.0, gradients_s=0.0, least_s=0.0)
EVEN = Compute(forward_s_0=1.0, backward_s_0=2.0, forward_s_1=1.0, backward_s_1=2.0)
needs_network = pytest.mark.skipif(bool(network.missing()), reason=f"missing: {network.missing()}")


def answer(step_s, loss=2.0):
    return {
        "step_s": step_s, "loss": loss, "overhead_s": 0.5, "forward_s": [1.0, 1.0, 4.0],
        "backward_s": [2.0, 2.0, 2.0], "encode_s": [0.1, 0.3], "decode_s": [],
    }  # fmt: skip


def row(run, step_s, payload_bytes, losses="2.5 2.25"):
    return {
        "run": run, "rho": 1.0, "raw_bytes": 300, "bandwidth_bytes_per_s": 100.0, "micro_batches": 4,
        "in_flight": 2, "key_bytes": payload_bytes, "delta_bytes": payload_bytes,
        "activations_bytes": 4 * payload_bytes, "gradients_bytes": 4 * payload_bytes, "step_s": step_s,
        "step_min_s": step_s, "step_max_s": step_s, **vars(EVEN), "train_losses": losses,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("compute", "wire", "bound"),
    [
        # Stage 1 waits for the first forward of stage 0, whose last backward waits for stage 1.
        (EVEN, NO_WIRE, 1 + 4 * 3 + 2),
        # Stage 0 is busy throughout: nothing comes before it or after it.
        (Compute(5.0, 5.0, 1.0, 1.0), NO_WIRE, 4 * 10),
        # Activations: a forward, four messages, stage 1, the gradient's way back, a backward.
        (EVEN, Wire(10.0, 1.0, 1.0), 1 + 4 * 10 + 3 + 1 + 2),
        # Gradients: a forward, its message, stage 1, four messages, a backward.
        (EVEN, Wire(1.0, 10.0, 1.0), 1 + 1 + 3 + 4 * 10 + 2),
    ],
)
def test_the_bound_is_the_busiest_resource_with_what_must_come_before_and_after(compute, wire, bound):
    assert bound_s(compute, wire, micro_batches=4) == bound


def test_the_rate_makes_a_micro_batch_take_rho_times_as_long_on_the_link_as_on_a_stage():
    rate = pipeline.link_rate(rho=2.0, raw_bytes=1_000_000, stage_s=0.04)
    assert 1_000_000 * 8 / rate == pytest.approx(2.0 * 0.04)


def test_a_micro_batch_is_as_many_bytes_as_the_model_sends():
    size = pipeline.Size(gpt=GPTConfig(length=64, width=512))
    assert size.raw_bytes == 64 * 512 * 4


def test_every_run_has_a_block_that_is_accepted():
    assert pipeline.RUNS[STOCK] is None
    for name, block in pipeline.RUNS.items():
        if name != STOCK:
            assert ClappingConfig.from_ds_config({"clapping": {**block, "compile": True}}).enabled


def test_times_are_medians_and_a_step_lasts_as_long_as_its_slower_rank():
    figures = timing([[answer(5.0), answer(7.0)], [answer(6.0), answer(6.0)], [answer(9.0), answer(1.0)]])
    assert (figures["step_s"], figures["step_min_s"], figures["step_max_s"]) == (7.0, 6.0, 9.0)
    assert (figures["forward_s_0"], figures["backward_s_1"]) == (1.0, 2.0)
    assert figures["mean_forward_s_0"] == 2.0
    assert figures["encode_s"] == pytest.approx(0.2)
    assert (figures["decode_s"], figures["overhead_s"]) == (0.0, 0.5)


def test_stock_sends_raw_bytes():
    figures = traffic({"report": []}, {"report": []}, raw_bytes=100, micro_batches=4)
    assert figures == {
        "activations_bytes": 400, "gradients_bytes": 400, "key_bytes": 100, "delta_bytes": 100,
        "fresh_share": 1.0,
    }  # fmt: skip


def test_traffic_is_that_of_the_measured_steps_alone():
    def report(messages, payload_bytes, fresh_share):
        counters = {"messages": messages, "payload_bytes": payload_bytes, "fresh_share": fresh_share}
        directions = ("activations", "gradients")
        return {
            "report": [{"direction": name, **counters} for name in directions],
            "key_bytes": 100,
            "delta_bytes": 20,
        }

    warm_up, end = report(8, 8 * 100, 1.0), report(24, 8 * 100 + 4 * 100 + 12 * 20, 0.5)
    figures = traffic(warm_up, end, raw_bytes=400, micro_batches=4)
    assert figures["activations_bytes"] == figures["gradients_bytes"] == 100 + 3 * 20
    assert figures["fresh_share"] == pytest.approx(4 / 16)
    assert (figures["key_bytes"], figures["delta_bytes"]) == (100, 20)


def test_rows_are_compared_with_stock_and_with_their_bound():
    slower = {**row("half the bytes", 20.0, 150, losses="2.5 2.26"), "forward_s_0": 1.5}
    stock, ours = compared([row(STOCK, 40.0, 300), slower])
    assert (stock["speed_up"], ours["speed_up"]) == (1.0, 2.0)
    assert (stock["losses_equal_stock"], ours["losses_equal_stock"]) == (True, False)
    assert ours["bound_s"] == (1 + 1.5) + 4 * 3 + (1.5 + 2), "the least compute of all rows counts"
    assert ours["efficiency"] == ours["bound_s"] / 20.0
    assert ours["rho_measured"] == (300 / 100) / 3


def test_the_plot_needs_the_csv_alone(tmp_path):
    rows = compared([row(STOCK, 40.0, 300), row("half the bytes", 20.0, 150)])
    write_csv(tmp_path / "pipeline.csv", rows)
    plot(tmp_path / "pipeline.csv", tmp_path / "pipeline.png")
    assert (tmp_path / "pipeline.png").stat().st_size > 10_000
    assert [line["run"] for line in read_csv(tmp_path / "pipeline.csv")] == [STOCK, "half the bytes"]


def test_without_root_or_tools_it_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pipeline", "--results", str(tmp_path)])
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"needs root.*Missing: root, ip, tc, taskset, sysctl") as refusal:
        pipeline.main()
    assert isinstance(refusal.value.code, str), "a message to stderr, and exit status 1"
    assert not list(tmp_path.iterdir())


def test_a_rank_that_dies_is_an_error_with_its_log(tmp_path):
    class Broken:
        def prefix(self, end):
            return ["sh", "-c", "echo no such luck >&2"]

    with pytest.raises(RuntimeError, match="no such luck"), pipeline.started(Broken()) as ranks:
        ranks.ask("build")


@needs_network
def test_a_network_shapes_both_ends_and_is_removed_after_an_error():
    def shaping(namespace):
        return subprocess.check_output(["tc", "-n", namespace, "qdisc", "show"], text=True)

    def use():
        with network.open_network() as made:
            made.shape(10e6)
            assert all("tbf" in shaping(name) and "10Mbit" in shaping(name) for name in made.namespaces)
            made.shape(None)
            assert not any("tbf" in shaping(name) for name in made.namespaces)
            route = [*made.prefix(0), "ip", "route", "get", network.ADDRESSES[1]]
            assert network.DEVICE in subprocess.check_output(route, text=True)
            made.shape(-1.0)

    with pytest.raises(RuntimeError, match=r"qdisc replace .* rate -1bit"):
        use()
    left = subprocess.check_output(["ip", "netns", "list"], text=True)
    assert f"clapping-{os.getpid()}-" not in left
