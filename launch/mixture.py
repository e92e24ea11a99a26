"""Learns the mixture of four sites' corpora for a target, by replicas of a byte-level GPT.

deepspeed --num_accelerators 4 --module launch.mixture --deepspeed_config launch/mixture.json

Each rank is a site with a corpus of its own, which it does not share. Gradients are averaged as the block's
"data_parallel" has it; between neighbours on a ring go as many numbers as there are corpora. Every site has a
little of the target.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import mean
from sysconfig import get_paths
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import clapping_ds
from clapping_ds import bilevel
from clapping_ds.bilevel import Gossip, Mixture, adam_scales, align
from launch.data import Windows, text_files
from launch.gpt import GPT, GPTConfig, loss
from launch.pretrain_gpt import parse, start_distributed
from launch.trainer import Training, learning_rate_schedule, optimizer

TARGET, HEADERS = "target", "torch/include/**/*.h"
MOST_BYTES, MOST_OF_A_FILE = 3_000_000, 20_000
"""Of a corpus, and of a file in it."""
HALF_A_TARGET, NUM_PIECES = 250_000, 50
"""Bytes of each of its two kinds of text, and in how many pieces they alternate."""


@dataclass(frozen=True)
class MixtureRun(Training):
    """A GPT, trained from scratch on a mixture of corpora that is learned beside it."""

    corpora: tuple[Path, ...] = ()
    """Folders or files of text, one for each site; none: Python, C++ headers, licences, data files that are
    on this machine."""
    target: Path | None = None
    """Folder or file of text; None: sources of installed Python packages, and as much of C++ headers that no
    site has."""
    batch_size: int = 16
    """Samples of a site in a step, and of the target: where shares are far from equal, few of them count."""
    share_step: float = 1.0
    """Step size of the shares' logits."""
    share_interval: int = 4
    """Steps between two updates of the shares, each of which takes a forward and a backward pass on the
    target and on the site's corpus."""
    share_start: int = 20
    """Steps before the first."""
    fixed_shares: tuple[float, ...] = ()
    """Of the corpora, in place of learned ones."""
    gpt: GPTConfig = field(default_factory=lambda: GPTConfig(length=64, width=64, num_heads=4, num_blocks=2))


@dataclass(frozen=True)
class Options:
    """What the script is started with."""

    deepspeed_config: Path
    """JSON with the "clapping" block, of which "data_parallel" is used."""
    run: MixtureRun = field(default_factory=MixtureRun)
    local_rank: int = 0
    """Passed by the launcher, and not used."""


def find_corpora(run: MixtureRun) -> dict[str, np.ndarray]:
    """Bytes of each corpus by name, and of the target."""
    packages = Path(get_paths()["purelib"])
    if run.corpora:
        files = {path.name: text_files(path) for path in run.corpora}
    else:
        files = {
            "python": text_files(None),
            "headers": [path for path in packages.glob(HEADERS) if _hash(path, run.seed) % 5],
            "licences": [path for name in ("LICENSE*", "COPYING*") for path in packages.rglob(name)],
            "data": [path for name in ("*.json", "*.csv") for path in packages.rglob(name)],
        }
    found = {name: _read(name, paths, run.seed) for name, paths in files.items()}
    if run.target is not None:
        return {**found, TARGET: _read(TARGET, text_files(run.target), run.seed)}
    others = [path for path in packages.glob(HEADERS) if not _hash(path, run.seed) % 5]
    kinds = others, list(packages.rglob("*.py"))
    halves = [_read(TARGET, paths, run.seed)[:HALF_A_TARGET] for paths in kinds]
    pieces = [np.array_split(half, NUM_PIECES) for half in halves]
    return {**found, TARGET: np.concatenate([piece for pair in zip(*pieces, strict=True) for piece in pair])}


def _read(name: str, paths: Sequence[Path], seed: int) -> np.ndarray:
    """In an order that has nothing to do with names, as the last are held out."""
    in_order = sorted(sorted(paths), key=lambda path: _hash(path, seed))
    parts = (path.read_bytes()[:MOST_OF_A_FILE] for path in in_order if path.is_file())
    content = b"".join(parts)[:MOST_BYTES]
    if not content:
        raise ValueError(f"the corpus {name!r} has no text; accepted: folders or files of text")
    return np.frombuffer(content, np.uint8)


def _hash(path: Path, seed: int) -> int:
    """The same wherever packages are installed."""
    return crc32("/".join((str(seed), *path.parts[-3:])).encode())


