"""Runs what README and docs tell a user to type, one command after the other.

    python -m tests.commands.documented [PAGE ...]

Each as it stands, or with fewer steps, a small model, and both nodes on this machine, as `RULES` says, in a
clone of this checkout's last commit; about ten minutes. What cannot run here, or is run elsewhere, says why.
`tests.core.test_documented` holds the list against the pages.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "patches" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "recipes").glob("*.md")),
]
FIRST_WORDS = (
    *("python", "python3", "pip", "make", "deepspeed", "torchrun", "git", "tensorboard", "for"),
    *("sky", "kubectl", "sbatch", "sudo", "wg", "ping", "iperf3", "rsync"),
)
"""Of commands."""
MOST_S = 600
"""For one command."""
SETTINGS = ("cd", "export", "umask", ".")
"""What only sets the shell up."""


def list_commands(page: Path) -> list[str]:
    """Each on one line: of blocks in `sh`, and of indented blocks. ValueError for a line of the former that
    is neither a command nor a setting. Whole scripts, and those in YAML, are `tests.core.test_recipes`'s."""
    text = page.read_text()
    fenced = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = [line for block in fenced if not block.startswith("#!") for line in _join(block)]
    for line in found:
        if line.split(" ")[0] not in FIRST_WORDS + SETTINGS:
            raise ValueError(f"{page.name}: {line!r}; accepted: first words {FIRST_WORDS + SETTINGS}")
    found += [line for block in re.findall(r"(?:^    .*\n)+", plain, re.MULTILINE) for line in _join(block)]
    return [line for line in found if line.split(" ")[0] in FIRST_WORDS]


def _join(block: str) -> list[str]:
    """Its lines, without those that are empty, comments, and ends of lines that are escaped."""
    lines = (
        re.sub(r"\s+", " ", line.split("  #")[0]).strip() for line in block.replace("\\\n", " ").splitlines()
    )
    return [line for line in lines if line and not line.startswith("#")]


class Here(NamedTuple):
    """changes: of the command's text. num_nodes: launched at once on this machine."""

    changes: Mapping[str, str] = {}
    num_nodes: int = 1


class Elsewhere(NamedTuple):
    why: str


FRESH = Elsewhere("run in a fresh clone without an environment, before a release")
INSTALLED = Elsewhere("installs; `make train` in a fresh clone does the same, in this order")
NEEDS = "needs {}, which a machine for tests has not"
MEGATRON_LM = Elsewhere("tests.commands.megatron_lm, which needs a checkout of Megatron-LM")
SMALL = {"--steps 500": "--steps 2", "--steps 40 ": "--steps 2 ", "--length 2048": "--length 64"}
TWO_NODES = {"192.168.1.10": "127.0.0.1", **SMALL}


def recorded(*names: str) -> Elsewhere:
    return Elsewhere(" ".join(("minutes to hours; what it gave is recorded, with the commit, in", *names)))


STEPS = Here({".json": ".json --steps 2"})
OF_CPU = "--steps 2 --dtype float32 --clip-grad 0.0"
SMALL_MODEL = "--model my/model --data my/text --length 64"
RULES: dict[str, Here | Elsewhere] = {
    # Of which a command has the text, the first counts.
    "make ": FRESH,
    "pip install tensorboard": Elsewhere("the run beside it writes CSV files, which need nothing more"),
    "pip install": INSTALLED,
    "-m venv": INSTALLED,
    "clapping_ds.plan": Here(),
    "python -m clapping_ds.doctor": Here(),
    "--nproc_per_node 2 -m clapping_ds.doctor": Here(),
    "--module clapping_ds.doctor --config ds_config": Here({"deepspeed": "deepspeed --num_accelerators 2"}),
    "node-a --master_port 29500 -m clapping_ds.doctor": Here({"node-a": "127.0.0.1"}, num_nodes=2),
    "192.168.1.10": Here({"192.168.1.10": "127.0.0.1", **SMALL}, num_nodes=2),
    "schema.json": Here(),
    "launch.mixture": STEPS,
    "launch.pretrain_crnet": STEPS,
    "launch.pretrain_gpt --deepspeed_config launch/ds": STEPS,
    "launch.pretrain_gpt --deepspeed_config watched": Here({"160": "5"}),
    "launch.pretrain_gpt_megatron": Here(
        {"-m": "on_cpu.py -m", ".json": f".json {OF_CPU}", "--steps 100": ""}
    ),
    "launch.finetune --deepspeed_config launch": Here({"--save": "--length 64 --steps 2 --save"}),
    "launch.finetune_torch": Here({".json": f".json --steps 1 {SMALL_MODEL}"}),
    "clapping_ds.run train.py": Here({"deepspeed": "deepspeed --num_accelerators 2"}),
    "do echo": Here({"/tmp/": "pods_"}),
    "--hostfile /tmp/": Here(
        {
            "/tmp/": "pods_",
            '"$JOB_COMPLETION_INDEX"': "0",
            "/config/": "",
            "--num-stages": f"{SMALL_MODEL} --steps 2 --num-stages",
        },
        num_nodes=2,
    ),
    "my_loop.py": Here({"my_loop.py": "on_cpu.py my_loop.py"}),
    "patches.megatron_lm": MEGATRON_LM,
    "git clone": MEGATRON_LM,
    "benchmarks.training.time_to_loss": Here({"loss": "loss --results results"}),
    "benchmarks.training.equal_time": Here({"equal_time": "equal_time --results results"}),
    "benchmarks.training.ways": recorded("ways.json"),
    "benchmarks.model.damage": recorded("damage.json"),
    "benchmarks.training.finetune": recorded("finetune.json"),
    "benchmarks.training.scratch": recorded("scratch.json"),
    "benchmarks.training.curves": recorded("time_to_loss_curves.csv"),
    "benchmarks.training.reuse": recorded("reuse.json"),
    "benchmarks.training.wan": recorded("wan.json"),
    "benchmarks.training.compare": recorded("comparison.json"),
    "benchmarks.codecs.capture": recorded("captured.json"),
    "benchmarks.codecs.quality": recorded("codecs.json"),
    "tensorboard --logdir": Elsewhere("ends when it is stopped; the picture beside it is what it showed"),
    "kubectl ": Elsewhere(NEEDS.format("a Kubernetes cluster")),
    "sbatch ": Elsewhere(NEEDS.format("Slurm")),
    "sky ": Elsewhere(NEEDS.format("clouds")),
    **dict.fromkeys(("sudo ", "wg ", "ping ", "iperf3 ", "rsync "), Elsewhere(NEEDS.format("two machines"))),
}  # fmt: skip


