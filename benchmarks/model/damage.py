"""What compression does to the loss of a pretrained LLM: codec x bits x {1, 3, 7} links, forward only.

    python -m benchmarks.model.damage

SmolLM2-135M reads text, and what its blocks put out at the cuts crosses a link: the package's codecs
through its own channels, those of others (torchao, bitsandbytes, TAH-Quant) as they are. Nothing is trained.
The text is torch's C++ headers; some rows are on English prose besides (the Python standard library's
language reference), to show how far a text moves them.
"""

import argparse
import math
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import islice
from pathlib import Path
from pydoc_data import topics
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.codecs.peers import Peer, peers, tah_quant
from benchmarks.files import RESULTS, new_figure, read_csv, save_figure, write_results
from benchmarks.model.links import Links
from clapping_ds.codecs import CODECS
from clapping_ds.codecs.base import bits_per_value
from clapping_ds.report import format_table
from launch import llm
from launch.data import Windows, tokens
from launch.finetuning import C10

CUTS = {1: (15,), 3: (7, 15, 23), 7: (4, 8, 12, 16, 20, 24, 28)}
"""By number of links: the blocks, counted from 1, whose output crosses one."""
CODECS_HERE: tuple[dict[str, Any], ...] = (
    {"name": "none"},
    *({"name": f"int{bits}"} for bits in (8, 4, 3)),
    *({"name": f"int{bits}", "rotate": True} for bits in (4, 3)),
    *({"name": f"eden{bits}"} for bits in (4, 3, 2)),
    *({"name": name} for name in ("fp8_e4m3", "fp8_e5m2")),
    *({"name": "topk", "ratio": bits / 32} for bits in (4, 2)),
    {"name": "lowrank", "rank": 32},
    *({"name": "transform", "bits": bits} for bits in (4, 3, 2, 1)),
    *({"name": "transform", "bits": bits, "basis": "eigen"} for bits in (3, 2, 1)),
    *({"name": "transform", "bits": bits, "basis": "eigen", "anchors": 1024} for bits in (3, 2, 1)),
    *({"name": "transform", "bits": bits, "anchors": 1024} for bits in (3, 2)),
)
ON_PROSE = (
    *("none", "eden4", "eden3", "int4", "int8"),
    *("transform bits 3", *(f"transform bits {bits} basis eigen anchors 1024" for bits in (3, 2))),
)
TEXTS: dict[str, Path] = {"C++": C10, "prose": Path(topics.__file__)}
LENGTH = 512
NUM_WINDOWS = 8
SHAPE = torch.Size((1, LENGTH, 576))
"""Of what crosses a link. Bits are counted for 4,096 tokens x 4,096 channels, as in a large model; those of
`lowrank` for this, as its share shrinks with the shape."""
SEED = 1
NUM_WARM_UP, REFRESH = 72, 24
"""What a codec learns it learns beforehand, from so many windows of text that is trained on, anew every so
many: what is measured has what was learned second, of 24 windows' rows. Its bytes are counted over 256
messages."""


Batch = tuple[torch.Tensor, torch.Tensor]


class Row(NamedTuple):
    """One line of the table, before it is measured."""

    text: str
    codec: str
    family: str
    bits: float
    num_links: int
    options: dict[str, Any] | None
    """Of a codec of the package; None: it is another's."""
    shares_bits: bool = False
    """Links with a larger error get more bits, others fewer."""

    @property
    def learns(self) -> bool:
        """Whether its codec needs messages before it is at its best."""
        return self.options is not None and not self.options.keys().isdisjoint(("basis", "anchors"))


