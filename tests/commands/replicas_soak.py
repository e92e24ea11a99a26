"""Whether replicas stay equal, bit for bit, over 500 steps: every codec, feedback and host mode.

    python -m tests.commands.replicas_soak [--steps 500]

Exchanges of random gradients on two and three real ranks for every codec and feedback, then two stages of two
replicas for every kind of optimizer of DeepSpeed and Megatron-Core, and four replicas of torch's DDP. About
40 minutes on two cores; `--only` for a part.
"""

import argparse
import itertools

import torch
import torch.distributed as dist

from clapping_ds.codecs import CODECS
from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.exchange import Exchange
from clapping_ds.gradients.layout import Parameter
from clapping_ds.link.collective import make_collective
from clapping_ds.link.verification import checksum
from tests import models
from tests.cluster import Cluster, free_groups
from tests.deepspeed.test_data_parallel import BF16, FP16, block_of, find_weights, on_cpu
from tests.megatron import replicas as megatron
from tests.megatron.test_data_parallel import CASES as MEGATRON
from tests.megatron.test_data_parallel import OF_WEIGHTS
from tests.models import ZERO1
from tests.torch import test_data_parallel as ddp

SHAPES = ((40, 128), (16, 4, 64), (7,))
CODED = [name for name in CODECS if name not in ("none", "transform")]
LIST = ["lowrank", "eden1"]
FEEDBACKS = ("none", "ef14", "ef21", "ef21_sgdm")
DTYPES = (torch.float32, torch.bfloat16)


def exchanged(plan, dtype, steps):
    """The checksum of all means."""
    config = DataParallelConfig.model_validate({"min_numel": 512, **plan})
    ranks = tuple(range(dist.get_world_size()))
    collective = make_collective([ranks], torch.device("cpu"), 60.0, "soak")
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


def with_deepspeed(plan, ds, steps):
    """This rank's stage, and the checksums of its weights after every tenth step."""
    on_cpu()
    engine = models.make_engine(block_of(plan), num_stages=2, ds=ds)
    data = models.batches(engine.grid.get_data_parallel_id())
    found = []
    for _ in range(steps // 10):
        for _ in range(10):
            engine.train_batch(data_iter=data)
        found.append(tuple(find_weights(engine)))
    return engine.stage_id, found


def with_torch(plan, options, steps):
    run = ddp.Run(ddp.block_of(plan), **options)
    return 0, [(run.train(10), tuple(run.weights()))[1] for _ in range(steps // 10)]


def with_megatron(plan, options, steps):
    with megatron.parallel(2, options.get("num_chunks", 1)):
        block = {**models.NONE, "data_parallel": {"min_numel": 512, **plan}}
        run = megatron.Run(block, **options)
        found = [(run.train(10), tuple(run.weights()[1]))[1] for _ in range(steps // 10)]
        stage = run.stage
    free_groups()
    return stage, found


SIGN = {"scatter": "sign", "gather": "sign"}
WEIGHTS = {"weights": "eden4", **SIGN}
MODES = {
    "DeepSpeed, fp32": (with_deepspeed, {}, ({}, SIGN)),
    "DeepSpeed, fp32 ZeRO-1": (with_deepspeed, ZERO1, ({}, SIGN, WEIGHTS)),
    "DeepSpeed, bf16 ZeRO-1": (with_deepspeed, {**BF16, **ZERO1}, ({}, SIGN, WEIGHTS)),
    "DeepSpeed, fp16 ZeRO-1": (with_deepspeed, {**FP16, **ZERO1}, ({}, SIGN, WEIGHTS)),
    "DDP": (with_torch, {}, ({}, SIGN)),
    **{f"Megatron-Core, {name}": (with_megatron, options, ({}, SIGN)) for name, options in MEGATRON.items()},
    **{
        f"Megatron-Core, {name}, weights": (with_megatron, options, (WEIGHTS,))
        for name, options in OF_WEIGHTS.items()
    },
}


def soak_exchanges(steps):
    """The number of cases."""
    num_cases = 0
    for size in (2, 3):
        cluster = Cluster(size, timeout_s=600)
        for codec, feedback, dtype in itertools.product([*CODED, LIST], FEEDBACKS, DTYPES):
            plan = {"scatter": codec, "gather": codec, "error_feedback": feedback}
            first, *others = cluster.run(exchanged, plan, dtype, steps)
            assert len(first) == steps and all(other == first for other in others), (size, plan, dtype)
            num_cases += 1
        cluster.close()
        print(f"{size} replicas: {num_cases} cases so far", flush=True)
    return num_cases


def soak_hosts(steps, names):
    """The number of cases. names: parts of those of modes."""
    num_cases = 0
    cluster = Cluster(4, timeout_s=1200)
    for name, (train, options, plans) in MODES.items():
        for plan in plans if any(each in name for each in names) else ():
            by_stage = {}
            for stage, weights in cluster.run(train, plan, options, steps):
                by_stage.setdefault(stage, []).append(weights)
            for found in by_stage.values():
                assert len(found) > 1 and all(each == found[0] for each in found), (name, plan)
                assert len(set(found[0])) == len(found[0]) > 0, "weights that do not change"
            num_cases += 1
            print(f"{name}, {plan}: equal", flush=True)
    cluster.close()
    return num_cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="+", default=["exchanges", "DeepSpeed", "DDP", "Megatron-Core"])
    options = parser.parse_args()
    num_cases = soak_exchanges(options.steps) if "exchanges" in options.only else 0
    num_cases += soak_hosts(options.steps, options.only)
    print(f"{num_cases} cases of {options.steps} steps: replicas are equal, bit for bit")


if __name__ == "__main__":
    main()