def find_rule(command: str) -> str:
    """The text of the rule that counts. KeyError where there is none."""
    for text in RULES:
        if text in command:
            return text
    raise KeyError(command)


TRAIN = """
import argparse, deepspeed, torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
parser.add_argument("--local_rank", type=int)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # half a minute of compiling
deepspeed.init_distributed()
layers = [LayerSpec(nn.Linear, 128, 128), LayerSpec(nn.ReLU), LayerSpec(nn.Linear, 128, 10)]
module = PipelineModule(layers, num_stages=2, loss_fn=nn.functional.cross_entropy)
adam = torch.optim.AdamW(module.parameters(), lr=3e-3)
engine, *_ = deepspeed.initialize(args=parser.parse_args(), model=module, optimizer=adam)
x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
engine.train_batch(data_iter=iter(lambda: (x, x[:, :10].argmax(1)), None))
assert type(engine).__module__.startswith("clapping_ds"), type(engine)
"""
ON_CPU = """
import runpy, sys
import torch.distributed as dist
from launch.megatron_on_cpu import on_cpu
from unittest import mock

def start(backend, start=dist.init_process_group):
    start("gloo")

del sys.argv[0]
with on_cpu(), mock.patch("torch.cuda.set_device"), mock.patch("torch.distributed.init_process_group", start):
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""What names CUDA and NCCL, on CPU ranks."""


def prepare(folder: Path) -> None:
    """What the pages have the user write, and a small model with a text."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from launch import llm

    two_pcs, megatron, monitoring = (
        (folder / "docs" / name).read_text()
        for name in ("recipes/two-pcs.md", "recipes/megatron-lm.md", "monitoring.md")
    )
    (folder / "two_pcs.json").write_text(find_block(two_pcs, "json"))
    (folder / "hostfile").write_text("pc-a slots=1\npc-b slots=1\n")
    (folder / "clapping.json").write_text(find_block(megatron, "json"))
    (folder / "my_loop.py").write_text(find_block(megatron, "python"))
    (folder / "watched.json").write_text(find_block(monitoring, "json").replace("tensorboard", "csv_monitor"))
    (folder / "ds_config.json").write_text((folder / "launch" / "finetune.json").read_text())
    (folder / "train.py").write_text(TRAIN)
    (folder / "on_cpu.py").write_text(ON_CPU)
    (folder / "results").mkdir()
    for name in ("time_to_loss_curves.csv", "ways.csv"):
        (folder / "results" / name).write_text((folder / "benchmarks" / "results" / name).read_text())
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=49152, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "my" / "model")
    llm.load(llm.SMOLLM2)[1].save_pretrained(folder / "my" / "model")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "my" / "text").mkdir()
    for page in PAGES:
        (folder / "my" / "text" / f"{page.parent.name}_{page.name}").write_text(page.read_text())


def find_block(text: str, language: str) -> str:
    """The first."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]


def adapt(command: str, how: Here) -> str:
    """What is run in its place."""
    for old, new in how.changes.items():
        command = command.replace(old, new, 1)
    if how.num_nodes == 1:
        return command
    nodes = [command.replace("--node_rank 0", f"--node_rank {node}") for node in range(how.num_nodes)]
    waits = "; ".join(f"wait ${{nodes[{node}]}} || failed=1" for node in range(how.num_nodes))
    return " ".join(f"{node} & nodes+=($!);" for node in nodes) + f" {waits}; exit ${{failed:-0}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pages", nargs="*", help="names, as two-pcs.md; without any: all")
    options = parser.parse_args()
    wanted = [page for page in PAGES if not options.pages or page.name in options.pages]
    commands = dict.fromkeys(command for page in wanted for command in list_commands(page))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo",
        "NUM_NODES": "2", "MASTER_ADDR": "127.0.0.1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkout"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        prepare(folder)
        for command in commands:
            how = RULES[find_rule(command)]
            if isinstance(how, Elsewhere):
                print(f"not here  {command}\n          {how.why}", flush=True)
                continue
            start_s = time.perf_counter()
            run = subprocess.run(
                ["timeout", str(MOST_S), "bash", "-c", adapt(command, how)],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
            )
            took_s = time.perf_counter() - start_s
            print(f"{'FAILED' if run.returncode else 'ok':<6}{took_s:>4.0f}  {command}", flush=True)
            if run.returncode:
                failed.append(command)
                print(adapt(command, how), run.stdout[-2000:], run.stderr[-4000:], sep="\n", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} failed")


if __name__ == "__main__":
    main()
