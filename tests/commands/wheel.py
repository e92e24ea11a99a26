"""The wheel alone, in a new environment outside the checkout, trains a pipeline with the README's diff.

    python -m tests.commands.wheel
    python -m tests.commands.wheel --torch "torch==2.13.0 --index-url ..."

Takes some minutes: torch is installed, and DeepSpeed builds itself against it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import clapping_ds, deepspeed, sys, torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

ds_config = {
    "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4,
    "clapping": {"activations": {"min_numel": 256}, "gradients": {"min_numel": 256}},
}
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # half a minute of compiling
deepspeed.init_distributed()
layers = [LayerSpec(nn.Linear, 128, 128), LayerSpec(nn.ReLU), LayerSpec(nn.Linear, 128, 10)]
pipeline_module = PipelineModule(layers, num_stages=2, loss_fn=nn.functional.cross_entropy)
optimizer = torch.optim.AdamW(pipeline_module.parameters(), lr=3e-3)
engine, *_ = clapping_ds.initialize(model=pipeline_module, optimizer=optimizer, config=ds_config)
x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
data = iter(lambda: (x, x[:, :10].argmax(1)), None)
losses = [float(engine.train_batch(data_iter=data)) for _ in range(30)]
(row, _) = engine.clapping_report()
assert losses[-1] < losses[0] / 2, losses
assert 7 < row["ratio"] < 8, row
assert clapping_ds.__file__.startswith(sys.prefix), clapping_ds.__file__
if engine.global_rank == 0:
    print(f"{clapping_ds.__file__}: loss {losses[0]:.3f} to {losses[-1]:.3f}, ratio {row['ratio']:.2f}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs first, alone")
    parser.add_argument("--port", default="29511", help="of the launcher")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pip = [f"{folder}/env/bin/pip", "install", "--quiet"]
        run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)], folder)
        (wheel,) = Path(folder).glob("*.whl")
        run([sys.executable, "-m", "venv", f"{folder}/env"], folder)
        run([*pip, *options.torch.split()], folder)
        run([*pip, "setuptools>=77", "wheel"], folder)
        run([*pip, "--no-build-isolation", f"{wheel}[deepspeed]"], folder)
        Path(folder, "train.py").write_text(SCRIPT)
        launcher = [f"{folder}/env/bin/deepspeed", "--num_accelerators", "2", "--master_port", options.port]
        run([*launcher, "train.py"], folder)


def run(command: list[str], folder: str) -> None:
    """Without what the checkout's own environment sets."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    subprocess.run(command, cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main()