def list_rows() -> list[Row]:
    found = []
    for options in CODECS_HERE:
        codec = CODECS[options["name"]].model_validate(options)
        name = _name(options)
        bits = bits_per_value(codec, torch.bfloat16)
        if options["name"] == "lowrank":
            bits = 8 * codec.nbytes(SHAPE, torch.bfloat16) / SHAPE.numel()
        family = re.sub(r"(?<!fp)\d+", "", options["name"].split("_")[0]) + " rotate" * ("rotate" in options)
        family += "".join(f" {key}" for key in ("basis", "anchors") if key in options)
        for text in TEXTS if name in ON_PROSE else ("C++",):
            found += [Row(text, name, family, bits, num_links, options) for num_links in CUTS]
    deepest = [row for row in found if row.learns and row.num_links == max(CUTS) and row.text == "C++"]
    for row in (row for row in deepest if row.bits > 2):
        found.append(
            row._replace(codec=f"{row.codec} shared", family=f"{row.family} shared", shares_bits=True)
        )
    for peer in _list_peers():
        found += [Row("C++", peer.name, peer.family, peer.bits, num_links, None) for num_links in CUTS]
    return found


def _name(options: dict[str, Any]) -> str:
    parts = (key if value is True else f"{key} {value}" for key, value in options.items() if key != "name")
    return " ".join([options["name"], *parts])


def _list_peers() -> list[Peer]:
    return [*peers(), tah_quant()]


