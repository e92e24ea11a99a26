"""One stage of the benchmarks over links: a rank that takes orders, a JSON object per line, and answers.

    {"do": "step", "run": "direct int4"}   ->   {"step_s": 0.71, "loss": 5.4, "forward_s": [...], ...}

`do` names a method of `Rank`, the rest are its arguments. Both ranks get every order. Orders come by stdin,
answers go to the file descriptor that is the only argument, since DeepSpeed prints to stdout.
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule

import clapping_ds
from benchmarks.links import tasks
from benchmarks.links.sites import Sites
from clapping_ds.codecs import CODECS
from launch.data import Windows, tokens
from launch.gpt import Block, Embedding, GPTConfig, cut_into_stages
from launch.pretrain_gpt import start_distributed

SEED = 1
NUM_PINGS = 21
NUM_TRANSFERS = 3
FIGURE_OF_INSTRUCTION = {
    "ForwardPass": "forward_s",
    "BackwardPass": "backward_s",
    "SendActivation": "communication_s",
    "RecvActivation": "communication_s",
    "SendGrad": "communication_s",
    "RecvGrad": "communication_s",
}


class Clock:
    """How long each call of the watched functions took in this step, in seconds, by figure."""

    def __init__(self) -> None:
        self.calls_s: defaultdict[str, list[float]] = defaultdict(list)

    def watched(self, figure: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls_s[figure].append(time.perf_counter() - start)

        return call

    def watch_codecs(self) -> None:
        """Every codec's `encode_` and `decode_`, in this process."""
        for codec in set(CODECS.values()):
            for method, figure in (("encode_", "encode_s"), ("decode_", "decode_s")):
                setattr(codec, method, self.watched(figure, getattr(codec, method)))

    def watch_instructions(self, engine: Any) -> None:
        """Every instruction of an engine's schedule. Maps hold functions that take the engine first."""
        ours = getattr(engine, "_TRAINING", {}) if _compresses(engine) else {}  # older ones have one map
        theirs = {kind: each for kind, each in engine._INSTRUCTION_MAP.items() if kind not in ours}
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **self._watch_all(theirs)}
        engine._TRAINING = self._watch_all(ours)

    def _watch_all(self, instructions: Mapping[type, Callable[..., Any]]) -> dict[type, Callable[..., Any]]:
        return {
            kind: self.watched(FIGURE_OF_INSTRUCTION.get(kind.__name__, "other_s"), function)
            for kind, function in instructions.items()
        }


class Transfer(NamedTuple):
    """Seconds from the call of a blocking send until it returned, and until the peer's answer was there."""

    sent_s: float
    answered_s: float


