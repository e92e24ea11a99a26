"""Whether the tests of each host pass with the versions that are installed: a row of docs/compatibility.md.

    python -m tests.commands.compatibility [--all]

Prints the row, and ends with an error where a test failed. Without --all: the tests that hold each host
against its stock, in about four minutes on two cores.
"""

import argparse
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUITES = {
    "DeepSpeed": ["tests/deepspeed/test_engine.py", "tests/deepspeed/test_attach.py"],
    "torch pipelining": ["tests/torch/test_pipeline.py", "tests/torch/test_attach.py"],
    "Megatron-Core": ["tests/megatron/test_pipeline.py"],
}
PACKAGES = ("torch", "deepspeed", "megatron-core")
PASSED = 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all tests of each host")
    options = parser.parse_args()
    outcomes = {
        host: run([f"{Path(files[0]).parent}"] if options.all else files) for host, files in SUITES.items()
    }
    cells = {
        "Python": platform.python_version(),
        **{name: find_version(name) for name in PACKAGES},
        **outcomes,
    }
    print("|", " | ".join(cells), "|")
    print("|" + "---|" * len(cells))
    print("|", " | ".join(cells.values()), "|")
    if any(outcome.startswith("failed") for outcome in outcomes.values()):
        raise SystemExit(1)


def find_version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def run(tests):
    """In words, with the number of tests."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    print(done.stdout[-6000:] if done.returncode else "", file=sys.stderr)
    return (
        f"passed ({last.split(' in ')[0].strip('= ')})" if done.returncode == PASSED else f"failed ({last})"
    )


if __name__ == "__main__":
    main()
