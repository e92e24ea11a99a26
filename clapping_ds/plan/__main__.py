"""Options, the table, and what to use."""

import gc
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
PRICE = 5.0
"""Of a nat: a codec that adds 0.02 must be faster by a tenth."""


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
    machines.add_argument("--inside-gb-per-s", type=float, help="between GPUs of a node, each way")
    machines.add_argument("--efficiency", type=float, default=0.4, help="share of that rate which is reached")
    machines.add_argument("--nodes", type=int, default=2)
    machines.add_argument("--gpus-per-node", type=int, default=1)
    machines.add_argument("--mbit", type=float, help="that a node sends to others, and receives")
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
    _check_numbers(options)
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
    gpu = GPUS[options.gpu]
    if options.tflops is not None:
        gpu = Gpu(options.tflops, options.memory_gb, options.gb_per_s)
    if options.inside_gb_per_s is not None:
        gpu = gpu._replace(inside_gb_per_s=options.inside_gb_per_s)
    bytes_per_s = (mbit or 1.0) * 1e6 / 8
    return Machines(gpu, options.nodes, options.gpus_per_node, bytes_per_s, ms / 1e3, options.efficiency)


def _check_numbers(options: Namespace) -> None:
    own = options.tflops, options.memory_gb, options.gb_per_s
    if None in own and any(number is not None for number in own):
        raise ValueError(
            f"--tflops, --memory-gb, --gb-per-s = {own[0]}, {own[1]}, {own[2]}; accepted: all three, or none"
        )
    if options.ms < 0:
        raise ValueError(f"--ms {options.ms}; accepted: 0 or more")
    for name in (
        *("batch", "nodes", "gpus_per_node", "efficiency", "length", "mbit"),
        *("tflops", "memory_gb", "gb_per_s", "inside_gb_per_s"),
    ):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}; accepted: above 0")


def choose(ways: Sequence[Estimate], memory_bytes: float) -> Estimate | None:
    """Of those that fit the fastest, where added loss has its price; of those that are close to it, the one
    that does least to the training: no part of this package, then the least added loss."""

    def cost(way: Estimate) -> float:
        return way.step_s * (1 + PRICE * way.added_loss)

    fitting = [way for way in ways if way.trains_as_asked and way.memory_bytes <= memory_bytes]
    if not fitting:
        return None
    least = min(map(cost, fitting))
    close = [way for way in fitting if cost(way) <= CLOSE * least]
    return min(close, key=lambda way: (way.block is not None, way.num_links > 0, way.added_loss, cost(way)))


def describe(task: Task) -> str:
    """The table, and what to use."""
    ways, machines = list(list_ways(task)), task.machines
    memory_bytes = machines.gpu.memory_gb * 1e9
    best = choose(ways, memory_bytes)
    divided = [number for number in range(1, machines.num_nodes + 1) if machines.num_nodes % number == 0]
    shown = {number * machines.gpus_per_node for number in divided}
    """Stages of pipelines that use all nodes; of the others only the best is shown."""
    tokens = task.batch * task.model.length
    rows = [
        {
            "": way.way,
            "step s": f"{way.step_s:.3g}",
            "tokens/s": f"{tokens / way.step_s:.4g}",
            "GB per GPU": f"{way.memory_bytes / 1e9:.3g}",
            "fits": "yes" if way.memory_bytes <= memory_bytes else "no",
            "MB on a link": f"{way.wire_bytes / 1e6:.4g}" if way.wire_bytes else "-",
            "nats": "?" if not way.trains_as_asked else f"{way.added_loss:.3f}" if way.num_links else "-",
        }
        for way in ways
        if not way.shape or way.num_stages in shown or (best is not None and way.shape == best.shape)
    ]
    model = task.model
    head = (
        f"{model.name}: {model.parameters / 1e9:.3g}B parameters, {model.num_layers} layers of width "
        f"{model.width}; steps of {task.batch} sequences of {model.length} tokens; {machines.num_nodes} x "
        f"{machines.gpus_per_node} GPUs of {machines.gpu.memory_gb:g} GB; modelled, nothing is measured"
    )
    others = [way.way for way in ways if not way.trains_as_asked]
    note = (
        f"{' and '.join(others)}: other training than was asked for, and so never advised.\n\n"
        if others
        else ""
    )
    return f"{head}\n\n{format_table(rows)}\n\n{note}{advise(best)}"


def advise(best: Estimate | None) -> str:
    """What to use."""
    if best is None:
        return "Nothing fits. More nodes, up to one stage per layer; more memory; --train lora or qlora."
    if best.block is None:
        on_one = "It fits on one node: use" if best.way.startswith("one ") else "Use"
        return f"{on_one} {best.way}. This package has no part in it."
    where = "in DeepSpeed's JSON" + ("" if best.shape else ", with a PipelineModule of one stage")
    told = f"Use {best.way}, with this {where}:\n\n" + json.dumps({"clapping": best.block}, indent=2)
    if best.added_loss:
        told += (
            "\n\nnats: what the codec added to the loss of SmolLM2-135M over as many links (beyond 7 in "
            "proportion), for activations\nalone and with nothing trained; training adapts to most of it. "
            "Measure it on your model before a long run."
        )
    return told


def main(arguments: Sequence[str]) -> None:
    print(describe(parse(arguments)))


if __name__ == "__main__":
    gc.disable()  # of transformers' many modules there is nothing to collect: half a second
    main(sys.argv[1:])
