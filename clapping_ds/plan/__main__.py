"""Options, the table, and what to use."""

import json
import sys
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import clapping_ds.plan
from clapping_ds.autotune.decision import Decision
from clapping_ds.plan.machines import GPUS, Gpu, Machines
from clapping_ds.plan.models import Model, from_config, from_numbers
from clapping_ds.plan.ways import TRAININGS, Estimate, Task, list_ways
from clapping_ds.report import format_table

CLOSE = 1.05
"""Of two ways that differ by less, the one that does less to the training."""


def parse(arguments: Sequence[str]) -> Task:
    parser = ArgumentParser(
        "python -m clapping_ds.plan",
        description=clapping_ds.plan.__doc__,
        formatter_class=RawTextHelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="a Hugging Face config.json, or its folder")
    model.add_argument("--parameters", type=float, help="in place of --model, with the next two: such as 7e9")
    model.add_argument("--layers", type=int)
    model.add_argument("--width", type=int, help="hidden size")
    model.add_argument("--vocabulary", type=int, default=32_000)
    model.add_argument(
        "--active", type=float, default=0.0, help="parameters that a token passes, with experts"
    )
    model.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    model.add_argument("--train", choices=TRAININGS, default="full")
    model.add_argument("--batch", type=int, default=32, help="sequences of a step, on all GPUs")
    machines = parser.add_argument_group("machines")
    machines.add_argument("--gpu", choices=GPUS, default="A100")
    machines.add_argument("--tflops", type=float, help="in place of --gpu, with the next two; dense, 16 bits")
    machines.add_argument("--memory-gb", type=float)
    machines.add_argument("--gb-per-s", type=float, help="of the GPU's memory")
    machines.add_argument("--efficiency", type=float, default=0.4, help="share of that rate which is reached")
    machines.add_argument("--nodes", type=int, default=2)
    machines.add_argument("--gpus-per-node", type=int, default=1)
    machines.add_argument("--mbit", type=float, help="speed between nodes")
    machines.add_argument("--ms", type=float, default=0.1, help="latency between nodes")
    machines.add_argument(
        "--links", type=Path, help='in place of --mbit and --ms: a file that "links.write" wrote'
    )
    options = parser.parse_args(arguments)
    try:
        return Task(_read_model(options), _read_machines(options), options.batch, TRAININGS[options.train])
    except (ValueError, ImportError) as error:
        parser.error(str(error))


def _read_model(options: Namespace) -> Model:
    if options.model is not None:
        return from_config(options.model, options.length)
    numbers = options.parameters, options.layers, options.width
    if None in numbers:
        raise ValueError("no model; accepted: --model, or --parameters, --layers and --width")
    return from_numbers(*numbers, options.length, options.vocabulary, options.active)


def _read_machines(options: Namespace) -> Machines:
    gpu = GPUS[options.gpu]
    if options.tflops is not None:
        if options.memory_gb is None or options.gb_per_s is None:
            raise ValueError(f"--tflops {options.tflops} alone; accepted: with --memory-gb and --gb-per-s")
        gpu = Gpu(options.tflops, options.memory_gb, options.gb_per_s)
    mbit, ms = options.mbit, options.ms
    if options.links is not None:
        try:
            choices = Decision.model_validate_json(options.links.read_text()).choices
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--links {options.links}: {error}; accepted: a file written by links.write"
            ) from None
        mbit = min(choice.mbit_per_s for choice in choices)
        ms = max(choice.latency_ms for choice in choices)
    if mbit is None and options.nodes > 1:
        raise ValueError("no speed between nodes; accepted: --mbit (and --ms), or --links")
    for name, value in (
        ("batch", options.batch),
        ("nodes", options.nodes),
        ("gpus-per-node", options.gpus_per_node),
        ("efficiency", options.efficiency),
        ("length", options.length),
        ("mbit", 1.0 if mbit is None else mbit),
    ):
        if not value > 0:
            raise ValueError(f"--{name} {value}; accepted: above 0")
    return Machines(
        gpu, options.nodes, options.gpus_per_node, (mbit or 1.0) * 1e6 / 8, ms / 1e3,
        efficiency=options.efficiency,
    )  # fmt: skip


def choose(ways: Sequence[Estimate], memory_bytes: float) -> Estimate | None:
    """The fastest that fits; of those that are close to it, the one that does least to the training: no part
    of this package, then the least added loss."""
    fitting = [way for way in ways if way.trains_as_asked and way.memory_bytes <= memory_bytes]
    if not fitting:
        return None
    fastest = min(way.step_s for way in fitting)
    close = [way for way in fitting if way.step_s <= CLOSE * fastest]
    return min(close, key=lambda way: (way.block is not None, way.added_loss, way.wire_bytes))


def describe(task: Task) -> str:
    """The table, and what to use."""
    ways, machines = list(list_ways(task)), task.machines
    memory_bytes = machines.gpu.memory_gb * 1e9
    tokens = task.batch * task.model.length
    rows = [
        {
            "": way.way,
            "step s": f"{way.step_s:.3g}",
            "tokens/s": f"{tokens / way.step_s:.4g}",
            "GB per GPU": f"{way.memory_bytes / 1e9:.3g}",
            "fits": "yes" if way.memory_bytes <= memory_bytes else "no",
            "MB on a link": f"{way.wire_bytes / 1e6:.4g}" if way.wire_bytes else "-",
            "nats": f"{way.added_loss:.3f}" if way.num_links else "-",
        }
        for way in ways
    ]
    model = task.model
    head = (
        f"{model.name}: {model.parameters / 1e9:.3g}B parameters, {model.num_layers} layers of width "
        f"{model.width}; steps of {task.batch} sequences of {model.length} tokens; {machines.num_nodes} x "
        f"{machines.gpus_per_node} GPUs of {machines.gpu.memory_gb:g} GB; modelled, nothing is measured"
    )
    return f"{head}\n\n{format_table(rows)}\n\n{advise(task, ways)}"


def advise(task: Task, ways: Sequence[Estimate]) -> str:
    best = choose(ways, task.machines.gpu.memory_gb * 1e9)
    if best is None:
        return "Nothing fits: more nodes, GPUs with more memory, or --train lora or qlora."
    if best.block is None:
        on_one = "It fits on one node: use" if best.way.startswith("one ") else "Use"
        return f"{on_one} {best.way}. This package has no part in it."
    told = f"Use {best.way}, with this in DeepSpeed's JSON:\n\n" + json.dumps(
        {"clapping": best.block}, indent=2
    )
    if best.added_loss:
        told += (
            "\n\nnats: what the codec added to the loss of SmolLM2-135M over as many links, with nothing "
            "trained; training adapts to most of it. Measure it on your model before a long run."
        )
    return told


def main(arguments: Sequence[str]) -> None:
    print(describe(parse(arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