class Trainer:
    """The model, and the sites of this process. Replicas elsewhere have the other sites.

    sites   by site of this process, the name of its corpus
    """

    def __init__(
        self, run: MixtureRun, corpora: Mapping[str, np.ndarray], gossip: Gossip, sites: Sequence[str]
    ) -> None:
        # Configuration
        self.run = run
        self.sites = list(sites)
        self.domains = [name for name in corpora if name != TARGET]
        self.num_sites = len(self.domains)
        self.device = gossip.device
        self.held_out = Windows(corpora[TARGET], run.gpt.length, run.batch_size, validation=True)
        # State
        self.mixture: Mixture | None = None
        if not run.fixed_shares:
            held = [[name] for name in sites]
            self.mixture = Mixture(gossip, self.domains, held, step=run.share_step, momentum=0.2)
        elif len(run.fixed_shares) != len(self.domains) or abs(sum(run.fixed_shares) - 1) > 1e-6:
            raise ValueError(
                f"--fixed-shares {run.fixed_shares}; accepted: one for each of {self.domains}, of sum 1"
            )
        torch.manual_seed(run.seed)
        self.gpt = GPT(run.gpt).to(self.device)
        self.model: nn.Module = self.gpt
        """What is trained: the GPT, or what averages its gradients with other replicas."""
        self.adam = optimizer(self.gpt, run)
        self.schedule = learning_rate_schedule(self.adam, run)
        numbers = [self.domains.index(name) for name in sites]
        self.batches = [self._batches(corpora[name], n) for name, n in zip(sites, numbers, strict=True)]
        self.probes = [self._batches(corpora[name], 200 + n) for name, n in zip(sites, numbers, strict=True)]
        self.target = [self._batches(corpora[TARGET], 100 + n) for n in numbers]
        self.num_steps = 0

    def _batches(self, corpus: np.ndarray, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        windows = Windows(corpus, self.run.gpt.length, self.run.batch_size, validation=False)
        return windows.batches(1000 * self.run.seed + number)

    def weight(self, site: int) -> float:
        if self.mixture is not None:
            return self.mixture.weight(self.sites[site], site)
        return self.num_sites * self.run.fixed_shares[self.domains.index(self.sites[site])]

    def shares(self) -> list[float]:
        shares = self.run.fixed_shares if self.mixture is None else self.mixture.shares().tolist()
        return [round(share, 4) for share in shares]

    def step(self) -> float:
        """Returns the loss on the mixture, of this process's sites."""
        is_due = self.num_steps >= self.run.share_start and self.num_steps % self.run.share_interval == 0
        if self.mixture is not None and is_due:
            self.mixture.follow([self._find_gain(site) for site in range(len(self.sites))])
        batches = [next(each) for each in self.batches]
        weights = torch.tensor([self.weight(site) for site in range(len(self.sites))], device=self.device)
        on_mixture = (weights * self._losses(self.model, batches)).mean()
        on_mixture.backward()
        nn.utils.clip_grad_norm_(self.gpt.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        self.schedule.step()
        self.num_steps += 1
        return float(on_mixture.detach())

    def _find_gain(self, site: int) -> dict[str, float]:
        """On batches that are trained on nowhere else, and gradients that are averaged with nobody's."""
        parameters = [each for group in self.adam.param_groups for each in group["params"]]
        of_domain, of_target = (
            torch.autograd.grad(self._losses(self.gpt, [next(batches[site])]).mean(), parameters)
            for batches in (self.probes, self.target)
        )
        return {self.sites[site]: align(of_domain, of_target, adam_scales(self.adam))}

    def _losses(self, model: nn.Module, batches: Sequence[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        """[sites]"""
        tokens, labels = (torch.cat(parts).to(self.device) for parts in zip(*batches, strict=True))
        told = model(tokens).chunk(len(batches))
        return torch.stack(
            [loss(each, of_it) for each, of_it in zip(told, labels.chunk(len(batches)), strict=True)]
        )

    @torch.no_grad()
    def validate(self) -> float:
        """The loss on held-out text of the target."""
        batches = islice(self.held_out.batches(1), self.run.eval_batches)
        losses = (self._losses(self.gpt, [batch]) for batch in batches)
        return mean(float(each) for each in losses)


def train_replica(run: MixtureRun, ds_config: dict[str, Any]) -> Trainer:
    """On each rank: its site."""
    corpora = find_corpora(run)
    if len(corpora) - 1 != dist.get_world_size():
        raise ValueError(f"{len(corpora) - 1} corpora on {dist.get_world_size()} ranks; accepted: one each")
    device = torch.device(get_accelerator().current_device_name())
    gossip = bilevel.RankGossip(bilevel.ring(dist.get_world_size()), device=device)
    trainer = Trainer(run, corpora, gossip, [list(corpora)[dist.get_rank()]])
    replica = DistributedDataParallel(trainer.gpt)
    clapping_ds.compress_gradients(replica, ds_config)
    trainer.model = replica
    bar = tqdm(range(run.steps), disable=dist.get_rank() != 0, mininterval=1.0)
    for step in bar:
        bar.set_postfix(loss=f"{trainer.step():.3f}", refresh=False)
        is_due = (step + 1) % run.eval_interval == 0 or step + 1 == run.steps
        if is_due and dist.get_rank() == 0:
            shares = ", ".join(
                f"{name} {share:.3f}" for name, share in zip(trainer.domains, trainer.shares(), strict=True)
            )
            tqdm.write(f"step {step + 1}: loss on the target {trainer.validate():.4f}; shares: {shares}")
    return trainer


def main() -> None:
    options = parse(Options, __doc__)
    start_distributed()
    trainer = train_replica(options.run, json.loads(options.deepspeed_config.read_text()))
    if dist.get_rank() == 0 and trainer.mixture is not None:
        num_bytes = trainer.mixture.gossip.sites[0].bytes_sent
        print(f"gossip: {num_bytes} bytes sent by a site in {options.run.steps} steps")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
