"""CR-Net under DistributedDataParallel and torch.distributed.pipelining, on real ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import pipelining
from torch.nn.parallel import DistributedDataParallel

import clapping_ds
from clapping_ds import ClappingPipeline, ClappingStage, crnet
from clapping_ds.crnet import CRNetConfig
from clapping_ds.link.verification import checksum
from tests import models
from tests.models import NONE

SIZE = {
    "vocabulary": models.VOCABULARY, "width": 64, "intermediate": 96, "num_layers": 8, "num_heads": 2,
    "rank": 8, "checkpoint_every": 2,
}  # fmt: skip
EDEN4 = {"activations": {"codec": "eden4"}, "gradients": {"codec": "eden4"}}


def weights_after(model, steps, step):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        losses.append(step())
        optimizer.step()
        optimizer.zero_grad()
    return losses, [checksum(weight.detach()) for weight in model.parameters()]


def replicas(recompute, data_parallel, is_static=False):
    torch.manual_seed(5)
    config = CRNetConfig(**SIZE, recompute=recompute)
    model = DistributedDataParallel(crnet.build(config), bucket_cap_mb=0.05, static_graph=is_static)
    if data_parallel is not None:
        clapping_ds.compress_gradients(model, {"clapping": {**NONE, "data_parallel": data_parallel}})
    data = models.batches(dist.get_rank())

    def step():
        tokens, labels = next(data)
        loss = models._loss(model(tokens), labels)
        loss.backward()
        return float(loss.detach())

    return weights_after(model, 4, step)


def test_replicas(two_ranks):
    for data_parallel in (None, {"min_numel": 512}):
        plain = two_ranks.run(replicas, None, data_parallel)
        assert plain[0][1] == plain[1][1], "replicas drift"
        assert plain[0][0] != plain[1][0]
        for is_static in (False, True):
            assert two_ranks.run(replicas, "forward", data_parallel, is_static) == plain


def stages(options, block):
    """Losses of a pipeline, and values that cross a link per token."""
    rank, num_stages = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(5 + rank)
    module = crnet.build_stage(CRNetConfig(**SIZE, **options), rank, num_stages)
    stage_class = pipelining.PipelineStage if block is None else ClappingStage
    stage = stage_class(module, rank, num_stages, torch.device("cpu"))
    schedule = pipelining.Schedule1F1B(stage, 4, loss_fn=models._loss)
    pipeline = block and ClappingPipeline({"clapping": block}, schedule)
    data = models.batches(0)

    def step():
        losses = []
        if pipeline:
            pipeline.step(data, losses=losses)
        else:
            tokens, labels = (torch.cat(parts) for parts in zip(*(next(data) for _ in range(4)), strict=True))
            schedule.step(*([tokens] if rank == 0 else []), target=labels, losses=losses)
        return [float(loss.detach()) for loss in losses]

    losses, weights = weights_after(module, 3, step)
    rows = pipeline.report() if pipeline else []
    return losses, weights, {row["raw_bytes"] / 4 / (12 * models.BATCH * models.LENGTH) for row in rows}


@pytest.mark.parametrize("anchor", ["model", "stage"])
def test_pipelines(two_ranks, anchor):
    stock = two_ranks.run(stages, {"anchor": anchor}, None)
    values = 64 if anchor == "stage" else 6 * 64 + 2 * 96
    for recompute in (None, "forward"):
        options = {"anchor": anchor, "recompute": recompute}
        none, eden4 = (two_ranks.run(stages, options, block) for block in (NONE, EDEN4))
        assert [found[:2] for found in none] == [found[:2] for found in stock]
        assert eden4[1][0] != stock[1][0]
        for mine, others in zip(eden4[1][0], stock[1][0], strict=True):
            assert mine == pytest.approx(others, rel=0.03)
        assert none[0][2] == eden4[1][2] == {values}