class Study:
    """The model and the texts, in one process."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model: Any
        self.model, tokenizer = llm.load(llm.SMOLLM2)
        self.model.eval()
        self.peers = {peer.name: peer for peer in _list_peers()}
        corpora = {name: tokens(path, tokenizer.backend_tokenizer)[0] for name, path in TEXTS.items()}
        self.windows = {name: _cut(corpus, True, NUM_WINDOWS) for name, corpus in corpora.items()}
        self.others = {name: _cut(corpus, False, NUM_WARM_UP) for name, corpus in corpora.items()}

    def measure(self, row: Row) -> list[float]:
        """The loss of each window."""
        cuts = [self.model.base_model.layers[number - 1] for number in CUTS[row.num_links]]
        losses = []
        if row.options is not None:
            links = self._make_links(row)
            with links.behind(cuts):
                for step, window in enumerate(self.windows[row.text], NUM_WARM_UP):
                    links.begin_step(step, [True])
                    losses.append(self._find_loss(window))
            return losses
        peer = self.peers[row.codec]
        handles = [block.register_forward_hook(partial(_replace, peer)) for block in cuts]
        losses = [self._find_loss(window) for window in self.windows[row.text]]
        for handle in handles:
            handle.remove()
        return losses

    def _make_links(self, row: Row) -> Links:
        """Which have learned."""
        assert row.options is not None
        options, cuts = row.options, CUTS[row.num_links]
        if row.learns:
            options = {**options, "refresh": REFRESH}
        links = Links(*[{"activations": {"codec": options}}] * len(cuts))
        errors = self._warm_up(links, row) if row.learns else []
        if row.shares_bits:
            shares = share_bits(options["bits"], errors)
            links = Links(*[{"activations": {"codec": {**options, "bits": bits}}} for bits in shares])
            self._warm_up(links, row)
        return links

    def _warm_up(self, links: Links, row: Row) -> list[float]:
        """Sends what the uncompressed model puts out at the cuts. Of each link the mean squared error of a
        token relative to its norm, in the last period."""
        errors = []
        for number, cut in enumerate(CUTS[row.num_links]):
            found = []
            for step, hidden in enumerate(self.hidden(row.text)[cut]):
                links.begin_step(step, [True])
                error = links.carry("activations", number, 0, hidden) - hidden
                found.append((error.square().sum(-1) / hidden.square().sum(-1)).mean().item())
            errors.append(mean(found[-REFRESH:]))
        return errors

    @cache  # noqa: B019 (one study per process)
    def hidden(self, text: str) -> dict[int, list[torch.Tensor]]:
        """By block: what it puts out, for each window of a text that is trained on."""
        found: dict[int, list[torch.Tensor]] = {cut: [] for cuts in CUTS.values() for cut in cuts}
        handles = [
            self.model.base_model.layers[cut - 1].register_forward_hook(
                lambda _, __, out, cut=cut: found[cut].append(out.clone())
            )
            for cut in found
        ]
        for window in self.others[text]:
            self._find_loss(window)
        for handle in handles:
            handle.remove()
        return found

    @torch.no_grad()
    def _find_loss(self, window: Batch) -> float:
        ids, labels = window
        return llm.loss(self.model(ids, use_cache=False).logits, labels).item()


def _cut(corpus: np.ndarray, validation: bool, number: int) -> list[Batch]:
    return list(islice(Windows(corpus, LENGTH, 1, validation=validation).batches(SEED), number))


def share_bits(mean_bits: float, errors: Sequence[float]) -> list[float]:
    """Of each link, in multiples of 1/16: what makes errors equal, if a bit divides one by four. That is the
    least sum of errors then."""
    middle = mean(math.log2(error) for error in errors)
    return [round(16 * (mean_bits + (math.log2(error) - middle) / 2)) / 16 for error in errors]


def _replace(peer: Peer, block: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
    return peer.decode(peer.encode(out), out)


STUDY: list[Study] = []
"""Of a worker process."""


def _start() -> None:
    STUDY.append(Study())


def _measure(row: Row) -> list[float]:
    return STUDY[0].measure(row)


def describe(row: Row, losses: Sequence[float], without: Sequence[float]) -> dict[str, Any]:
    """without: the losses of the same windows without compression."""
    differences = [loss - base for loss, base in zip(losses, without, strict=True)]
    return {
        "text": row.text,
        "codec": row.codec,
        "family": row.family,
        "bits per value": round(row.bits, 3),
        "links": row.num_links,
        "loss": round(mean(losses), 4),
        "damage": round(mean(differences), 5),
        "standard error": round(stdev(differences) / len(differences) ** 0.5, 5),
    }


def plot(source: Path, target: Path) -> None:
    """Draws what the CSV says of the first text: damage against bits, a panel for each number of links."""
    points = [point for point in read_csv(source) if point["text"] == "C++" and point["codec"] != "none"]
    figure, axes = new_figure(1, len(CUTS), inches=(12, 4.2), sharey=True)
    for axis, num_links in zip(axes, CUTS, strict=True):
        for family in dict.fromkeys(point["family"] for point in points):
            mine = sorted(
                (float(point["bits per value"]), max(LEAST_DRAWN, float(point["damage"])))
                for point in points
                if point["family"] == family and int(point["links"]) == num_links
            )
            bits, damages = zip(*mine, strict=True) if mine else ((), ())  # each family takes a colour
            axis.plot(bits, damages, marker="o", linewidth=0.8, label=family)
        axis.set_title(f"{num_links} link{'s' if num_links > 1 else ''}")
        axis.set_xlabel("bits per value")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("added loss, nats per token")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    save_figure(figure, target)


LEAST_DRAWN = 1e-4
"""Damage below it, and what helped by chance, is drawn there."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", help="codecs whose name contains this; other rows stay as they are"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = [row for row in list_rows() if options.only in row.codec or row.codec == "none"]
    with ProcessPoolExecutor(options.processes, initializer=_start) as pool:
        losses = list(tqdm(pool.map(_measure, rows), total=len(rows), desc="damage", mininterval=1.0))
    without = {row.text: found for row, found in zip(rows, losses, strict=True) if row.codec == "none"}
    table = [describe(row, found, without[row.text]) for row, found in zip(rows, losses, strict=True)]
    target = options.results / "damage"
    if options.only:
        measured = {(line["text"], line["codec"], line["links"]) for line in table}
        kept = read_csv(target.with_suffix(".csv"))
        table += [line for line in kept if (line["text"], line["codec"], int(line["links"])) not in measured]
    write_results(
        target,
        table,
        {
            "model": llm.SMOLLM2,
            "cuts": CUTS,
            "tokens": LENGTH * NUM_WINDOWS,
            "texts": TEXTS,
            "seed": SEED,
            "only": options.only,
        },
    )
    plot(target.with_suffix(".csv"), target.with_suffix(".png"))
    print(format_table(table))
    print(f"written to {options.results}: damage.csv, damage.json, damage.png")


if __name__ == "__main__":
    main()
