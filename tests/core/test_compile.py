"""Every kernel compiles for sm_80, sm_90 and gfx942, and none spills registers."""

import os
import subprocess
import sys

from benchmarks.kernels.static_analysis import TARGETS

SITUATION = "memory"  # the widest; `python -m benchmarks.kernels.report --static` compiles the others too


def test_kernels_compile_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.commands.compile_kernels", SITUATION]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.endswith(" spills")]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == len(TARGETS) * NUM_VARIANTS
    assert all(line.endswith(": 0 spills") for line in lines)


NUM_VARIANTS = 2 * (15 + 4 + 1) + 5 + 9
"""Encode and decode of each codec, of four with options, and of the one that needs most registers; and what
`transform` launches for both, without and with an eigenbasis."""
