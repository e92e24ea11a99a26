"""Megatron-LM's own pretrain_gpt.py on CPU ranks: as it is, and through `patches.megatron_lm`.

    python -m tests.commands.megatron_lm CHECKOUT [CHECKOUT ...]

CHECKOUT is a clone of https://github.com/NVIDIA/Megatron-LM at one of the versions that the patch accepts;
it is no part of this project. Needs `pip install six pybind11`, make and a C++ compiler: the command builds
the checkout's dataset helpers. Writes benchmarks/results/megatron_lm.csv, a row per run, and a JSON that
says where they come from. Ends with an error if a run fails, if nothing compressed differs from stock in a
printed digit, or if a resumed run differs from the one that was not interrupted.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "megatron_lm"
STEPS, SAVED_STEP, BATCH = 8, 4, 16
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 2 --seq-length 64 --max-position-embeddings 64 "
    f"--micro-batch-size 2 --global-batch-size {BATCH} --train-iters {STEPS} --lr 1e-3 --clip-grad 0 "
    "--mock-data --split 90,5,5 --tokenizer-type NullTokenizer --vocab-size 256 --num-workers 0 "
    "--hidden-dropout 0 --attention-dropout 0 --eval-iters 2 --eval-interval 4 --log-interval 1"
)
ON_CPU = (
    "--transformer-impl local --attention-backend unfused --no-persist-layer-norm --no-rope-fusion "
    "--no-masked-softmax-fusion --no-gradient-accumulation-fusion --no-bias-gelu-fusion "
    "--no-bias-dropout-fusion --distributed-backend gloo --use-cpu-initialization "
    "--ckpt-format torch --no-load-rng"
)


def both(strategy, member, codec):
    return {"strategy": strategy, "activations": {member: codec}, "gradients": {member: codec}}


NONE, INT2 = "none", "fc int2"
BLOCKS = {
    NONE: both("direct", "codec", "none"),
    INT2: both("fc", "delta", "int2"),
    "int8 key + int2 delta": {
        "strategy": "key_delta",
        "activations": {"key": "int8", "delta": "int2"},
        "gradients": {"key": "int8", "delta": "int2"},
    },
    "direct int4": both("direct", "codec", "int4"),
}
RAW_GRADIENTS, EDEN4, WEIGHTS = "gradients none", "gradients eden4", "gradients eden4, weights eden4"
UNBIASED = {"name": "eden4", "scale": "unbiased"}
BLOCKS |= {
    name: {**BLOCKS[NONE], "data_parallel": plan}
    for name, plan in {
        RAW_GRADIENTS: {"scatter": "none", "gather": "none"},
        EDEN4: {"scatter": UNBIASED, "gather": UNBIASED},
        WEIGHTS: {"scatter": UNBIASED, "weights": "eden4"},
    }.items()
}
SPLIT = "--use-distributed-optimizer --bf16 --accumulate-allreduce-grads-in-fp32"
LOSS = re.compile(r"iteration +(\d+)/.*consumed samples: +(\d+) .*lm loss: (\S+)")
VALIDATION = re.compile(r"validation loss at iteration (\d+) \| lm loss value: (\S+)")


@dataclass
class Run:
    """What one run printed."""

    train_losses: dict[int, str] = field(default_factory=dict)
    validation_losses: dict[int, str] = field(default_factory=dict)
    consumed_samples: int = 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkouts", nargs="+", type=Path)
    options = parser.parse_args()
    rows = []
    for checkout in options.checkouts:
        build_helpers(checkout)
        for runs in (pipelines, replicas, interleaved, resumed):
            for row in runs(checkout.resolve()):
                print(row, flush=True)
                rows.append({"megatron_core": version(checkout), **row})
    write(rows, options.checkouts)
    wrong = [row for row in rows if row["as expected"] == "no"]
    if wrong:
        raise SystemExit(f"not as expected: {wrong}")


def pipelines(checkout):
    links = [name for name, block in BLOCKS.items() if "data_parallel" not in block]
    for stages, replicas, blocks in ((2, 1, links), (4, 1, (NONE, INT2)), (2, 2, (NONE, INT2))):
        stock = run(checkout, stages, replicas)
        yield row(stages, replicas, 1, "stock", stock)
        for name in blocks:
            found = run(checkout, stages, replicas, BLOCKS[name])
            yield row(stages, replicas, 1, name, found, found == stock if name == NONE else None)


def replicas(checkout):
    """Gradients, and changes of a distributed optimizer's weights."""
    for stages, more, names in (
        (1, "", (RAW_GRADIENTS, EDEN4)),
        (2, "", (RAW_GRADIENTS, EDEN4)),
        (2, SPLIT, (RAW_GRADIENTS, WEIGHTS)),
    ):
        stock = run(checkout, stages, 2, more=more)
        kind = ", distributed optimizer" if more else ""
        yield row(stages, 2, 1, f"stock{kind}", stock)
        for name in names:
            found = run(checkout, stages, 2, BLOCKS[name], more)
            yield row(stages, 2, 1, name, found, found == stock if name == RAW_GRADIENTS else None)


