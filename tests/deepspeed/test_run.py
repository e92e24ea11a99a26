"""Three ways in are equal, through DeepSpeed's own launcher; and what the launcher shows of bad input."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "clapping": {"strategy": "fc", "activations": {"delta": "int2"}, "gradients": {"delta": "int2"}},
}


def launch(*arguments, **environment):
    with socket.socket() as probe:  # another launch on this machine may hold DeepSpeed's default port
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [launcher, "--num_accelerators", "2", "--master_port", port, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def losses(done):
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("losses")]
    assert len(found) == 1, done.stdout + done.stderr
    return found[0]


def test_three_ways_in(tmp_path):
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps(CONFIG))
    script = ("tests/deepspeed/script.py", "--deepspeed", "--deepspeed_config", str(config))
    ways = [
        launch("--module", "clapping_ds.run", *script),
        launch(*script, "--entry", "enable"),
        launch(*script, "--entry", "initialize"),
    ]
    first, *others = map(losses, ways)
    assert first[0] == "ClappingPipelineEngine"
    assert others == [first, first]
    assert "saving against 32 bit" in ways[0].stdout
    stock = losses(launch(*script))
    assert stock[0] == "PipelineEngine"
    assert stock[1:] != first[1:]


def test_a_wrong_key_ends_the_launch_within_seconds(tmp_path):
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps({**CONFIG, "clapping": {"p_neu": 0.5}}))
    start = time.monotonic()
    done = launch(
        "--module", "clapping_ds.run", "tests/deepspeed/script.py", "--deepspeed_config", str(config)
    )
    assert done.returncode != 0
    assert "ValueError: clapping.p_neu = 0.5: unknown key; accepted: enabled" in done.stdout + done.stderr
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(("arguments", "message"), [([], "usage: "), (["missing.py"], "no such file")])
def test_run_names_what_it_needs(arguments, message):
    command = [sys.executable, "-m", "clapping_ds.run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stderr
