"""The mixture of corpora, learned beside DeepSpeed pipelines: a site is a replica, its last stage gossips."""

from itertools import chain

import pytest
import torch.distributed as dist

from clapping_ds import bilevel
from clapping_ds.bilevel import DomainLoss, Mixture, RankGossip
from clapping_ds.link.verification import checksum
from tests import models

EDEN4 = {
    "activations": {"codec": "eden4"},
    "gradients": {"codec": "eden4"},
    "data_parallel": {"min_numel": 512},
}
DOMAINS = ["triple", "shift"]


def batches(seed, rule):
    for tokens, _ in models.batches(seed):
        yield tokens, (tokens * 3 + 1 if rule == "triple" else tokens + 2) % models.VOCABULARY


def learned(target, steps=6):
    """Two engines of two stages, two replicas: losses, shares, weights, bytes of gossip."""
    sites = [2, 3]  # the last stages
    gossip = RankGossip(bilevel.full(2), ranks=sites)
    replica, is_site = dist.get_rank() % 2, dist.get_rank() in sites
    held = [[DOMAINS[replica]]] if is_site else []
    mixture = Mixture(gossip, DOMAINS, held, step=50.0)
    engines, losses = [], []
    for domains in ([DOMAINS[replica]] * 4, [DOMAINS[replica], None] * 2):
        losses.append(DomainLoss(mixture, models._loss, domains))
        model = models.pipeline(2)
        model.loss_fn = losses[-1]
        ds = {
            "train_micro_batch_size_per_gpu": models.BATCH,
            "gradient_accumulation_steps": 4,
            "clapping": EDEN4,
        }
        engines.append(models.start(model, {**ds, "steps_per_print": 1000}, stock=False))
    own = [batches(replica, DOMAINS[replica]) for _ in range(2)]
    of_target = batches(9, target)
    second = chain.from_iterable(zip(own[1], of_target, strict=False))
    found = []
    for _ in range(steps):
        found.append(float(engines[0].train_batch(data_iter=own[0])))
        engines[1].train_batch(data_iter=second)
        told = [each.take() for each in losses]
        mixture.update(*([each] for each in told) if is_site else ([], []))
    weights = [[checksum(each.detach()) for each in engine.module.parameters()] for engine in engines]
    shares = mixture.shares().tolist() if is_site else None
    return found, shares, weights, [site.bytes_sent for site in gossip.sites]


@pytest.mark.parametrize("target", DOMAINS)
def test_pipelines_learn_a_mixture(four_ranks, target):
    outcomes = four_ranks.run(learned, target)
    for first, second in ((0, 1), (2, 3)):
        assert outcomes[first][2] == outcomes[second][2], "replicas drift"
    (_, shares, _, sent), (_, others, _, _) = outcomes[2:]
    assert shares == pytest.approx(others, abs=1e-6)
    assert shares[DOMAINS.index(target)] > 0.51
    assert outcomes[0][1] is None and outcomes[0][3] == []
    assert sent == [6 * (48 + 16)]
    losses = outcomes[2][0]
    assert losses[-1] < losses[0]
