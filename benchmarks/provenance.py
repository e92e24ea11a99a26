"""Where a figure comes from: commit, versions, machine."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def facts() -> dict[str, str | int | None]:
    """What a reader needs to know to repeat a measurement."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "deepspeed")},
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