class Rank:
    """The orders. Each is a collective of both ranks."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.watch_codecs()
        self.engines: dict[str, Any] = {}
        self.batches: dict[str, Iterator[Any]] = {}
        self.runners: dict[str, tasks.Runner] = {}
        self.sites: dict[str, Sites] = {}
        self.rank = dist.get_rank()

    def checkout(self) -> dict[str, str]:
        """The folder whose `clapping_ds` this is."""
        return {"folder": str(Path(clapping_ds.__file__).parents[1])}

    def build(
        self, gpt: dict[str, int], micro_batches: int, runs: dict[str, dict[str, Any] | None]
    ) -> dict[str, Any]:
        """An engine per run: with a `"clapping"` block, or for None stock DeepSpeed's."""
        config = GPTConfig(**gpt)
        corpus, _ = tokens(None)
        for run, block in runs.items():
            self.engines[run] = _engine(config, micro_batches, block)
            self.clock.watch_instructions(self.engines[run])
            self.batches[run] = Windows(corpus, config.length, 1, validation=False).batches(SEED)
        return {}

    def build_replicas(
        self, gpt: dict[str, int], runs: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]
    ) -> dict[str, Any]:
        """An engine per run, of one stage on each of the ranks. runs: the `"clapping"` block, or None, and
        what else the DeepSpeed JSON has. num_values: of the parameters."""
        config = GPTConfig(**gpt)
        corpus, _ = tokens(None)
        for run, (block, options) in runs.items():
            self.engines[run] = _engine(config, 1, block, num_stages=1, options=options)
            self.clock.watch_instructions(self.engines[run])
            windows = Windows(corpus, config.length, 1, validation=False)
            self.batches[run] = windows.batches(SEED + self.rank)
        return {"num_values": sum(weight.numel() for weight in self.engines[run].module.parameters())}

    def report(self, run: str) -> dict[str, Any]:
        """The engine's own."""
        engine = self.engines[run]
        return {"rows": engine.clapping_report() if _compresses(engine) else []}

    def build_sites(self, runs: dict[str, tuple[str, str]]) -> dict[str, Any]:
        """A bilevel solver per run, of one site on each of the ranks. runs: strategy and codec."""
        self.sites = {run: Sites(strategy, codec) for run, (strategy, codec) in runs.items()}
        return {}

    def step_sites(self, run: str) -> dict[str, Any]:
        """Makes one step."""
        return self.sites[run].step()

    def build_task(self, task: str, run: str, block: dict[str, Any] | None) -> dict[str, Any]:
        """An engine for a run of `benchmarks.training.curves`, with its data, seed and learning rate.
        raw_bytes: of a micro-batch's activations."""
        runner = self.runners[run] = tasks.make_runner(task, block)
        self.engines[run], self.batches[run] = runner.engine, runner.batches
        self.clock.watch_instructions(runner.engine)
        return {"raw_bytes": runner.raw_bytes}

    def validate(self, run: str) -> dict[str, float]:
        """The loss on what the task holds out; it is that of the last stage."""
        return {"loss": self.runners[run].validate()}

    def link(self, num_bytes: int) -> dict[str, float]:
        """The link as the processes see it.

        bandwidth_bytes_per_s   from here to the peer, the fastest of a few transfers of `num_bytes`
        latency_s               half of the median round trip of one byte
        buffer_bytes            had yet to cross the link when the fastest transfer's send returned
        """
        byte, bulk = torch.zeros(1, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
        pings = [self._transfer(byte, sender=0) for _ in range(NUM_PINGS)]
        to_next = [self._transfer(bulk, sender=0) for _ in range(NUM_TRANSFERS)]
        to_previous = [self._transfer(bulk, sender=1) for _ in range(NUM_TRANSFERS)]
        fastest = min(to_next if self.rank == 0 else to_previous, key=lambda each: each.answered_s)
        bandwidth = num_bytes / fastest.answered_s
        return {
            "bandwidth_bytes_per_s": bandwidth,
            "latency_s": median(ping.answered_s for ping in pings) / 2,
            "buffer_bytes": bandwidth * (fastest.answered_s - fastest.sent_s),
        }

    def _transfer(self, tensor: torch.Tensor, sender: int) -> Transfer:
        """Of a tensor, answered by the peer with one byte."""
        answer = torch.zeros(1, dtype=torch.uint8)
        start = time.perf_counter()
        if self.rank == sender:
            dist.send(tensor, 1 - sender)
            sent = time.perf_counter()
            dist.recv(answer, 1 - sender)
        else:
            dist.recv(tensor, sender)
            sent = time.perf_counter()
            dist.send(answer, sender)
        return Transfer(sent - start, time.perf_counter() - start)

    def step(self, run: str) -> dict[str, Any]:
        """Trains one step. forward_s, backward_s: of each micro-batch; encode_s, decode_s: of each tensor;
        overhead_s: of the step, what is neither of the first two nor sending and receiving."""
        self.clock.calls_s.clear()
        dist.barrier()
        start = time.perf_counter()
        train_loss = float(self.engines[run].train_batch(data_iter=self.batches[run]))
        step_s = time.perf_counter() - start
        calls_s = self.clock.calls_s
        pipeline_s = sum(sum(calls_s[figure]) for figure in set(FIGURE_OF_INSTRUCTION.values()))
        lists = {figure: calls_s[figure] for figure in ("forward_s", "backward_s", "encode_s", "decode_s")}
        return {"step_s": step_s, "loss": train_loss, "overhead_s": step_s - pipeline_s, **lists}

    def describe(self, run: str) -> dict[str, Any]:
        """What a run sends. report: the engine's own, since the start; key_bytes, delta_bytes: payload of
        one micro-batch; in_flight: as decided; codecs: of reused slots; most_payloads: held by a wire."""
        engine = self.engines[run]
        if not _compresses(engine):
            return {"report": [], "in_flight": None, "codecs": "", "most_payloads": None}
        channels = list(engine._endpoints.channels)
        codecs = [channel.plan.delta for channel in channels]
        (spec,) = channels[0].specs
        return {
            "report": engine.clapping_report(),
            "in_flight": engine._endpoint.in_flight,
            "codecs": " ".join(dict.fromkeys(codec.name for codec in codecs)),
            "most_payloads": max(wire.most_payloads for wire in engine._endpoint.wires.values()),
            "key_bytes": channels[0].plan.key.nbytes(*spec),
            "delta_bytes": codecs[0].nbytes(*spec),
        }


def _engine(
    config: GPTConfig,
    micro_batches: int,
    block: dict[str, Any] | None,
    num_stages: int = 2,
    options: dict[str, Any] | None = None,
) -> Any:
    model = _pipeline(config, num_stages)
    ds_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": 1_000_000,
        "zero_allow_untested_optimizer": True,
        **(options or {}),
    }
    if block is not None:
        ds_config["clapping"] = block
    engine, *_ = (deepspeed.initialize if block is None else clapping_ds.initialize)(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=ds_config
    )
    return engine


def _pipeline(config: GPTConfig, num_stages: int) -> PipelineModule:
    """`launch.gpt` with a head of its own: a tied one adds an uncompressed all-reduce to every step."""
    layers = [
        LayerSpec(Embedding, config),
        *(LayerSpec(Block, config) for _ in range(config.num_blocks)),
        LayerSpec(torch.nn.LayerNorm, config.width),
        LayerSpec(torch.nn.Linear, config.width, config.vocabulary, bias=False),
    ]
    return cut_into_stages(layers, Block, num_stages, SEED)


def _compresses(engine: Any) -> bool:
    return getattr(engine, "clapping", None) is not None and engine.clapping.enabled


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        start_distributed()
        rank = Rank()
        for line in sys.stdin:
            order = json.loads(line)
            answer = getattr(rank, order.pop("do"))(**order)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