def interleaved(checkout):
    """Without stock, whose interleaved schedule swaps the messages of two links between two gloo ranks."""
    for name in (NONE, INT2):
        found = run(checkout, 2, 1, BLOCKS[name], "--num-layers-per-virtual-pipeline-stage 1")
        yield row(2, 1, 2, name, found)


def resumed(checkout):
    """Both runs print the mean loss of their first two steps as that of their second."""
    whole = run(checkout, 2, 1, BLOCKS[INT2])
    with tempfile.TemporaryDirectory() as folder:
        save = f"--save {folder} --save-interval {SAVED_STEP} --exit-interval {SAVED_STEP}"
        first = run(checkout, 2, 1, BLOCKS[INT2], save)
        yield row(2, 1, 1, f"{INT2}, interrupted", first)
        second = run(checkout, 2, 1, BLOCKS[INT2], f"--load {folder}")
    last = range(SAVED_STEP + 3, STEPS + 1)
    is_equal = (
        second.validation_losses[STEPS] == whole.validation_losses[STEPS]
        and second.consumed_samples == whole.consumed_samples
        and all(second.train_losses[step] == whole.train_losses[step] for step in last)
    )
    yield row(2, 1, 1, f"{INT2}, resumed", second, is_equal)


def run(checkout, stages, replicas, block=None, more=""):
    """A run of pretrain_gpt.py on stages * replicas ranks. block: None without the patch."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))
        ranks = ["--nproc_per_node", str(stages * replicas), "--master_port", str(free.getsockname()[1])]
        arguments = [*MODEL.split(), *ON_CPU.split(), "--pipeline-model-parallel-size", str(stages)]
        if block is not None:
            file = Path(folder) / "clapping.json"
            file.write_text(json.dumps({"clapping": block}))
            arguments += ["--clapping-config", str(file)]
        free.close()
        program = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *ranks,
            str(ROOT / "tests" / "commands" / "megatron_lm_rank.py"),  # checkouts have a package "tests"
        ]
        finished = subprocess.run(
            [*program, "pretrain_gpt.py", *arguments, *more.split()],
            cwd=checkout,
            env={
                **os.environ,
                "PYTHONPATH": f"{checkout}{os.pathsep}{ROOT}",
                "OMP_NUM_THREADS": "1",
                "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            },
            capture_output=True,
            text=True,
        )
    if finished.returncode:
        raise SystemExit(f"{arguments} {more}\n{finished.stdout[-2000:]}\n{finished.stderr[-6000:]}")
    return parse(finished.stdout)


def parse(output):
    found = Run()
    for step, samples, loss in LOSS.findall(output):
        found.train_losses[int(step)] = loss
        found.consumed_samples = int(samples)
    found.validation_losses = {int(step): loss for step, loss in VALIDATION.findall(output)}
    return found


def row(stages, replicas, chunks, config, found, is_as_expected=None):
    """is_as_expected: None where there is nothing to compare with."""
    return {
        "stages": stages,
        "replicas": replicas,
        "chunks": chunks,
        "config": config,
        "steps": max(found.train_losses),
        "consumed_samples": found.consumed_samples,
        "train_loss": found.train_losses[max(found.train_losses)],
        "validation_loss": found.validation_losses[max(found.validation_losses)],
        "as expected": {None: "-", True: "yes", False: "no"}[is_as_expected],
    }


def build_helpers(checkout):
    """What Megatron-LM's own make builds, for this Python rather than the system's."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    folder = checkout / "megatron" / "core" / "datasets"
    subprocess.run(["make", "-C", folder, f"LIBEXT={suffix}"], env={**os.environ, "PATH": path}, check=True)


def version(checkout):
    text = (checkout / "megatron" / "core" / "package_info.py").read_text()
    return ".".join(re.search(rf"^{part} = (\d+)", text, re.M)[1] for part in ("MAJOR", "MINOR", "PATCH"))


def write(rows, checkouts):
    from benchmarks.files import write_results

    facts = {
        "megatron_lm": "https://github.com/NVIDIA/Megatron-LM",
        "megatron_lm_versions": [version(checkout) for checkout in checkouts],
        "arguments": f"{MODEL} {ON_CPU}",
        "blocks": BLOCKS,
    }
    write_results(RESULTS, rows, facts)


if __name__ == "__main__":
    main()
