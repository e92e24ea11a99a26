"""A small GPT from scratch over 3 and 7 compressed links: codecs where the model grows up with them.

    python -m benchmarks.training.scratch [--seeds 1 2 3] [--only NAME ...]

The byte-level GPT of `launch.gpt`, whole in one process (`benchmarks.model.links`), on the Python standard
library's sources: 4 blocks, or 8, with a link behind each but the last. One to three minutes a row. Rows that
`scratch.csv` has are not measured again.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.files import RESULTS, provenance, write_json
from benchmarks.model.links import Links
from benchmarks.training.compare import block
from benchmarks.training.finetune import add_rows, read_rows, summarize, train, validate
from clapping_ds.report import format_table
from launch.data import Windows, tokens
from launch.gpt import GPT, GPTConfig
from launch.trainer import Training, learning_rate_schedule, optimizer

NUM_SAMPLES = 4
"""Of a micro-batch."""
NUM_HELD_OUT = 20
REFRESH = 16
"""Messages, of what is learned: a run has 1,280 per link and direction."""


@dataclass(frozen=True)
class Run:
    """What is trained, over how many links."""

    name: str
    block: dict[str, Any]
    num_links: int


def transform(bits: float, basis: str = "channel", anchors: int = 0) -> dict[str, Any]:
    learns = {"refresh": REFRESH} if basis == "eigen" or anchors else {}
    return {"name": "transform", "bits": bits, "basis": basis, "anchors": anchors, **learns}


def low_rank(**learned: Any) -> list[Any]:
    return ["lowrank", transform(0.5, **learned)]


def pooled(block: dict[str, Any], pool: int, p_new: float) -> dict[str, Any]:
    return {**block, "lazy": {"pool": pool, "p_new": p_new, "refresh": "cycle"}}


EIGEN: dict[str, Any] = {"basis": "eigen"}
ANCHORED: dict[str, Any] = {"basis": "eigen", "anchors": 256}
RUNS: dict[str, dict[str, Any]] = {
    "uncompressed": block("direct", "none"),
    **{f"direct {name}": block("direct", name) for name in ("eden4", "eden3", "eden2", "eden1")},
    **{f"direct transform {bits}": block("direct", transform(bits)) for bits in (3, 2, 1)},
    **{f"direct transform {bits} eigen": block("direct", transform(bits, **EIGEN)) for bits in (2, 1)},
    **{f"direct transform {bits} anchors": block("direct", transform(bits, **ANCHORED)) for bits in (2, 1)},
    "uncompressed, lazy": block("fu", "none"),
    **{
        f"uncompressed, pool {pool}, p_new {p_new}": pooled(block("fu", "none"), pool, p_new)
        for pool, p_new in ((1, 0.25), (4, 0.25), (16, 0.25), (16, 0.5), (64, 0.25), (80, 0))
    },
    "key eden4, delta eden1": block("key_delta", "eden1", key="eden4"),
    "key transform 2, delta transform 0.5": block("key_delta", transform(0.5), key=transform(2)),
    "key transform 2, delta lowrank 4 + transform 0.5": block("key_delta", low_rank(), key=transform(2)),
    **{
        f"key transform {bits} eigen, delta lowrank 4 + transform 0.5 eigen": block(
            "key_delta", low_rank(**EIGEN), key=transform(bits, **EIGEN)
        )
        for bits in (2, 1.75)
    },
    "key transform 2 anchors, delta lowrank 4 + transform 0.5 eigen": block(
        "key_delta", low_rank(**EIGEN), key=transform(2, **ANCHORED)
    ),
    "key eden4, delta lowrank 4 + eden1": block("key_delta", ["lowrank", "eden1"], key="eden4"),
}
DEEP = (
    "uncompressed",
    *("direct eden4", "direct eden2"),
    *(f"direct transform {bits}" for bits in ("2", "2 eigen", "2 anchors", "1 eigen")),
)
"""Over 7 links as well; all over 3."""


def list_runs() -> list[Run]:
    return [
        *(Run(name, block, 3) for name, block in RUNS.items()),
        *(Run(name, RUNS[name], 7) for name in DEEP),
    ]


class Model(nn.Module):
    """A GPT, called as a Hugging Face model is."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gpt = GPT(config)

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.gpt(ids))


def measure(run: Run, seed: int) -> list[dict[str, Any]]:
    """One line of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    training = Training()
    corpus, vocabulary = tokens(None)
    config = GPTConfig(vocabulary=vocabulary, num_blocks=run.num_links + 1)
    model = Model(config)
    held_out = list(islice(draw_batches(corpus, config, True, 1), NUM_HELD_OUT))
    batches = draw_batches(corpus, config, False, seed)
    adam = optimizer(model, training)
    links = Links(*[run.block] * run.num_links)
    schedule = learning_rate_schedule(adam, training)
    blocks = list(model.gpt.blocks)[:-1]
    losses = list(train(model, blocks, links, adam, schedule, partial(next, batches), training.steps))
    return [
        {
            "run": run.name,
            "weights": "from scratch",
            "links": run.num_links,
            "seed": seed,
            "steps": training.steps,
            "bits per value": round(links.bits_per_value, 3),
            "training loss": round(sum(losses[-16:]) / 16, 4),
            "loss": round(validate(model, held_out), 4),
        }
    ]


def draw_batches(corpus: Any, config: GPTConfig, validation: bool, seed: int) -> Iterator[Any]:
    return Windows(corpus, config.length, NUM_SAMPLES, validation=validation).batches(seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=list(RUNS), help="names of runs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    target = options.results / "scratch.csv"
    rows = read_rows(target) if target.exists() else []
    known = {(row["run"], row["links"], row["seed"]) for row in rows}
    wanted = [
        (run, seed)
        for seed in options.seeds
        for run in list_runs()
        if run.name in options.only and (run.name, run.num_links, seed) not in known
    ]
    add_rows([partial(measure, run, seed) for run, seed in wanted], rows, target, options.processes)
    write_json(target.with_suffix(".json"), {**provenance(), "training": vars(Training())})
    print(format_table(summarize(rows)))


if __name__ == "__main__":
    main()
