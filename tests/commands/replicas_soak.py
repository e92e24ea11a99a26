"""Whether replicas stay equal, bit for bit, over 500 steps: every codec, feedback and host mode.

    python -m tests.commands.replicas_soak [--steps 500]

Exchanges of random gradients on two and three real ranks for every codec and feedback, then DeepSpeed engines
of two stages and two replicas for every kind of optimizer. About 20 minutes on two cores.
"""

import argparse
import itertools
import time

import torch
import torch.distributed as dist

from clapping_ds.codecs import CODECS
from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.collective import make_collective
from clapping_ds.gradients.exchange import Exchange
from clapping_ds.gradients.layout import Parameter
from clapping_ds.link.verification import checksum
from tests import models
from tests.cluster import Cluster
from tests.deepspeed.test_data_parallel import BF16, FP16, block_of, find_weights, on_cpu
from tests.models import ZERO1

SHAPES = ((40, 128), (16, 4, 64), (7,))
CODED = [name for name in CODECS if name not in ("none", "transform")]
LIST = ["lowrank", "eden1"]
FEEDBACKS = ("none", "ef14", "ef21", "ef21_sgdm")
DTYPES = (torch.float32, torch.bfloat16)


def exchanged(plan, dtype, steps):
    """The checksum of all means."""
    config = DataParallelConfig.model_validate({"min_numel": 512, **plan})
    ranks = tuple(range(dist.get_world_size()))
    collective = make_collective([ranks], torch.device("cpu"), 60.0)
    parameters = [Parameter(f"weight {n}", torch.Size(shape)) for n, shape in enumerate(SHAPES)]
    exchange = Exchange(config, parameters, collective, seed=5)
    generator = torch.Generator().manual_seed(dist.get_rank())
    found = []
    for step in range(steps):
        exchange.begin_step(step)
        mine = {
            n: torch.randn(each.shape, generator=generator).to(dtype) for n, each in enumerate(parameters)
        }
        exchange.start(mine).finish()
        exchange.end_step(accepted=step % 50 != 49)
        found.append(tuple(checksum(mean) for mean in mine.values()))
    return found


def trained(plan, ds, steps):
    """This rank's stage, and the checksums of its weights after every tenth step."""
    on_cpu()
    engine = models.make_engine(block_of(plan), num_stages=2, ds=ds)
    data = models.batches(engine.grid.get_data_parallel_id())
    found = []
    for step in range(steps):
        engine.train_batch(data_iter=data)
        if step % 10 == 9:
            found.append(tuple(find_weights(engine)))
    return engine.stage_id, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    start_s, num_cases = time.monotonic(), 0
    for size in (2, 3):
        cluster = Cluster(size, timeout_s=600)
        for codec, feedback, dtype in itertools.product([*CODED, LIST], FEEDBACKS, DTYPES):
            plan = {"scatter": codec, "gather": codec, "error_feedback": feedback}
            first, *others = cluster.run(exchanged, plan, dtype, steps)
            assert len(first) == steps and all(other == first for other in others), (size, plan, dtype)
            num_cases += 1
        cluster.close()
        print(f"{size} replicas: {num_cases} cases so far, {time.monotonic() - start_s:.0f} s", flush=True)
    cluster = Cluster(4, timeout_s=1200)
    sign = {"scatter": "sign", "gather": "sign"}
    modes = {
        "fp32": {},
        "fp32 ZeRO-1": ZERO1,
        "bf16 ZeRO-1": {**BF16, **ZERO1},
        "fp16 ZeRO-1": {**FP16, **ZERO1},
    }
    for (name, ds), plan in itertools.product(modes.items(), ({}, sign, {"weights": "eden4", **sign})):
        if "weights" in plan and name == "fp32":
            continue
        by_stage = {}
        for stage, weights in cluster.run(trained, plan, ds, steps):
            by_stage.setdefault(stage, []).append(weights)
        for found in by_stage.values():
            assert len(found) == 2 and found[0] == found[1], (name, plan)
        num_cases += 1
        print(f"{name}, {plan}: equal, {time.monotonic() - start_s:.0f} s", flush=True)
    cluster.close()
    print(f"{num_cases} cases of {steps} steps: replicas are equal, bit for bit")


if __name__ == "__main__":
    main()
