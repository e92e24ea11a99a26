"""`python -m clapping_ds.plan`: sizes as counted, ways as worked out by hand, the choice, and its errors."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.files import RESULTS, read_csv
from benchmarks.links.simulate import MOST_WRONG, check_row
from clapping_ds.autotune.decision import Choice, Decision
from clapping_ds.codecs import Raw
from clapping_ds.config import ClappingConfig
from clapping_ds.plan.__main__ import advise, choose, describe, main, parse
from clapping_ds.plan.machines import GPUS, Machines
from clapping_ds.plan.models import from_config, from_numbers
from clapping_ds.plan.timeline import Link, Stage, Step, simulate, trace
from clapping_ds.plan.ways import LOSSES, TRAININGS, Pipeline, Task, list_ways

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 704,
    "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000, "tie_word_embeddings": False,
}  # fmt: skip
TWO_NODES = ["--gpu", "RTX 4090", "--nodes", "2", "--mbit", "1000", "--ms", "1"]
SEVEN = ["--parameters", "7e9", "--layers", "32", "--width", "4096"]


def test_what_is_counted_is_what_numbers_give(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    counted = from_config(tmp_path, 512)
    given = from_numbers(counted.parameters, 6, 256, 512, vocabulary=1000)
    assert counted.layer_parameters == 4 * 256**2 + 3 * 256 * 704 + 2 * 256
    assert counted.layer_parameters == pytest.approx(given.layer_parameters, rel=1e-3)
    assert counted.layer_flop == pytest.approx(given.layer_flop, rel=1e-2)
    assert counted.head_flop == given.head_flop


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 500}),
        ("qwen2", {**LLAMA, "model_type": "qwen2"}),
        ("gemma", {**LLAMA, "model_type": "gemma", "head_dim": 32}),
        ("gemma3", {"text_config": {**LLAMA, "model_type": "gemma3_text", "head_dim": 32}}),
    ],
)
def test_models_of_several_kinds(tmp_path, kind, options):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **options}))
    found = from_config(tmp_path / "config.json", 64)
    assert found.num_layers * found.layer_parameters < found.parameters
    assert found.layer_flop > 2 * 64 * found.layer_parameters * 0.95


def test_experts_are_counted(tmp_path):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "mixtral", **experts}))
    found = from_config(tmp_path, 64)
    passed = 4 * 256**2 + 2 * 3 * 256 * 704
    assert found.has_experts
    assert found.layer_flop == pytest.approx(64 * (2 * passed + 4 * 64 * 256), rel=0.01)


def test_tied_tables_are_both_ends(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": True}))
    found = from_config(tmp_path, 64)
    assert found.tied_parameters == found.last_parameters == 256_000
    assert found.table_parameters == found.first_parameters


def test_longer_than_the_model_knows(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "max_position_embeddings": 32}))
    with pytest.raises(ValueError, match="length = 64 of at most 32 positions"):
        from_config(tmp_path, 64)


def test_every_measured_step_is_modelled_to_ten_percent():
    found = [check_row(row) for row in read_csv(RESULTS / "pipeline.csv")]
    assert len(found) == 49
    assert all(abs(row["predicted/measured"] - 1) <= MOST_WRONG for row in found)


@pytest.mark.parametrize("order", ["stock", "ours"])
def test_a_trace_is_of_the_step_that_is_simulated(order):
    step = Step((Stage(0.3, 0.7),) * 3, (Link(1.0, 0.1),) * 2, (0.5,) * 4, (0.25,) * 4)
    found, timeline = trace(step, order, 1), simulate(step, order, 1)
    assert max(span.end_s for spans in found.values() for span in spans) == timeline.step_s
    for number in range(3):
        passes = [*found[number, "forward"], *found[number, "backward"]]
        assert sum(end_s - start_s for _, start_s, end_s in passes) == pytest.approx(4.0)
    for link in range(2):
        carried = found[link, "activations"]
        assert [span.slot for span in carried] == [0, 1, 2, 3]
        assert all(later.start_s >= earlier.end_s for earlier, later in pairwise(carried))


PUBLISHED_RHO, PUBLISHED_SPEED_UP, PUBLISHED_BITS = 3.5, 5.4, 4.41
"""TAH-Quant (arXiv 2506.01352): GPT2-XL, activations of fp32, against uncompressed."""


def test_the_published_speed_up_is_that_of_runs_that_do_not_overlap():
    """The paper does not say whether its runs overlap. By the model, both block: 5.0, a factor of 0.92 (rho
    is read off its text). Against a baseline that overlaps it would be 3.8."""
    num_stages, slots = 8, 32
    stages = (Stage(0.25, 0.75),) * num_stages

    def step_s(bits, order):
        message = PUBLISHED_RHO * bits / 32
        step = Step(stages, (Link(1.0),) * (num_stages - 1), (message,) * slots, (message,) * slots)
        return min(simulate(step, order, depth).step_s for depth in range(4))

    blocking = step_s(32, "stock") / step_s(PUBLISHED_BITS, "stock")
    assert blocking / PUBLISHED_SPEED_UP == pytest.approx(0.92, abs=0.01)
    assert step_s(32, "ours") / step_s(PUBLISHED_BITS, "ours") == pytest.approx(3.8, abs=0.05)


def task(parameters=7e9, batch=32, train="full", gpu="A100", nodes=4, per_node=1, mbit=1000.0):
    model = from_numbers(parameters, 32, 4096, 2048)
    return Task(model, Machines(GPUS[gpu], nodes, per_node, mbit * 1e6 / 8, 1e-3), batch, TRAININGS[train])


def ways(**options):
    return {way.way: way for way in list_ways(task(**options))}


def test_ways_by_hand():
    found, model = ways(), task().model
    layers, head = model.num_layers * model.layer_flop, model.head_flop
    rate = GPUS["A100"].tflops * 1e12 * 0.4
    sequence_s = (4 * layers + 3 * head) / rate
    assert found["one GPU"].step_s == pytest.approx(32 * sequence_s, rel=0.01)
    assert found["one GPU"].memory_bytes > 18 * 7e9
    ddp = found["data parallel"]
    assert ddp.wire_bytes == pytest.approx(2 * 3 / 4 * 2 * 7e9)
    hidden_s = sequence_s * 3 / 4
    assert ddp.step_s == pytest.approx(8 * sequence_s + ddp.wire_bytes / 125e6 - hidden_s, rel=0.01)
    assert 9 * 7e9 < ddp.memory_bytes < 10 * 7e9
    assert found["data parallel, eden4"].wire_bytes == pytest.approx(ddp.wire_bytes * 4.125 / 16)
    alone = found["DiLoCo, H = 100"]
    assert alone.wire_bytes == pytest.approx(ddp.wire_bytes / 100)
    assert alone.step_s == pytest.approx(8 * sequence_s + ddp.wire_bytes / 125e8, rel=0.02)
    assert alone.memory_bytes > 18 * 7e9 and not alone.trains_as_asked
    pipeline = found["pipeline of 4, overlapped"]
    assert pipeline.wire_bytes == 2 * 32 * 2048 * 4096 * 2  # both directions leave the nodes in the middle
    assert pipeline.step_s > 32 * sequence_s / 4
    assert found["pipeline of 4, eden4"].wire_bytes == pytest.approx(pipeline.wire_bytes * 4.125 / 16)
    assert found["pipeline of 4, stock"].step_s >= pipeline.step_s
    assert found["pipeline of 4, eden4"].num_links == 3
    assert {each.shape for each in found.values()} == {
        "", "pipeline of 2 x 2", "pipeline of 3", "pipeline of 4",
    }  # fmt: skip


def test_zero_takes_the_micro_batch_that_is_best_and_fits():
    found = ways()
    one = 3 / 4 * 3 * 2 * 7e9
    assert found["ZeRO-3"].wire_bytes == pytest.approx(one)
    assert found["ZeRO-3"].step_s == pytest.approx(one / 125e6, rel=0.01)
    assert found["ZeRO-3"].memory_bytes < 80e9
    small = ways(gpu="A100 40GB")
    assert small["ZeRO-3"].wire_bytes == pytest.approx(2 * one)  # four sequences of eight fit
    assert small["ZeRO-3"].memory_bytes < found["ZeRO-3"].memory_bytes
    inside = ways(nodes=2, per_node=4)
    assert inside["ZeRO-3 in each node"].wire_bytes == pytest.approx(2 * 7e9)
    assert inside["one node, ZeRO-3"].wire_bytes == 0


def test_tied_tables_cross_the_links():
    model = replace(task().model, tied_parameters=32_000 * 4096.0)
    tied, untied = (
        Pipeline(replace(task(), model=each), 4).estimate("none") for each in (model, task().model)
    )
    assert tied.wire_bytes - untied.wire_bytes == pytest.approx(2 * 32_000 * 4096)
    assert tied.step_s - untied.step_s == pytest.approx(2 * 32_000 * 4096 / 125e6 + 2e-3)


def test_stages_of_a_node_share_its_link():
    two, one = (Pipeline(task(per_node=per_node, nodes=4), 2 * per_node, 2) for per_node in (2, 1))
    both = [each.estimate("none").wire_bytes for each in (two, one)]
    assert both[0] == pytest.approx(both[1], rel=0.1)


DAMAGE = {
    "fp8_e4m3": "fp8_e4m3", "eden4": "eden4", "transform, 3 bits": "transform bits 3 anchors 1024",
}  # fmt: skip
"""Of each codec, the row of the measurement."""


def test_added_losses_are_those_that_were_measured():
    rows = [row for row in read_csv(RESULTS / "damage.csv") if row["text"] == "C++"]
    for codec, name in DAMAGE.items():
        measured = {int(row["links"]): float(row["damage"]) for row in rows if row["codec"] == name}
        assert LOSSES[codec] == pytest.approx(measured, abs=0.0006)


def test_beyond_seven_links_the_loss_grows_on():
    found = Pipeline(task(nodes=16), 16).estimate("eden4")
    assert (found.num_links, found.added_loss) == (15, pytest.approx(0.111 * 15 / 7))


def test_blocks_are_accepted():
    for way in ways().values():
        assert way.block is None or ClappingConfig.model_validate(way.block).enabled


def test_layers_are_split_so_that_the_slowest_stage_is_fastest():
    found = Pipeline(task(), 5).layers
    assert sum(found) == 32
    assert found[-1] <= min(found[:-1]) <= max(found) <= min(found[:-1]) + 1


def test_the_choice():
    def told(**options):
        the_task = task(**options)
        memory_bytes = the_task.machines.gpu.memory_gb * 1e9
        return advise(choose(list(list_ways(the_task)), memory_bytes))

    assert told(parameters=0.5e9, nodes=1, per_node=8).startswith("It fits on one node: use one node, data")
    assert told(nodes=1, per_node=8).startswith("It fits on one node: use one node, data parallel")
    assert told(parameters=70e9, gpu="H100", nodes=2, per_node=8, mbit=25_000, train="lora").startswith(
        "Use ZeRO-3 in each node. This package has no part in it"
    )
    assert told(parameters=0.5e9, nodes=2, per_node=8, mbit=100).startswith("It fits on one node: use one")
    assert told(parameters=0.5e9, nodes=2, mbit=100_000).startswith("Use data parallel. This package has no")
    assert '"codec": "fp8_e4m3"' in told(mbit=1000)
    assert told(parameters=70e9).startswith("Nothing fits")
    assert told(train="qlora", gpu="RTX 4090", nodes=2, mbit=1000).startswith("Use data parallel")


def test_a_codec_that_harms_more_must_be_faster():
    found = {way.way: way for way in list_ways(task(nodes=8))}
    best = choose(list(found.values()), 80e9)
    assert best.codec == "fp8_e4m3"
    assert found["pipeline of 8, transform, 3 bits"].step_s < best.step_s


def test_the_choice_prefers_what_does_less_to_the_training():
    the_task = task(nodes=4, mbit=20_000)
    best = choose(list(list_ways(the_task)), 80e9)
    assert best.codec == "none" and best.added_loss == 0.0


def test_the_table(capsys):
    main([*SEVEN, *TWO_NODES, "--train", "qlora", "--batch", "4"])
    said = capsys.readouterr().out
    assert "7B parameters, 32 layers of width 4096; steps of 4 sequences" in said
    assert "pipeline of 2, eden4" in said and "one GPU" in said and "nothing is measured" in said


def test_links_as_they_were_measured(tmp_path):
    choice = {"codec": Raw(), "raw_ms": 1.0, "compressed_ms": 1.0}
    choices = [
        Choice(link="0-1", direction=way, mbit_per_s=mbit, latency_ms=ms, **choice)
        for way, mbit, ms in (("activations", 100.0, 2.0), ("gradients", 90.0, 1.0))
    ]
    path = tmp_path / "links.json"
    Decision(num_stages=2, in_flight=0, stage_ms=1.0, choices=choices).write(str(path))
    machines = parse([*SEVEN, "--links", str(path)]).machines
    assert (machines.bytes_per_s, machines.latency_s) == (90e6 / 8, 2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model; accepted: --model, or --parameters, --layers and --width"),
        (SEVEN, "no speed between nodes; accepted: --mbit (and --ms), or --links"),
        ([*SEVEN, "--mbit", "0"], "--mbit 0.0; accepted: above 0"),
        ([*SEVEN, "--mbit", "100", "--batch", "0"], "--batch 0; accepted: above 0"),
        (
            [*SEVEN, "--mbit", "100", "--tflops", "10"],
            "--tflops, --memory-gb, --gb-per-s = 10.0, None, None; accepted: all",
        ),
        (["--parameters", "1e6", *SEVEN[2:], "--mbit", "9"], "parameters = 1e+06; accepted: more than the"),
        (["--model", "nowhere.json", "--mbit", "9"], "model = 'nowhere.json': [Errno 2] No such file"),
        ([*SEVEN, "--mbit", "100", "--ms", "-1"], "--ms -1.0; accepted: 0 or more"),
        ([*SEVEN, "--mbit", "100", "--memory-gb", "9"], "= None, 9.0, None; accepted: all three, or none"),
        (
            [*SEVEN, "--mbit", "100", "--active", "2e8"],
            "active = 2e+08; accepted: above 2.62144e+08, to 7e+09",
        ),
        ([*SEVEN[:2], "--layers", "0", *SEVEN[4:], "--mbit", "9"], "layers = 0; accepted: 1 or more"),
        ([*SEVEN, "--links", "nowhere.json"], "--links nowhere.json: [Errno 2] No such"),
    ],
)
def test_wrong_options_are_one_error(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_config_of_no_language_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(ValueError, match=r"accepted: a config.json of a causal"):
        from_config(path, 64)
    assert "modelled" in describe(task())
